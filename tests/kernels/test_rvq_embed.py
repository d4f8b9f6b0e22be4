"""The fused lookup against one that is written out, on one device and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mimo_jax.config import MeshConfig
from mimo_jax.kernels.rvq_embed import rvq_embed
from mimo_jax.sharding import BATCH_AXES, make_mesh

SIZES, WIDTH = (9, 5, 3), 16
DELAYS = (0, 2, 1)


def _written_out(table_VE, codes_BCGR, delays, num_steps):
    """One frame of one patch at a time, in float64 on the host."""
    *leading, G, R = codes_BCGR.shape
    out = np.zeros((*leading, num_steps, table_VE.shape[1]))
    for index in np.ndindex(*leading, G, R):
        *at, g, r = index
        code, step = int(codes_BCGR[index]), g + delays[r]
        if code != SIZES[r] - 1 and step < num_steps:
            out[(*at, step)] += table_VE[sum(SIZES[:r]) + code]
    return out


def _inputs(leading, group_size=4, seed=0):
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, size, (*leading, group_size)) for size in SIZES], -1).astype(np.uint16)
    return rng.standard_normal((sum(SIZES), WIDTH)).astype(np.float32), codes


@pytest.mark.parametrize("leading", [(4,), (4, 3), (0, 3), (4, 0)], ids=str)
@pytest.mark.parametrize(
    ("delays", "num_steps"), [(None, None), (DELAYS, 6), (DELAYS, 5), ((0, 3, 0), 4), ((0, 4, 9), 4)]
)
def test_sums_and_gradients_are_those_of_the_lookup_written_out(leading, delays, num_steps):
    table, codes = _inputs(leading)
    steps, late = num_steps or 4, delays or (0, 0, 0)
    out = rvq_embed(table, codes, SIZES, delays=delays, num_steps=num_steps)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, _written_out(table, codes, late, steps), atol=1e-6)

    weights = np.random.default_rng(1).standard_normal(out.shape).astype(np.float32)
    given = jax.grad(lambda t: jnp.vdot(rvq_embed(t, codes, SIZES, delays=delays, num_steps=num_steps), weights))(
        jnp.asarray(table)
    )
    expected = np.zeros(table.shape)
    for v in range(len(table)):
        row = np.zeros_like(table)
        row[v] = 1
        expected[v] = (_written_out(row, codes, late, steps) * weights).sum(tuple(range(weights.ndim - 1)))
    np.testing.assert_allclose(given, expected, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 4, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1)], ids=str)
def test_meshes_agree_and_gather_the_table_only(sizes):
    table, codes = _inputs((4, 3))
    weights = np.random.default_rng(1).standard_normal((4, 3, 6, WIDTH)).astype(np.float32)

    def both(table, codes, weights):
        def total(table):
            out = rvq_embed(table, codes, SIZES, delays=DELAYS, num_steps=6)
            return jnp.vdot(out, weights), out

        (_, out), gradient = jax.value_and_grad(total, has_aux=True)(table)
        return out, gradient

    alone = both(table, codes, weights)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:4])
    with jax.set_mesh(mesh):
        cut, batch = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "fsdp"), (BATCH_AXES,)))
        given = (jax.device_put(table, cut), jax.device_put(codes, batch), jax.device_put(weights, batch))
        program = jax.jit(both, out_shardings=(batch, cut)).lower(*given).compile()
        for one, other in zip(alone, program(*given), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    text = program.as_text()
    assert "all-to-all(" not in text
    assert "collective-permute(" not in text


def test_bfloat16_is_rounded_once():
    table, codes = _inputs((4,))
    exact = rvq_embed(table, codes, SIZES)
    np.testing.assert_array_equal(rvq_embed(table, codes, SIZES, dtype=jnp.bfloat16), exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "wrong",
    [{"codes": np.zeros((2, 4, 2), int)}, {"table_VE": np.zeros((16, 4))}, {"delays": (0, 0, -1)}, {"delays": (0, 0)}],
    ids=["channels", "rows", "early", "count"],
)
def test_arguments_that_do_not_fit_are_refused(wrong):
    table, codes = _inputs((2,))
    with pytest.raises(ValueError, match="rvq_embed: expected"):
        rvq_embed(**({"table_VE": table, "codes": codes, "sizes": SIZES} | wrong))

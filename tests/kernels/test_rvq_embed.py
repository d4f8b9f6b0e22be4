"""The fused lookup against one that is written out, on one device and on meshes; its kernels for TPU and GPU."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
    use_abstract_mesh,
)

from mimo_jax.chips import parse_topology
from mimo_jax.config import MeshConfig
from mimo_jax.kernels.rvq_embed import gpu, reference, rvq_embed, tpu
from mimo_jax.planning.compiled import tpu_devices
from mimo_jax.sharding import BATCH_AXES, make_mesh

SIZES, WIDTH = (9, 5, 3), 16
DELAYS = (0, 2, 1)
AUDIO_SIZES, AUDIO_DELAYS = (1025, 1025, 129, 129, 129, 129, 129, 129), tuple(range(8))
TPUS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


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


@pytest.mark.parametrize(
    ("leading", "implementation"),
    [((4,), "xla"), ((4, 3), "xla"), ((0, 3), "xla"), ((4, 0), "xla"), ((4, 3), "interpret"), ((0, 3), "interpret")],
    ids=str,
)
@pytest.mark.parametrize(
    ("delays", "num_steps"), [(None, None), (DELAYS, 6), (DELAYS, 5), ((0, 3, 0), 4), ((4, 4, 9), 4)]
)
def test_sums_and_gradients_are_those_of_the_lookup_written_out(leading, delays, num_steps, implementation):
    table, codes = _inputs(leading)
    steps, late = num_steps or 4, delays or (0, 0, 0)
    look_up = functools.partial(
        rvq_embed, codes=codes, sizes=SIZES, delays=delays, num_steps=num_steps, implementation=implementation
    )
    out = look_up(table)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, _written_out(table, codes, late, steps), atol=1e-6)

    weights = np.random.default_rng(1).standard_normal(out.shape).astype(np.float32)
    given = jax.grad(lambda t: jnp.vdot(look_up(t), weights))(jnp.asarray(table))
    expected = np.zeros(table.shape)
    for v in range(len(table)):
        row = np.zeros_like(table)
        row[v] = 1
        expected[v] = (_written_out(row, codes, late, steps) * weights).sum(tuple(range(weights.ndim - 1)))
    np.testing.assert_allclose(given, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "implementation"),
    [(sizes, "xla") for sizes in ((1, 4, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1))]
    + [((1, 4, 1), "interpret"), ((2, 1, 2), "interpret")],
    ids=str,
)
def test_meshes_agree_and_gather_the_table_only(sizes, implementation):
    table, codes = _inputs((4, 3))
    weights = np.random.default_rng(1).standard_normal((4, 3, 6, WIDTH)).astype(np.float32)

    def both(table, codes, weights):
        def total(table):
            out = rvq_embed(table, codes, SIZES, delays=DELAYS, num_steps=6, implementation=implementation)
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


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_bfloat16_is_rounded_once(implementation):
    table, codes = _inputs((4,))
    exact = rvq_embed(table, codes, SIZES)
    given = rvq_embed(table, codes, SIZES, dtype=jnp.bfloat16, implementation=implementation)
    np.testing.assert_array_equal(given, exact.astype(jnp.bfloat16))
    assert given.dtype == jnp.bfloat16
    coarse = jnp.asarray(table, jnp.bfloat16)
    exact = rvq_embed(coarse.astype(jnp.float32), codes, SIZES, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(rvq_embed(coarse, codes, SIZES, implementation=implementation), exact)


@pytest.mark.parametrize(
    "wrong",
    [{"codes": np.zeros((2, 4, 2), int)}, {"table_VE": np.zeros((16, 4))}, {"delays": (0, 0, -1)}, {"delays": (0, 0)}],
    ids=["channels", "rows", "early", "count"],
)
def test_arguments_that_do_not_fit_are_refused(wrong):
    table, codes = _inputs((2,))
    with pytest.raises(ValueError, match="rvq_embed: expected"):
        rvq_embed(**({"table_VE": table, "codes": codes, "sizes": SIZES} | wrong))


# V, E, patches, frames, delays, steps: odd and single lanes, several blocks of lanes and of patches, ragged.
SHAPES = [
    (17, 1, 1, 1, (0,), 1, jnp.float32),
    (17, 100, 5, 4, (0, 2, 1), 6, jnp.bfloat16),
    (9, 129, 131, 3, (0, 0), 3, jnp.float32),
    (40, 256, 300, 2, (1, 0, 3, 2), 4, jnp.bfloat16),
    (7, 640, 33, 1, (0, 1, 2), 5, jnp.float32),
    (5, 1500, 20, 2, (0, 0), 2, jnp.bfloat16),
    (200, 24, 3, 2, (0,) * 20, 2, jnp.float32),
]


def _rows(V, X, G, R, kind, rng):
    """Channels with rows of their own; all codes equal, or all of them empty, in some cases."""
    ends = np.linspace(0, V, R + 1).astype(int)
    rows_XGR = np.stack([rng.integers(a, b, (X, G)) for a, b in itertools.pairwise(ends)], -1)
    if kind in ("same", "empty"):
        rows_XGR[:] = ends[:-1] if kind == "same" else ends[1:] - 1
    return jnp.asarray(rows_XGR, jnp.int32)


@pytest.mark.parametrize(("V", "E", "X", "G", "delays", "T", "dtype"), SHAPES)
@pytest.mark.parametrize("kernels", [tpu, gpu], ids=["tpu", "gpu"])
def test_kernels_add_what_the_reference_adds(kernels, V, E, X, G, delays, T, dtype):
    rng = np.random.default_rng(V + E)
    table = jax.ShapeDtypeStruct((V, E), jnp.float32)
    usual, embed = (
        jax.jit(functools.partial(function, delays=delays, num_steps=T, dtype=dtype))
        for function in (reference.embed, functools.partial(kernels.embed, interpret=True))
    )
    add_up = jax.jit(functools.partial(kernels.embed_gradient, table, delays=delays, interpret=True))
    for kind in ("random", "same", "empty", "large"):
        rows_XGR = _rows(V, X, G, len(delays), kind, rng)
        scale = 10.0 ** rng.integers(-20, 20, (V, E)) if kind == "large" else 1.0
        table_VE = jnp.asarray(rng.standard_normal((V, E)) * scale, jnp.float32)
        out = embed(table_VE, rows_XGR)
        assert out.dtype == dtype
        np.testing.assert_array_equal(np.asarray(out), np.asarray(usual(table_VE, rows_XGR)))

        gradient_XTE = jnp.asarray(rng.standard_normal((X, T, E)), dtype)
        given = np.asarray(add_up(rows_XGR, gradient_XTE))
        total_VE, sizes_VE = np.zeros((V, E)), np.zeros((V, E))
        for r, first, frames in reference.spans(G, delays, T):
            new_XGE = np.asarray(gradient_XTE[:, first : first + frames], np.float64)
            np.add.at(total_VE, np.asarray(rows_XGR)[:, :frames, r], new_XGE)
            np.add.at(sizes_VE, np.asarray(rows_XGR)[:, :frames, r], abs(new_XGE))
        assert (abs(given - total_VE) <= 1e-6 * sizes_VE).all()
        if kind == "random":
            np.testing.assert_allclose(given, total_VE, atol=1e-5, rtol=1e-5)
        np.testing.assert_array_equal(given, add_up(rows_XGR, gradient_XTE))


def test_tables_are_cut_until_they_fit_vmem_and_run_in_plain_jax_if_nothing_does(monkeypatch):
    table, codes = np.tile(_inputs((4,))[0], (1, 60)), _inputs((4,))[1]
    expected, shape = rvq_embed(table, codes, SIZES), (*table.shape, 12, 4, 4)
    for sublanes in (8, 4, 2, 1):
        taken = 4 * 128 * sublanes * (2 * 17 + 3 * 128 * 4)
        assert tpu.blocks(*shape) == (128, sublanes, taken)
        monkeypatch.setattr(tpu, "_MOST_VMEM", taken)
        assert f"[{8 // sublanes},{17 * sublanes},128]" in str(_traced(table, codes, "interpret"))
        given = rvq_embed(table, codes, SIZES, implementation="interpret")
        np.testing.assert_array_equal(given, expected)
        monkeypatch.setattr(tpu, "_MOST_VMEM", taken - 1)
    assert tpu.blocks(*shape) is None
    assert "pallas_call" not in str(_traced(table, codes, "interpret"))
    np.testing.assert_array_equal(rvq_embed(table, codes, SIZES, implementation="interpret"), expected)


def _traced(table, codes, implementation):
    return jax.make_jaxpr(functools.partial(rvq_embed, sizes=SIZES, implementation=implementation))(table, codes)


def test_float64_runs_in_plain_jax():
    table, codes = _inputs((4,))
    with jax.enable_x64(True):
        for implementation in ("interpret", "mosaic", "triton"):
            out = rvq_embed(table.astype(np.float64), codes, SIZES, implementation=implementation)
            np.testing.assert_allclose(out, _written_out(table, codes, (0, 0, 0), 4), atol=1e-14, rtol=0)
    assert "pallas_call" in str(_traced(table, codes, "interpret"))
    assert "pallas_call" not in str(_traced(table, codes, "auto"))  # on CPU


def test_codes_that_are_none_stay_inside_the_tables():
    table, codes = _inputs((4,))
    codes[0, 0] = 60000
    expected = rvq_embed(table, codes, SIZES, implementation="xla")
    np.testing.assert_array_equal(rvq_embed(table, codes, SIZES, implementation="interpret"), expected)


def _program(implementation, patches, num_steps, sizes=AUDIO_SIZES, delays=AUDIO_DELAYS, width=1024):
    """The lookup in bfloat16, its gradient, and the shapes of their arguments."""
    delays = None if num_steps == 4 else delays
    look_up = functools.partial(
        rvq_embed, sizes=sizes, delays=delays, num_steps=num_steps, dtype=jnp.bfloat16, implementation=implementation
    )
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((sum(sizes), width), jnp.float32),
            ((patches, 4, len(sizes)), jnp.uint16),
            ((patches, num_steps, width), jnp.bfloat16),
        )
    ]

    def gradient(table, codes, gradient):
        return jax.vjp(lambda table: look_up(table, codes), table)[1](gradient)[0]

    return [(look_up, shapes[:2]), (gradient, shapes)]


def _compile(function, shapes, device):
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)) for x in shapes]
    return jax.jit(function).lower(*shapes).compile()


@pytest.mark.parametrize("topology", TPUS)
def test_mosaic_takes_the_kernels(topology):
    pytest.importorskip("libtpu")
    devices = tpu_devices(parse_topology(topology))
    for width, num_steps in ((256, 4), (100, 6)):
        for function, shapes in _program("mosaic", 150, num_steps, SIZES, DELAYS, width):
            assert _compile(function, shapes, devices[0]).as_text().count("tpu_custom_call") == 1


def test_mosaic_takes_the_kernels_on_a_mesh():
    pytest.importorskip("libtpu")
    mesh = make_mesh(MeshConfig(data=1, fsdp=4), tpu_devices(parse_topology("v5e:2x2")))
    with jax.set_mesh(mesh):
        cut, batch = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "fsdp"), (BATCH_AXES,)))
        for function, shapes in _program("mosaic", 8, 6, SIZES, DELAYS, 512):
            placed = zip(shapes, (cut, batch, batch), strict=False)
            shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x, sharding in placed]
            text = jax.jit(function).lower(*shapes).compile().as_text()
            assert text.count("tpu_custom_call") == 1


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"])
def test_triton_takes_the_kernels(kind):
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)):
        for width, num_steps in ((1024, 4), (100, 10)):
            for function, shapes in _program("triton", 768, num_steps, width=width):
                lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
                assert lowered.as_text().count("__gpu$xla.gpu.triton") == 1


@pytest.mark.slow
@pytest.mark.parametrize("topology", TPUS)
@pytest.mark.parametrize(("patches", "num_steps"), [(768, 4), (768, 10), (6144, 4)])
def test_kernels_move_fewer_bytes_than_xla_at_production_shapes(topology, patches, num_steps):
    """Prints VMEM, HBM bytes and the time that these take at least. A row has 6144 patches, a chunk of them 768."""
    pytest.importorskip("libtpu")
    topology = parse_topology(topology)
    device = tpu_devices(topology)[0]
    P, S, vmem = tpu.blocks(sum(AUDIO_SIZES), 1024, 32, num_steps, 2)
    print(f"\n{topology.chip.kind}, {patches} patches x {num_steps} steps: blocks of {P} patches, ", end="")
    print(f"{S * 128} lanes, {vmem / 2**20:.1f} MiB of VMEM")
    assert vmem < 2**26
    for name, kernel, plain in zip(
        ("forward", "backward"), *(_program(run, patches, num_steps) for run in ("mosaic", "xla")), strict=True
    ):
        moved, usual = (_compile(*one, device).cost_analysis()["bytes accessed"] for one in (kernel, plain))
        least = sum(x.size * x.dtype.itemsize for x in kernel[1][:2]) + patches * num_steps * 1024 * 2
        seconds = (moved / topology.chip.hbm_rate, least / topology.chip.hbm_rate)
        print(f"  {name}: {moved / 1e6:.1f} MB ({1e6 * seconds[0]:.0f} us; inputs and outputs alone ", end="")
        print(f"{1e6 * seconds[1]:.0f} us), XLA {usual / 1e6:.1f} MB")
        assert moved < usual / 2

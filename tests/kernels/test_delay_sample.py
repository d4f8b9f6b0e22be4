"""Sampling step against one that is written out (float64, sorted, in the published order), and against chance.

Axes: B requests, R channels, V columns, E width.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
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
from mimo_jax.kernels.delay_sample import delay_sample, gpu, tpu
from mimo_jax.kernels.delay_sample.draw import Pattern
from mimo_jax.kernels.dispatch import default_implementation
from mimo_jax.planning.compiled import tpu_devices
from mimo_jax.sharding import BATCH_AXES, make_mesh

PRODUCTION = Pattern((1025, 1025) + (129,) * 6, tuple(range(8)), 4)
SMALL = Pattern((33, 33, 9, 20, 20, 20, 2), (0, 2, 1, 1, 0, 5, 3), 3)
ONE = Pattern((40,), (0,), 1)
WIDTH = 24


def _interpreted_gpu(logits, bits, step, table, params, *, sizes, delays, group_size):
    pattern = Pattern(tuple(sizes), tuple(delays), group_size)
    return gpu.delay_sample(logits, bits, jnp.int32(step), table, params, pattern, interpret=True)


@functools.cache
def _op(name, pattern):
    op = _interpreted_gpu if name == "gpu" else functools.partial(delay_sample, implementation=name)
    return jax.jit(functools.partial(op, **pattern._asdict()))


def _params(*settings):
    columns = np.array(settings, np.float64).reshape(-1, 3).T
    return tuple(x.astype(dtype) for x, dtype in zip(columns, (np.float32, np.int32, np.float32), strict=True))


def _kept(logits, temperature, top_k, top_p):
    """Which ids stay, and their scores: published rules on one row, sorted, in float64."""
    scores = (np.asarray(logits, np.float32) / np.float32(temperature)).astype(np.float64)
    kept = np.ones(len(scores), bool)
    if top_k:
        kept = scores >= np.sort(scores)[-min(top_k, len(scores))]
    if top_p:
        order = np.argsort(scores, kind="stable")
        mass = np.where(kept, np.exp(scores - scores.max()), 0)[order]
        dropped = np.cumsum(mass) / mass.sum() <= 1 - np.float32(top_p)
        dropped[-1] = False
        kept[order[dropped]] = False
    return kept, scores


def _probabilities(logits, temperature, top_k, top_p):
    """Exact probabilities of the ids; those of the best one where nothing is left or drawn."""
    kept = np.zeros(len(logits), bool)
    if temperature:
        kept, scores = _kept(logits, temperature, top_k, top_p)
        kept[-1] = False
    if not kept.any():
        return np.eye(len(logits))[np.argmax(logits[:-1])]
    mass = np.where(kept, np.exp(scores - scores[kept].max()), 0)
    return mass / mass.sum()


def _check(pattern, logits, bits, step, table, params, result, edge=1e-5):
    """Codes as written out, unless the draw is closer than `edge` to its neighbour; sums of the rows of the codes."""
    codes, x = (np.asarray(a) for a in result)
    B, starts = len(logits), pattern.starts
    active = [d <= step < d + pattern.group_size for d in pattern.delays]
    assert codes.dtype == np.int32 and codes.shape == (B, len(starts)) and x.dtype == np.float32
    for b in range(B):
        for r, (start, size) in enumerate(zip(starts, pattern.sizes, strict=True)):
            if not active[r]:
                assert codes[b, r] == 0
                continue
            row = np.asarray(logits[b, start : start + size], np.float32)
            p = _probabilities(row, *(a[b] for a in params))
            u, cumulative = (int(bits[b, r]) >> 8) * 2.0**-24, np.cumsum(p)
            code = codes[b, r]
            assert p[code] > 0
            assert (cumulative[code - 1] if code else 0) <= u + edge and u < cumulative[code] + edge
    expected = np.zeros(x.shape)
    for r, start in enumerate(starts):
        if active[r]:
            expected += np.asarray(table, np.float64)[start + codes[:, r]]
    np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-6)


def _inputs(pattern, B, logits_dtype=np.float32, table_dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    V = sum(pattern.sizes)
    logits = (3 * rng.standard_normal((B, V))).astype(logits_dtype)
    bits = rng.integers(0, 2**32, (B, len(pattern.sizes)), np.uint32)
    return logits, bits, rng.standard_normal((V, WIDTH)).astype(table_dtype)


SETTINGS = [
    (0.9, 0, 0.95),
    (0.0, 3, 0.5),
    (1.0, 0, 0.0),
    (0.6, 5, 0.95),
    (1.3, 1000, 1.0),
    (0.7, 1, 0.0),
    (2.0, 9, 0.3),
]


@pytest.mark.parametrize(
    ("name", "B", "dtype"),
    [
        ("xla", 1, jnp.float32),
        ("xla", 7, jnp.bfloat16),
        ("interpret", 3, jnp.float32),
        ("interpret", 7, jnp.bfloat16),
        ("gpu", 7, jnp.bfloat16),
    ],
)
def test_codes_and_sums_are_those_written_out(name, B, dtype):
    logits, bits, table = _inputs(SMALL, B, dtype, dtype)
    params = _params(*SETTINGS[:B])
    for step in range(-1, 9):
        _check(SMALL, logits, bits, step, table, params, _op(name, SMALL)(logits, bits, step, table, params))


@pytest.mark.parametrize("name", ["xla", "interpret"])
def test_codes_of_production_sizes_are_those_written_out(name):
    logits, bits, table = _inputs(PRODUCTION, 2)
    params = _params(*SETTINGS[:4:3])
    for step in (3, 9):
        _check(PRODUCTION, logits, bits, step, table, params, _op(name, PRODUCTION)(logits, bits, step, table, params))


@pytest.mark.parametrize("name", ["xla", "interpret", "gpu"])
def test_every_id_that_stays_and_no_other_comes_out(name):
    """Few values, so that rules end in the middle of ties; numbers from end to end, both ends included."""
    draws = 96 if name == "xla" else 66  # the kernel for TPUs takes 64 at a time
    rng = np.random.default_rng(3)
    bits = np.linspace(0, 2**32 - 1, draws).astype(np.uint32)[:, None]
    table = np.zeros((40, 8), np.float32)
    # No top-p at which the mass of some ids out of 40 is all but what may go.
    ends = [
        (0.9, 0, 0.957),
        (1, 7, 0.613),
        (2, 9, 0.317),
        (1, 0, 0.043),
        (1, 0, 1e-9),
        (1, 0, 1),
        (0.5, 3, 0),
        (0, 2, 0.5),
    ]
    for temperature, top_k, top_p in ends:
        params = _params(*[(temperature, top_k, top_p)] * draws)
        for values in ([0], [0, -0.0, 1], [-2, -1, 3], [1, -np.inf], [0, 1, 2, 3, 4, 60]):
            row = rng.choice(values, 40).astype(np.float32)
            logits = np.tile(row, (draws, 1))
            codes, _ = result = _op(name, ONE)(logits, bits, 0, table, params)
            _check(ONE, logits, bits, 0, table, params, result)
            expected = _probabilities(row, temperature, top_k, top_p)
            assert set(np.flatnonzero(expected > 2 / draws)) <= set(np.asarray(codes)[:, 0].tolist())


def test_empty_takes_its_share_of_the_nucleus_and_goes():
    logits = np.array([[0.0, 2.0, 1.0, 2.0, 200.0]] * 5, np.float32)  # beside "empty" the others weigh nothing
    params = _params((1, 0, 0.5), (1, 1, 0), (0, 0, 0), (1, 0, 0), (1, 3, 0))
    bits, table = np.full((5, 1), 2**31 + 2**30, np.uint32), np.eye(5, dtype=np.float32)
    for name in ("xla", "interpret", "gpu"):
        codes, _ = _op(name, Pattern((5,), (0,), 1))(logits, bits, 0, table, params)
        assert codes[:, 0].tolist() == [1, 1, 1, 3, 3]


@pytest.mark.parametrize("name", ["xla", "interpret", "gpu"])
def test_whatever_the_logits_codes_are_rows_of_the_table(name):
    logits = np.array([[np.nan] * 40, [-np.inf] * 40, [np.inf] * 40, [0] * 39 + [np.nan]], np.float32)
    for setting in SETTINGS:
        arguments = (np.full((4, 1), 7, np.uint32), 0, np.ones((40, 8), np.float32), _params(*[setting] * 4))
        codes, x = _op(name, ONE)(logits, *arguments)
        assert (codes >= 0).all() and (codes < 39).all() and (x == 1).all()


def test_goldens_of_the_published_sampler(parity_dir):
    inputs, expected = (np.load(parity_dir / "sampler" / f"{name}.npz") for name in ("inputs", "expected"))
    draws, size = 255, 601  # one size for all: ids without a score change nothing
    bits = np.linspace(0, 2**32 - 1, draws + 1).astype(np.uint32)[:, None]
    u, table = (bits[:-1, 0] >> 8) * 2.0**-24, np.zeros((size, 8), np.float32)
    for number, setting in enumerate(json.loads(str(inputs["meta"]))):
        logits, p = np.full(size, -np.inf, np.float32), np.zeros(size)
        given, removed = inputs[setting["logits"]], setting["removed"] or [size - 1]
        logits[: len(given)], p[: len(given)] = given, expected[f"setting{number:02d}/probs_after_removed"]
        order = np.append(np.delete(np.arange(size), removed), removed)  # the removed id comes last
        one = (setting["temperature"] or 1.0, setting["top_k"] or 0, setting["top_p"] or 0.0)
        params = _params(*[one] * draws, (0, *one[1:]))
        rows = np.tile(logits[order], (draws + 1, 1))
        codes, _ = _op("xla", Pattern((size,), (0,), 1))(rows, bits, 0, table, params)
        *drawn, greedy = np.asarray(codes)[:, 0]
        mass, cumulative = p[order[drawn]], np.cumsum(p[order])[drawn]
        assert (mass > 0).all() and (u < cumulative + 1e-5).all() and (u >= cumulative - mass - 1e-5).all()
        assert order[greedy] == expected[f"setting{number:02d}/greedy_token"]


def _chi_square(counts, p):
    """p-value; ids that are expected fewer than 5 times count as one."""
    expected = p * counts.sum()
    assert (counts[p == 0] == 0).all()
    rare = expected < 5
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    return scipy.stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), max(len(counts) - 1, 1))


CHANCE = [(1.0, 0, 0.0), (0.9, 0, 0.95), (0.6, 5, 0.95), (1.3, 10, 0.0), (0.7, 0, 0.5)]


@pytest.mark.parametrize(("name", "requests", "rounds"), [("xla", 16384, 8), ("interpret", 256, 1)])
def test_draws_follow_the_exact_probabilities(name, requests, rounds):
    """A million draws of each setting (2048 by the kernel)."""
    size, channels = 20, 8
    pattern = Pattern((size,) * channels, (0,) * channels, 1)
    rng = np.random.default_rng(11)
    row = (2 * rng.standard_normal(size)).astype(np.float32)
    logits = np.tile(row, (requests, channels))
    table = np.zeros((size * channels, 8), np.float32)
    for setting in CHANCE:
        params, counts = _params(*[setting] * requests), np.zeros(size, int)
        for _ in range(rounds):
            bits = rng.integers(0, 2**32, (requests, channels), np.uint32)
            codes, _ = _op(name, pattern)(logits, bits, 0, table, params)
            counts += np.bincount(np.asarray(codes).ravel(), minlength=size)
        assert counts.sum() == requests * channels * rounds
        assert _chi_square(counts, _probabilities(row, *setting)) * len(CHANCE) > 1e-4


def test_requests_do_not_touch_each_other():
    logits, bits, table = _inputs(SMALL, 7, jnp.bfloat16, jnp.bfloat16)
    params = _params(*SETTINGS)
    together, _ = _op("xla", SMALL)(logits, bits, 3, table, params)
    logits, table = logits.astype(np.float32), table.astype(np.float32)
    for b in range(7):
        one = slice(b, b + 1)
        alone, _ = _op("xla", SMALL)(logits[one], bits[one], 3, table, tuple(a[one] for a in params))
        np.testing.assert_array_equal(alone[0], together[b])


@pytest.mark.parametrize("name", ["interpret", "xla"])
def test_a_mesh_cuts_the_requests(name):
    pattern = Pattern((9, 9, 5), (0, 1, 2), 2)
    logits, bits, table = _inputs(pattern, 4)
    params = _params(*SETTINGS[:4])
    alone = _op("xla", pattern)(logits, bits, 1, table, params)
    mesh = make_mesh(MeshConfig(2, 2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        batch = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        given = jax.device_put((logits, bits, params), batch)
        op = jax.jit(functools.partial(delay_sample, implementation=name, **pattern._asdict()))
        codes, x = op(*given[:2], 1, table, given[2])
    np.testing.assert_array_equal(codes, alone[0])
    np.testing.assert_allclose(x, alone[1], rtol=1e-6)
    assert codes.sharding.is_equivalent_to(batch, 2)


def test_no_requests_and_wide_numbers_take_plain_jax():
    pattern = Pattern((9, 5), (0, 1), 2)
    with default_implementation("mosaic"):  # which nothing here could run
        codes, x = delay_sample(
            *_inputs(pattern, 0)[:2], 0, np.zeros((14, 8), np.float32), _params(), **pattern._asdict()
        )
        assert codes.shape == (0, 2) and x.shape == (0, 8)
        with jax.enable_x64(True):
            logits, bits, table = _inputs(pattern, 3, np.float64, np.float64)
            params = _params(*SETTINGS[:3])
            codes, x = delay_sample(logits, bits, 1, table, params, **pattern._asdict())
    assert x.dtype == np.float64
    _check(pattern, logits, bits, 1, table, params, (codes, x.astype(np.float32)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"logits_BV": np.zeros((2, 136), np.float32)},
        {"bits_BR": np.zeros((2, 6), np.uint32)},
        {"table_VE": np.zeros((136, 8), np.float32)},
        {"params": _params(*SETTINGS[:3])},
        {"delays": (0,) * 6},
        {"sizes": (*SMALL.sizes[:-2], 21, 1)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_arguments_that_do_not_fit_are_refused(wrong):
    logits, bits, table = _inputs(SMALL, 2)
    given = dict(logits_BV=logits, bits_BR=bits, table_VE=table, params=_params(*SETTINGS[:2]), step=0)
    with pytest.raises(ValueError, match="delay_sample: expected"):
        delay_sample(**(given | SMALL._asdict() | wrong))


# ----------------------------------------------------------------------------------------------------------
# Compilers, without the hardware


def _shapes(pattern, B, width, logits_dtype, table_dtype, sharding=None):
    def array(*shape, dtype=np.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    V, R = sum(pattern.sizes), len(pattern.sizes)
    params = array(B), array(B, dtype=np.int32), array(B)
    step = array(dtype=np.int32)
    return (
        array(B, V, dtype=logits_dtype),
        array(B, R, dtype=np.uint32),
        step,
        array(V, width, dtype=table_dtype),
        params,
    )


def _compiled_bytes(name, implementation, pattern, B, width, *dtypes):
    """Bytes of HBM that a program for a TPU moves, as the compiler counts them (bodies of loops once)."""
    pytest.importorskip("libtpu")
    shapes = _shapes(pattern, B, width, *dtypes, SingleDeviceSharding(tpu_devices(parse_topology(name))[0]))
    op = jax.jit(functools.partial(delay_sample, implementation=implementation, **pattern._asdict()))
    moved = op.lower(*shapes).compile().cost_analysis()["bytes accessed"]
    vmem = tpu.vmem_bytes(B, width, pattern)
    print(f"{name} {implementation} B={B}: {moved:,.0f} bytes of HBM; the kernel uses {vmem:,} of VMEM")
    assert vmem < tpu.VMEM_LIMIT
    return moved


TPUS = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]


@pytest.mark.parametrize("name", TPUS)
def test_the_kernel_compiles_for_tpus(name):
    _compiled_bytes(name, "mosaic", SMALL, 70, 24, jnp.bfloat16, jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("B", [1, 8, 64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", TPUS)
def test_the_kernel_moves_less_than_xla(name, dtype, B):
    kernel, xla = (_compiled_bytes(name, x, PRODUCTION, B, 1024, np.float32, dtype) for x in ("mosaic", "xla"))
    assert kernel < xla / 2


@pytest.mark.parametrize(("pattern", "dtype"), [(PRODUCTION, jnp.bfloat16), (SMALL, jnp.float32)], ids=["all", "small"])
def test_the_kernel_lowers_for_gpus(pattern, dtype):
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    op = jax.jit(lambda *given: gpu.delay_sample(*given, pattern))
    with use_abstract_mesh(mesh):
        text = op.trace(*_shapes(pattern, 3, 1024, dtype, dtype)).lower(lowering_platforms=("cuda",)).as_text()
    assert "__gpu$xla.gpu.triton" in text

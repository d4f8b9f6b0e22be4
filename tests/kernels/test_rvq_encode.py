"""The residual search: every implementation against float64 on the host, and what is compiled where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ahead_of_time import (
    PRODUCTION_SIZES,
    PRODUCTION_VECTORS,
    PRODUCTION_WIDTH,
    TPUS,
    compiled_for,
    print_comparison,
    triton_kernels,
)
from jax.sharding import NamedSharding, PartitionSpec
from models.tokenizer.tiny import fast_jit, random_codebook, tiny_config

from mimo_jax.config import ComputeConfig, MeshConfig
from mimo_jax.kernels.dispatch import default_implementation
from mimo_jax.kernels.rvq_encode import gpu, rvq_encode, tpu
from mimo_jax.kernels.rvq_encode.parts import bfloat16_parts, inner_products, rows
from mimo_jax.models.tokenizer.audio_tokenizer import AudioTokenizer
from mimo_jax.sharding import BATCH_AXES, make_mesh

TOLERANCE = 1e-5  # of |x|^2 + |e|^2: where the margin is larger, the code must be that of float64


def _run(implementation, x, books, **options):
    if implementation == "triton, interpreted":
        run = functools.partial(gpu.encode, sums=True, interpret=True)
    else:
        run = functools.partial(rvq_encode, implementation=implementation, **options)
    return fast_jit(run)(jnp.asarray(x), tuple(map(jnp.asarray, books)))


IMPLEMENTATIONS = ["xla", "interpret", "triton, interpreted"]


def _check(x, books, out):
    """Each code against the float64 distances of the residual that the codes before it leave over."""
    codes, quantized, norms = map(np.asarray, out)
    assert codes.dtype == np.int32 and codes.shape == (len(x), len(books))
    assert quantized.dtype == norms.dtype == np.float32
    residual, total = np.asarray(x, np.float32), np.zeros(x.shape, np.float32)
    for level, (book, code) in enumerate(zip(books, codes.T, strict=True)):
        book = np.asarray(book, np.float32)
        assert ((code >= 0) & (code < len(book))).all()
        x64, e64 = residual.astype(np.float64), book.astype(np.float64)
        distance = ((x64[:, None] - e64) ** 2).sum(-1)
        best = distance.argmin(1)
        scale = (x64**2).sum(1) + np.maximum((e64**2).sum(1)[code], (e64**2).sum(1)[best])
        worse = distance[np.arange(len(x)), code] - distance.min(1)
        assert (worse <= TOLERANCE * scale).all(), level
        same = (book[:, None] == book).all(-1).argmax(1)  # the first entry that is the same as each
        np.testing.assert_array_equal(code, same[code])
        residual, total = residual - book[code], total + book[code]
        np.testing.assert_allclose(norms[:, level], (residual.astype(np.float64) ** 2).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(quantized, total)


def _random_case(seed):
    """Vectors and codebooks with zeros, duplicates, near duplicates, vectors that are entries, and their negatives."""
    rng = np.random.default_rng(seed)
    n, width = rng.choice([1, 2, 7, 65, 300]), rng.choice([1, 3, 20, 130])
    sizes = rng.choice([1, 2, 5, 128, 129, 513], rng.integers(1, 4))
    scale = [1.0, 1e-14, 1e15][seed % 3]
    x = rng.standard_normal((n, width))
    books = [rng.standard_normal((size, width)) * 0.7**level for level, size in enumerate(sizes)]
    for book in books:
        book[-1] = book[rng.integers(len(book))]
        book[rng.integers(len(book))] = 0
        book[len(book) // 2] = -book[0]
        book[len(book) // 3] = book[0] + 0.01 * rng.standard_normal(width)  # bfloat16 cannot tell them apart
    picked = rng.integers(n, size=4)
    x[picked[0]] = 0
    x[picked[1:]] = books[0][[0, len(books[0]) // 3, rng.integers(len(books[0]))]]
    dtypes = [jnp.float32, jnp.bfloat16]
    return (
        np.asarray(jnp.asarray(x * scale, dtypes[rng.integers(2)])),
        [np.asarray(jnp.asarray(book * scale, dtypes[rng.integers(2)])) for book in books],
    )


@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_codes_are_those_of_float64(implementation, seed):
    x, books = _random_case(seed)
    _check(x, books, _run(implementation, x, books))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_of_entries_at_one_distance_the_first_is_taken(implementation):
    """Within a block of entries and across blocks, exact duplicates and others."""
    rng = np.random.default_rng(0)
    book = rng.standard_normal((700, 24)).astype(np.float32)
    book[[130, 600]] = book[3]
    book[[515, 699]] = book[260]
    axes = 4 * np.eye(24, dtype=np.float32)
    x = np.concatenate([book[[3, 600, 260, 699]], np.zeros((1, 24), np.float32)])
    out = _run(implementation, x, [book, axes])
    np.testing.assert_array_equal(out.codes_NR[:4], [[3, 0], [3, 0], [260, 0], [260, 0]])
    signs = np.concatenate([-axes, axes, -axes])
    np.testing.assert_array_equal(_run(implementation, np.zeros((3, 24), np.float32), [signs]).codes_NR, 0)


@pytest.mark.parametrize("implementation", ["xla", "interpret", "triton"])
def test_no_vectors(implementation):
    out = rvq_encode(np.zeros((0, 5)), [np.zeros((3, 5)), np.zeros((2, 5))], implementation=implementation)
    assert [a.shape for a in out] == [(0, 2), (0, 5), (0, 2)]


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_the_first_levels_alone_are_those_of_all(implementation):
    x, books = np.eye(6, dtype=np.float32), [np.eye(6, dtype=np.float32)[::-1] * 0.9**level for level in range(4)]
    every = _run(implementation, x, books)
    for levels in (1, 3):
        first = _run(implementation, x, books, num_levels=levels)
        np.testing.assert_array_equal(first.codes_NR, every.codes_NR[:, :levels])
        codes, *nothing = _run(implementation, x, books, num_levels=levels, sums=False)
        np.testing.assert_array_equal(codes, first.codes_NR)
        assert nothing == [None, None]


def test_sums_that_nobody_asks_for_cost_nothing():
    x, books = jnp.zeros((64, 16)), [jnp.zeros((8, 16))] * 3
    flops = [
        jax.jit(lambda x, books, sums=sums: rvq_encode(x, books, sums=sums).codes_NR)
        .lower(x, books)
        .compile()
        .cost_analysis()["flops"]
        for sums in (True, False)
    ]
    assert flops[0] == flops[1]


def _kernels(implementation, x, books, **options):
    run = functools.partial(rvq_encode, implementation=implementation, **options)
    return str(jax.make_jaxpr(run)(x, books)).count("pallas_call")


def test_plain_jax_runs_where_no_kernel_can(monkeypatch):
    x, books = jnp.ones((4, 8)), [jnp.ones((3, 8))]
    assert _kernels("interpret", x, books) == 1
    assert _kernels("auto", x, books) == _kernels("xla", x, books) == 0
    with default_implementation("interpret"):
        assert _kernels("auto", x, books) == 1
    with jax.enable_x64(True):
        assert _kernels("interpret", x.astype(jnp.float64), books) == 0
        out = rvq_encode(x, [b.astype(jnp.float64) for b in books], implementation="interpret")
        assert out.quantized_ND.dtype == out.residual_norms_NR.dtype == jnp.float64
    monkeypatch.setattr(tpu, "VMEM_LIMIT", tpu.vmem_bytes(x, books, True) - 1)
    assert _kernels("interpret", x, books) == 0


@pytest.mark.parametrize("sizes", [(1, 4, 1), (2, 1, 2), (1, 2, 2)], ids=str)
def test_meshes_agree(sizes):
    rng = np.random.default_rng(0)
    books = [rng.standard_normal((k, 16)).astype(np.float32) for k in (40, 5)]
    x = rng.standard_normal((8, 16)).astype(np.float32)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:4])
    for rows_of_all, implementation in ((8, "interpret"), (8, "xla"), (7, "interpret")):
        given = x[:rows_of_all]
        alone = rvq_encode(given, books, implementation="xla")
        with jax.set_mesh(mesh):
            cut = PartitionSpec(BATCH_AXES) if rows_of_all == 8 else PartitionSpec()
            run = functools.partial(rvq_encode, implementation=implementation)
            out = jax.jit(run)(jax.device_put(given, NamedSharding(mesh, cut)), books)
        np.testing.assert_array_equal(out.codes_NR, alone.codes_NR)
        np.testing.assert_allclose(out.quantized_ND, alone.quantized_ND, atol=1e-6)
        np.testing.assert_allclose(out.residual_norms_NR, alone.residual_norms_NR, rtol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [{"num_levels": 0}, {"num_levels": 3}, {"x_ND": np.zeros((2, 3))}, {"x_ND": np.zeros(4)}]
    + [{"codebooks": books} for books in ([], [np.zeros((0, 4))], [np.zeros(4)], [np.zeros((3, 4)), np.zeros((3, 5))])],
    ids=["no level", "levels", "width", "axes of x", "no book", "no entry", "axes of a book", "widths"],
)
def test_arguments_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError, match="rvq_encode: expected"):
        rvq_encode(**({"x_ND": np.zeros((2, 4)), "codebooks": [np.zeros((3, 4))] * 2} | wrong))


def test_parts_hold_every_bit_and_their_products_are_as_exact_as_float32():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    x = bits[(np.abs(bits) > 1e-31) & (np.abs(bits) < 1e38)]
    parts = jax.jit(bfloat16_parts)(x)
    assert [p.dtype for p in parts] == [jnp.bfloat16] * 3
    a, b, c = (np.asarray(p, np.float32) for p in parts)
    np.testing.assert_array_equal((a + b) + c, x)
    few = jnp.asarray(x[:7], jnp.bfloat16)
    assert bfloat16_parts(few)[0] is few and len(bfloat16_parts(few)) == 1

    x, e = (rng.standard_normal((n, 1280)).astype(np.float32) for n in (50, 40))
    both = [jax.jit(bfloat16_parts)(array) for array in (x, e)]
    exact = x.astype(np.float64) @ e.T.astype(np.float64)
    scale = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(e, axis=1)
    assert (np.abs(inner_products(*both) - exact) < 1e-6 * scale).all()
    index = jnp.array([[39], [0], [40], [-1]])
    np.testing.assert_array_equal(rows(both[1], index), np.concatenate([e[[39, 0]], np.zeros((2, 1280))]))


def test_the_tokenizer_encodes_and_decodes_with_the_kernels_that_are_set():
    config = tiny_config()
    codebook, codes = random_codebook(config), jnp.zeros((1, 2, 4), jnp.int32)
    wav, ids = jnp.zeros((1, 1920)), jnp.ones((1, 8), jnp.int32)
    for kernels, count in (("interpret", 1), ("auto", 0)):
        model = AudioTokenizer(config, ComputeConfig(kernels=kernels))
        init = functools.partial(model.init, method=model.encode)
        params = jax.eval_shape(init, jax.random.key(0), wav, ids)["params"]
        encode = functools.partial(model.apply, method=model.encode)
        program = jax.make_jaxpr(encode)({"params": params, "codebook": codebook}, wav, ids)
        assert str(program).count("pallas_call") == count
        decode = functools.partial(model.apply, method=model.dequantize)
        assert str(jax.make_jaxpr(decode)({"codebook": codebook}, codes)).count("pallas_call") == count


def _shapes(n, width, sizes, dtype):
    return jax.ShapeDtypeStruct((n, width), dtype), tuple(jax.ShapeDtypeStruct((k, width), dtype) for k in sizes)


@pytest.mark.parametrize("topology", TPUS)
@pytest.mark.parametrize(
    "shapes",
    [
        _shapes(1024, 128, (513, 128), jnp.float32),
        _shapes(1204, 20, (130, 5, 1), jnp.float32),
        _shapes(4, 1, (600, 3), jnp.bfloat16),
    ],
    ids=["aligned", "odd", "narrow"],
)
def test_compiles_for_tpus(topology, shapes):
    program = compiled_for(topology, functools.partial(rvq_encode, implementation="mosaic"), *shapes)
    assert "tpu_custom_call" in program.as_text()


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize(
    "shapes",
    [
        _shapes(PRODUCTION_VECTORS, PRODUCTION_WIDTH, PRODUCTION_SIZES, jnp.float32),
        _shapes(5, 1, (3, 1), jnp.bfloat16),
    ],
    ids=["production", "narrow"],
)
def test_lowers_for_gpus(shapes, sums):
    assert triton_kernels(functools.partial(rvq_encode, implementation="triton", sums=sums), *shapes) == 1


@pytest.mark.slow
@pytest.mark.parametrize("topology", TPUS)
def test_moves_fewer_bytes_than_xla_at_production_shapes(topology):
    devices = 4 if topology == "v5p:2x2x1" else 1
    shapes = _shapes(PRODUCTION_VECTORS * devices, PRODUCTION_WIDTH, PRODUCTION_SIZES, jnp.float32)
    x, books = _shapes(PRODUCTION_VECTORS, PRODUCTION_WIDTH, PRODUCTION_SIZES, jnp.float32)
    kernel, plain = (
        compiled_for(topology, functools.partial(rvq_encode, implementation=name, sums=False), *shapes)
        for name in ("mosaic", "xla")
    )
    print_comparison(topology, kernel, plain, tpu.cost(x, books, False).flops, tpu.vmem_bytes(x, books, False))
    assert tpu.fits(x, books, True)

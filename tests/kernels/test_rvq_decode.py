"""The sum of named entries: every implementation against one that is written out, and what is compiled where."""

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
from models.tokenizer.tiny import fast_jit

from mimo_jax.config import MeshConfig
from mimo_jax.kernels.rvq_decode import gpu, rvq_decode, tpu
from mimo_jax.kernels.rvq_decode.reference import rows_of
from mimo_jax.sharding import BATCH_AXES, make_mesh

IMPLEMENTATIONS = ["xla", "interpret", "triton, interpreted"]


def _run(implementation, codes, books):
    if implementation == "triton, interpreted":

        def run(codes, books):
            books = books[: codes.shape[1]]
            return gpu.decode(rows_of(codes, books), books, interpret=True)
    else:
        run = functools.partial(rvq_decode, implementation=implementation)
    return fast_jit(run)(jnp.asarray(codes), tuple(map(jnp.asarray, books)))


def _written_out(codes, books):
    """Sums in float32, level by level; JAX's rule for indices that are outside."""
    total = np.zeros((len(codes), books[0].shape[1]), np.float32)
    for code, book in zip(np.asarray(codes, np.int64).T, books, strict=False):
        row = np.clip(np.where(code < 0, code + len(book), code), 0, len(book) - 1)
        total = total + np.asarray(book, np.float32)[row]
    return total


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sums_are_those_written_out(implementation, seed):
    """To the bit; codes outside of the codebooks, and fewer levels than there are codebooks, among them."""
    rng = np.random.default_rng(seed)
    n, width = rng.choice([1, 2, 33, 300]), rng.choice([1, 6, 20, 256])
    sizes = rng.choice([1, 2, 5, 128, 513], rng.integers(1, 5))
    scale = [1.0, 1e-14, 1e30][seed % 3]
    dtypes = [jnp.float32, jnp.bfloat16]
    books = [np.asarray(jnp.asarray(rng.standard_normal((k, width)) * scale, dtypes[rng.integers(2)])) for k in sizes]
    levels = rng.integers(1, len(books) + 1)
    codes = np.stack([rng.integers(-2 * k, 2 * k, n) for k in sizes[:levels]], axis=1)
    codes[0] = 65535
    if seed % 2:
        codes = np.abs(codes).astype(np.uint16)
    out = _run(implementation, codes, books)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, _written_out(codes, books))


@pytest.mark.parametrize("implementation", ["xla", "interpret", "triton"])
def test_no_vectors(implementation):
    assert rvq_decode(np.zeros((0, 2), int), [np.zeros((3, 5))] * 2, implementation).shape == (0, 5)


def test_plain_jax_runs_where_no_kernel_can(monkeypatch):
    codes, books = jnp.zeros((4, 1), jnp.int32), [jnp.ones((3, 8))]
    kernels = lambda name, books: str(  # noqa: E731
        jax.make_jaxpr(functools.partial(rvq_decode, implementation=name))(codes, books)
    ).count("pallas_call")
    assert kernels("interpret", books) == 1
    assert kernels("auto", books) == 0
    with jax.enable_x64(True):
        wide = [b.astype(jnp.float64) for b in books]
        assert kernels("interpret", wide) == 0
        assert rvq_decode(codes, wide, "interpret").dtype == jnp.float64
    monkeypatch.setattr(tpu, "VMEM_LIMIT", tpu.vmem_bytes(codes, books) - 1)
    assert kernels("interpret", books) == 0


def test_plain_jax_has_a_gradient():
    codes, book = jnp.array([[1], [1], [0]]), jnp.ones((3, 2))
    np.testing.assert_array_equal(jax.grad(lambda b: rvq_decode(codes, [b]).sum())(book), [[1, 1], [2, 2], [0, 0]])


@pytest.mark.parametrize("sizes", [(1, 4, 1), (2, 1, 2), (1, 2, 2)], ids=str)
def test_meshes_agree(sizes):
    rng = np.random.default_rng(0)
    books = [rng.standard_normal((k, 16)).astype(np.float32) for k in (40, 5)]
    codes = np.stack([rng.integers(0, k, 8) for k in (40, 5)], axis=1)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:4])
    for rows, implementation in ((8, "interpret"), (8, "xla"), (7, "interpret")):
        with jax.set_mesh(mesh):
            cut = NamedSharding(mesh, PartitionSpec(BATCH_AXES) if rows == 8 else PartitionSpec())
            run = functools.partial(rvq_decode, implementation=implementation)
            out = jax.jit(run)(jax.device_put(codes[:rows], cut), books)
        np.testing.assert_array_equal(out, _written_out(codes[:rows], books))


@pytest.mark.parametrize(
    "wrong",
    [{"codes_NR": np.zeros(shape, int)} for shape in ((2,), (2, 0), (2, 3))]
    + [{"codebooks": books} for books in ([], [np.zeros((0, 4))] * 2, [np.zeros((3, 4)), np.zeros((3, 5))])],
    ids=["axes", "no level", "levels", "no book", "no entry", "widths"],
)
def test_arguments_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError, match="rvq_decode: expected"):
        rvq_decode(**({"codes_NR": np.zeros((2, 2), int), "codebooks": [np.zeros((3, 4))] * 2} | wrong))


def _shapes(n, width, sizes, dtype):
    codes = jax.ShapeDtypeStruct((n, len(sizes)), jnp.int32)
    return codes, tuple(jax.ShapeDtypeStruct((k, width), dtype) for k in sizes)


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
    program = compiled_for(topology, functools.partial(rvq_decode, implementation="mosaic"), *shapes)
    assert "tpu_custom_call" in program.as_text()


@pytest.mark.parametrize(
    "shapes",
    [
        _shapes(PRODUCTION_VECTORS, PRODUCTION_WIDTH, PRODUCTION_SIZES, jnp.float32),
        _shapes(5, 3, (3, 1), jnp.bfloat16),
    ],
    ids=["production", "narrow"],
)
def test_lowers_for_gpus(shapes):
    assert triton_kernels(functools.partial(rvq_decode, implementation="triton"), *shapes) == 1


@pytest.mark.slow
@pytest.mark.parametrize("topology", TPUS)
def test_moves_fewer_bytes_than_xla_at_production_shapes(topology):
    devices = 4 if topology == "v5p:2x2x1" else 1
    shapes = _shapes(PRODUCTION_VECTORS * devices, PRODUCTION_WIDTH, PRODUCTION_SIZES, jnp.float32)
    codes, books = _shapes(PRODUCTION_VECTORS, PRODUCTION_WIDTH, PRODUCTION_SIZES, jnp.float32)
    kernel, plain = (
        compiled_for(topology, functools.partial(rvq_decode, implementation=name), *shapes)
        for name in ("mosaic", "xla")
    )
    print_comparison(topology, kernel, plain, tpu.cost(codes, books).flops, tpu.vmem_bytes(codes, books))
    assert tpu.fits(codes, books)

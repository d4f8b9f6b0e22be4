"""Speed of the kernels against plain JAX under jit, on the device that is here.

    python benchmarks/kernels.py [--kernel rvq_embed ...] [--size tiny] [--json FILE]
    python benchmarks/kernels.py --tune [--kernel rvq_embed ...]     # tries the sizes of the kernels' blocks

Both run in turn, in groups of calls; times are medians of the groups. Each rate is also given as a share of what the
same run measures: bytes/s of a large copy, FLOP/s of a large matrix product. Kernels run on TPU (mosaic) and GPU
(triton); on CPU they would be interpreted, so that plain JAX is timed alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from mimo_jax.chips import chip_of
from mimo_jax.generation.sampling import PATCHES, sampling_params
from mimo_jax.kernels.delay_sample import delay_sample
from mimo_jax.kernels.dispatch import Implementation, chosen
from mimo_jax.kernels.rvq_decode import rvq_decode
from mimo_jax.kernels.rvq_embed import rvq_embed
from mimo_jax.kernels.rvq_encode import rvq_encode

_GROUPS = 5
_GROUP_SECONDS = 0.1


@dataclass(frozen=True)
class Case:
    """What is timed of a kernel."""

    name: str  # "kernel: what"
    arguments: Callable[[], tuple[jax.Array, ...]]
    function: Callable[[Implementation], Callable[..., Any]]  # of the arguments
    least_bytes: float  # that any program reads and writes
    flops: float = 0.0  # of matrix products, in `dtype`
    dtype: str = "float32"
    # Module -> constant -> values that --tune tries, for each implementation that has blocks.
    blocks: Mapping[str, tuple[ModuleType, Mapping[str, Sequence[int]]]] = field(default_factory=dict)


def rvq_embed_cases(tiny: bool) -> Iterator[Case]:
    """The patch encoder's lookup and the patch decoder's, of a row's patches (`configs/joint.py`, 7b or tiny)."""
    from mimo_jax.kernels.rvq_embed import gpu, tpu

    blocks = {
        "mosaic": (tpu, {"_STEPS": (512, 1024, 2048)}),
        "triton": (gpu, {"_STEPS": (8, 16, 32), "_LANES": (128, 256, 512)}),
    }
    sizes, patches, group_size = (1025, 1025, *(129,) * 6), 192 if tiny else 6144, 4
    width, dtype = (256, jnp.float32) if tiny else (1024, jnp.bfloat16)

    def arguments(num_steps: int) -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.key(0), 3)
        table_VE = jax.random.normal(keys[0], (sum(sizes), width))
        codes_XGR = jax.random.randint(keys[1], (patches, group_size, len(sizes)), 0, jnp.array(sizes))
        return table_VE, codes_XGR, jax.random.normal(keys[2], (patches, num_steps, width), dtype)

    def forward(settings: Mapping[str, Any], implementation: Implementation) -> Callable[..., Any]:
        look_up = functools.partial(rvq_embed, sizes=sizes, dtype=dtype, implementation=implementation, **settings)
        return lambda table_VE, codes_XGR, _: look_up(table_VE, codes_XGR)

    def backward(settings: Mapping[str, Any], implementation: Implementation) -> Callable[..., Any]:
        look_up = forward(settings, implementation)
        return lambda table_VE, codes_XGR, out_XTE: jax.vjp(lambda t: look_up(t, codes_XGR, None), table_VE)[1](out_XTE)

    for what, delays, num_steps in (("encoder", None, group_size), ("decoder", tuple(range(len(sizes))), 10)):
        settings = dict(delays=delays, num_steps=num_steps)
        make = functools.partial(arguments, num_steps)
        least = sum(x.size * x.dtype.itemsize for x in jax.eval_shape(make))
        for way, function in (("forward", forward), ("backward", backward)):
            of = functools.partial(function, settings)
            yield Case(f"rvq_embed: {what}, {way}", make, of, least, blocks=blocks)


def tokenizer_codebooks(tiny: bool) -> tuple[jax.Array, ...]:
    """Entries of the 20 levels, ever smaller, as residuals are."""
    sizes, width = (1024, 1024, *(128,) * 18), 256 if tiny else 1280
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return tuple(
        jax.random.normal(key, (size, width)) * 0.8**level
        for level, (key, size) in enumerate(zip(keys, sizes, strict=True))
    )


def rvq_encode_cases(tiny: bool) -> Iterator[Case]:
    """The search of all 20 levels for the vectors of half a minute, and of four: codes alone, and with the sums."""
    from mimo_jax.kernels.rvq_encode import gpu, tpu

    blocks = {
        "mosaic": (tpu, {"TILE": (128, 256, 512), "CHUNK": (256, 512)}),
        "triton": (gpu, {"_TILE": (32, 64, 128), "_ENTRIES": (64, 128), "_WIDTH": (32, 64)}),
    }
    for vectors in (750,) if tiny else (750, 6144):

        def arguments(vectors: int = vectors) -> tuple[jax.Array, ...]:
            books = tokenizer_codebooks(tiny)
            return jax.random.normal(jax.random.key(1), (vectors, books[0].shape[1])), *books

        x, *books = jax.eval_shape(arguments)
        flops = 2.0 * x.size * sum(len(book) for book in books)
        read = 4 * (x.size + sum(book.size for book in books) + vectors * len(books))
        for what, sums in (("codes", False), ("codes and sums", True)):

            def function(implementation: Implementation, sums: bool = sums) -> Callable[..., Any]:
                return lambda x_ND, *levels: rvq_encode(x_ND, levels, implementation=implementation, sums=sums)

            name, least = f"rvq_encode: {vectors} vectors, {what}", read + 4 * sums * (x.size + vectors * len(books))
            yield Case(name, arguments, function, least, flops, blocks=blocks)


def rvq_decode_cases(tiny: bool) -> Iterator[Case]:
    """The sum of the entries of all 20 levels."""
    for vectors in (750,) if tiny else (750, 6144):

        def arguments(vectors: int = vectors) -> tuple[jax.Array, ...]:
            books = tokenizer_codebooks(tiny)
            sizes = jnp.array([len(book) for book in books])
            return jax.random.randint(jax.random.key(1), (vectors, len(books)), 0, sizes), *books

        def function(implementation: Implementation) -> Callable[..., Any]:
            return lambda codes_NR, *levels: rvq_decode(codes_NR, levels, implementation)

        codes, *books = jax.eval_shape(arguments)
        least = 4 * (codes.size + sum(book.size for book in books) + vectors * books[0].shape[1])
        yield Case(f"rvq_decode: {vectors} vectors", arguments, function, least)


def delay_sample_cases(tiny: bool) -> Iterator[Case]:
    """The steps of a patch, one after the other, with the published settings."""
    sizes, delays, group_size, width = (1025, 1025, *(129,) * 6), tuple(range(8)), 4, 256 if tiny else 1024
    steps = group_size + max(delays)

    for requests in (1, 8) if tiny else (1, 8, 64):

        def arguments(requests: int = requests) -> tuple[jax.Array, ...]:
            keys = jax.random.split(jax.random.key(0), 3)
            logits_BV = 3 * jax.random.normal(keys[0], (requests, sum(sizes)))
            table_VE = jax.random.normal(keys[1], (sum(sizes), width), jnp.float32 if tiny else jnp.bfloat16)
            return logits_BV, table_VE, jax.random.bits(keys[2], (steps, requests, len(sizes)))

        def function(implementation: Implementation) -> Callable[..., Any]:
            def patch(logits_BV: jax.Array, table_VE: jax.Array, bits_TBR: jax.Array) -> jax.Array:
                params = sampling_params([PATCHES] * len(logits_BV))
                pattern = dict(sizes=sizes, delays=delays, group_size=group_size, implementation=implementation)

                def step(x_B1: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                    t, bits_BR = inputs
                    codes_BR, x_BE = delay_sample(logits_BV + x_B1, bits_BR, t, table_VE, params, **pattern)
                    return x_BE[:, :1], codes_BR

                start = jnp.zeros((len(logits_BV), 1))
                return jax.lax.scan(step, start, (jnp.arange(steps), bits_TBR))[1]

            return patch

        least = steps * requests * 4 * (sum(sizes) + len(sizes) * 2 + width)
        yield Case(f"delay_sample: {requests} requests, {steps} steps", arguments, function, least)


CASES = {
    "rvq_encode": rvq_encode_cases,
    "rvq_decode": rvq_decode_cases,
    "rvq_embed": rvq_embed_cases,
    "delay_sample": delay_sample_cases,
}


def seconds(programs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median time of a call of each, all in turn, group after group; each has been compiled."""
    calls = {}
    for name, program in programs.items():
        jax.block_until_ready(program())
        begin = time.perf_counter()
        jax.block_until_ready(program())
        calls[name] = max(1, round(_GROUP_SECONDS / (time.perf_counter() - begin)))
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(_GROUPS):
        for name, program in programs.items():
            begin = time.perf_counter()
            for _ in range(calls[name]):
                out = program()
            jax.block_until_ready(out)
            taken[name].append((time.perf_counter() - begin) / calls[name])
    return {name: statistics.median(times) for name, times in taken.items()}


@functools.cache
def peaks(dtype: str) -> tuple[float, float]:
    """Bytes/s of a large copy (read and written), and FLOP/s of a large matrix product in this precision."""
    cpu = jax.default_backend() == "cpu"
    n = 1024 if cpu else 8192
    copied, x = jnp.ones(2 ** (26 if cpu else 29), jnp.float32), jnp.ones((n, n), dtype)
    negate = jax.jit(jnp.negative)
    product = jax.jit(functools.partial(jnp.matmul, precision="highest" if dtype == "float32" else None))
    found = seconds({"copy": lambda: negate(copied), "product": lambda: product(x, x)})
    return 2 * copied.nbytes / found["copy"], 2.0 * n**3 / found["product"]


def measure(case: Case, implementations: Sequence[Implementation]) -> dict[str, Any]:
    """Times of the implementations, and their rates."""
    arguments = jax.block_until_ready(jax.jit(case.arguments)())
    compiled = {name: jax.jit(case.function(name)).lower(*arguments).compile() for name in implementations}
    taken = seconds({name: functools.partial(program, *arguments) for name, program in compiled.items()})
    copy_rate, product_rate = peaks(case.dtype)
    return {
        name: {
            "seconds": time,
            "bytes_per_second": case.least_bytes / time,
            "of_copy": case.least_bytes / time / copy_rate,
            "flops_per_second": case.flops / time,
            "of_product": case.flops / time / product_rate,
            "times_as_fast_as_xla": taken["xla"] / time,
        }
        for name, time in taken.items()
    }


@contextlib.contextmanager
def constants(module: ModuleType, values: Mapping[str, int]) -> Iterator[None]:
    """Other sizes of blocks inside the block."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def tune(case: Case, implementation: Implementation) -> dict[str, float]:
    """Time with each size of each block, the others as they are."""
    found = {}
    module, sizes = case.blocks.get(implementation, (None, {}))
    for name, values in sizes.items():
        for value in values:
            arguments = jax.jit(case.arguments)()
            with constants(module, {name: value}):
                program = jax.jit(case.function(implementation)).lower(*arguments).compile()
            call = functools.partial(program, *arguments)
            found[f"{name}={value}"] = seconds({"it": call})["it"]
    return found


def show(name: str, found: Mapping[str, Any]) -> None:
    print(f"\n{name}")
    for implementation, one in found.items():
        line = (
            f"  {implementation:<8}{1e3 * one['seconds']:9.3f} ms   at least {one['bytes_per_second'] / 1e9:,.1f} GB/s"
        )
        line += f" ({one['of_copy']:.1%} of a copy)"
        if one["flops_per_second"]:
            line += f", {one['flops_per_second'] / 1e12:,.2f} TFLOP/s ({one['of_product']:.1%} of a matrix product)"
        if implementation != "xla":
            line += f", {one['times_as_fast_as_xla']:.2f} x xla"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--size", choices=("7b", "tiny"), default="7b")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    kind = jax.devices()[0].device_kind
    chip, kernel = chip_of(kind), {"tpu": "mosaic", "gpu": "triton"}.get(jax.default_backend())
    copy_rate, product_rate = peaks("float32")
    print(f"{kind}: copy {copy_rate / 1e9:,.1f} GB/s" + (f" of {chip.hbm_rate / 1e9:,.0f}" if chip else ""), end="")
    print(f", float32 matrix product {product_rate / 1e12:,.2f} TFLOP/s; auto takes {chosen('auto')}")
    if kernel is None:
        print("Kernels are only interpreted here: plain JAX is timed alone.")
    results = {}
    for name in options.kernel:
        for case in CASES[name](options.size == "tiny"):
            results[case.name] = measure(case, ["xla", kernel] if kernel else ["xla"])
            show(case.name, results[case.name])
            if options.tune and kernel:
                tuned = tune(case, kernel)
                results[case.name]["blocks"] = tuned
                for sizes, time in sorted(tuned.items(), key=lambda item: item[1]):
                    print(f"    {sizes:<16}{1e3 * time:9.3f} ms")
    if options.json:
        about = {"device": kind, "auto": chosen("auto"), "copy_bytes_per_second": copy_rate}
        Path(options.json).write_text(json.dumps(about | {"cases": results}, indent=1))


if __name__ == "__main__":
    main()

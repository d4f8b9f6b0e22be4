"""Do codes that were killed on purpose come back, and stay?

    python benchmarks/codebook_revival.py RUN --manifest data/train.jsonl --text-tokenizer data/text.model [--steps 40]

Takes the tokenizer of stage 1 in RUN, throws half of the entries of every level far away with a moving count of 0, and
trains on with each revival rule (`batch`; `none`; the released code's, whose moving average undoes it). Prints, after
so many steps, the share of the killed entries that are alive (moving count at the threshold or above) and the share
that the codes of the last ten steps used, mean over levels.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.config import TokenizerTrainConfig
from mimo_jax.data.tokenizer_rows import tokenizer_loader
from mimo_jax.sharding import batch_sharding, make_mesh
from mimo_jax.training import loop, tokenizer
from mimo_jax.training.checkpoint import load_params

RULES: dict[str, dict[str, Any]] = {
    "batch": {"revival": "batch"},
    "none": {"revival": "none"},
    "released code": {"reference_quirks": True},
}


def killed(codebook: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """The codebook with every second entry far away and never chosen; and which those are, bool [K] of each level."""
    which, levels = {}, {}
    for name, level in codebook.items():
        dead_K = np.arange(level["count"].shape[0]) % 2 == 1
        far = 1e3 * np.ones_like(level["entries"])
        levels[name] = {
            "entries": jnp.where(dead_K[:, None], far, level["entries"]),
            "code_sum": jnp.where(dead_K[:, None], 1e-6 * far, level["code_sum"]),
            "count": jnp.where(dead_K, 1e-6, level["count"]),
        }
        which[name] = dead_K
    return levels, which


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--manifest", required=True)
    parser.add_argument("--text-tokenizer", required=True)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()

    config, variables, _ = load_params(options.run)
    if not isinstance(config, TokenizerTrainConfig):
        raise SystemExit(f"{options.run}: expected a run of stage 1, got job {config.job}")
    data = dataclasses.replace(config.data, manifest=options.manifest, text_tokenizer=options.text_tokenizer)
    print(f"{'rule':<15}{'step':>6}{'alive':>9}{'used':>9}{'level 0 perplexity':>20}")
    for rule, settings in RULES.items():
        model = dataclasses.replace(config.model, rvq=dataclasses.replace(config.model.rvq, **settings))
        cfg = dataclasses.replace(config, model=model, data=data)
        mesh = make_mesh(cfg.mesh)
        with jax.set_mesh(mesh):
            job = tokenizer.assemble(cfg, mesh)
            state = jax.jit(job.start, out_shardings=job.placed)(jax.random.key(0))
            codebook, which = killed(variables["codebook"])
            state = dataclasses.replace(
                state,
                params=jax.tree.map(jnp.array, variables["params"]),
                codebook=jax.device_put(codebook, job.placed.codebook),
            )
            put = functools.partial(loop.to_devices, sharding=batch_sharding(mesh))
            counts: list[Any] = []
            with tokenizer_loader(cfg, "train") as loader:
                for step in range(1, options.steps + 1):
                    state, metrics = job.update(state, put(next(loader)))
                    sums = metrics.unpack(np.asarray(metrics.values_N))["sums"]["loss"]
                    counts = [*counts[-9:], sums.code_counts]
                    if step in (1, 10, options.steps):
                        report(rule, step, cfg, state, which, counts)


def report(rule: str, step: int, cfg: Any, state: Any, which: Any, counts: list[Any]) -> None:
    alive, used = [], []
    for r, (name, dead_K) in enumerate(sorted(which.items())):
        count_K = np.asarray(state.codebook[name]["count"])[dead_K]
        alive.append(np.mean(count_K >= cfg.model.rvq.dead_code_threshold * (1 - 1e-6)))
        used.append(np.mean(sum(c[r] for c in counts)[dead_K] > 0))
    share_K = sum(c[0] for c in counts) / sum(c[0].sum() for c in counts)
    perplexity = np.exp(-np.sum(share_K * np.log(np.maximum(share_K, 1e-30))))
    print(f"{rule:<15}{step:>6}{np.mean(alive):>9.1%}{np.mean(used):>9.1%}{perplexity:>20.0f}", flush=True)


if __name__ == "__main__":
    main()

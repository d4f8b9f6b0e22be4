"""AdamW by parameter group, and the update that skips a step whose loss or gradient is not finite.

A group is a top-level name of the parameter tree (`llm`, `patch_encoder`, ...) with a peak learning rate of its own.
A rate of 0 freezes the group: `trained` leaves it out, so it gets no gradient, no moments and no share of the norm.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mimo_jax.config import ConfigError, OptimizerConfig
from mimo_jax.training.state import TrainState, Tree

# Paths of the parameters that weight decay acts on.
_DECAYED = re.compile(r"(.*/)?(kernel|head)|(llm|text_decoder)/embedding")


def schedule(config: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """Factor on the peak learning rate, as a function of the updates made so far (int -> float32).

    Linear warm-up from 0 over `warmup_fraction` of the run (the first update uses 1 / warm-up steps, not 0), then
    constant, or a cosine that reaches `final_fraction` at the last step.
    """
    warmup = round(config.warmup_fraction * steps)

    def factor(count: Any) -> Any:
        ramp = jnp.minimum(1.0, (count + 1.0) / max(warmup, 1))
        if config.schedule == "constant":
            return ramp
        progress = jnp.clip((count - warmup) / max(steps - warmup - 1, 1), 0.0, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return ramp * (config.final_fraction + (1.0 - config.final_fraction) * cosine)

    return factor


def trained(params: Tree, learning_rates: Mapping[str, float]) -> Tree:
    """The groups of `params` whose learning rate is above 0.

    Raises:
        ConfigError: the groups of the tree are not those that have a learning rate, or all are frozen.
    """
    if set(params) != set(learning_rates):
        raise ConfigError(f"learning_rates: expected one for each of {sorted(params)}, got {sorted(learning_rates)}")
    kept = {group: params[group] for group in params if learning_rates[group] > 0}
    if not kept:
        raise ConfigError("learning_rates: expected at least one above 0, got none")
    return kept


def decays(params: Tree) -> Tree:
    """Tree of bool: whether weight decay acts on a parameter.

    It acts on matrices and on text embeddings; not on norms, biases and the embeddings of audio codes. Names decide,
    not ranks: layers that are scanned stack their biases into matrices.
    """

    def matches(path: tuple[Any, ...], _: Any) -> bool:
        return _DECAYED.fullmatch(jax.tree_util.keystr(path, simple=True, separator="/")) is not None

    return jax.tree_util.tree_map_with_path(matches, params)


def make_optimizer(
    config: OptimizerConfig, learning_rates: Mapping[str, float], steps: int
) -> optax.GradientTransformation:
    """AdamW for the trained groups. Clipping is done in `apply_gradients`, where the norms are computed anyway.

    Args:
        config: betas, decay, schedule.
        learning_rates: peak of each group, by its name; groups of rate 0 must not be in the tree (`trained`).
        steps: updates of the whole run, which the schedule is stretched over.
    """
    factor = schedule(config, steps)

    def adamw(peak: float) -> optax.GradientTransformation:
        return optax.adamw(
            lambda count: peak * factor(count),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decays,
        )

    transforms = {group: adamw(peak) for group, peak in learning_rates.items() if peak > 0}
    return optax.partition(transforms, lambda params: {group: group for group in params})


def norms(tree: Tree) -> dict[str, jax.Array]:
    """Euclidean norm of each group, in float32 or better."""

    def square(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))))

    return {group: jnp.sqrt(sum(map(square, jax.tree.leaves(tree[group])))) for group in tree}


def apply_gradients(
    state: TrainState,
    gradients: Tree,
    loss: jax.Array,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    *,
    max_bad_steps: int,
    codebook: Tree | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the trained groups, clipped to a global norm; a non-finite step leaves everything as it was.

    Args:
        state: state before the step.
        gradients: tree of the trained groups.
        loss: scalar; with the norm of the gradient it decides whether the step counts.
        optimizer: from `make_optimizer`.
        config: for `clip_norm`.
        max_bad_steps: after so many skipped steps in a row nothing is updated any more.
        codebook: the codebooks after this step, where the model has them.

    Returns:
        The new state, and scalars for the metrics: `loss`, `finite`, `bad_in_row`, gradient and update norms (total and
        per group).
    """
    gradient_norms = norms(gradients)
    norm = jnp.sqrt(sum(jnp.square(n) for n in gradient_norms.values()))
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    applied = finite & (state.bad_in_row < max_bad_steps)

    clip = config.clip_norm / jnp.maximum(norm, config.clip_norm)
    before = {group: state.params[group] for group in gradients}
    clipped = jax.tree.map(lambda g: g * clip.astype(g.dtype), gradients)
    updates, moments = optimizer.update(clipped, state.optimizer, before)

    def choose(new: Tree, old: Tree) -> Tree:
        return jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old)

    new_state = dataclasses.replace(
        state,
        step=state.step + 1,
        skipped=state.skipped + ~applied,
        bad_in_row=jnp.where(applied, 0, state.bad_in_row + 1),
        params={**state.params, **choose(optax.apply_updates(before, updates), before)},
        codebook=state.codebook if codebook is None else choose(codebook, state.codebook),
        optimizer=choose(moments, state.optimizer),
    )
    scalars = {"loss": loss, "gradient_norm": norm}
    scalars |= {f"gradient_norm/{group}": n for group, n in gradient_norms.items()}
    scalars |= {f"update_norm/{group}": n for group, n in norms(updates).items()}
    return new_state, scalars | {"finite": finite, "bad_in_row": new_state.bad_in_row}

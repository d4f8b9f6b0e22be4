"""AdamW by parameter group, and the update that skips a step whose loss or gradient is not finite, or a spike.

A group is a top-level name of the parameter tree (`llm`, `patch_encoder`, ...) with a peak learning rate of its own.
A rate of 0 freezes the group: `trained` leaves it out, so it gets no gradient, no moments and no share of the norm.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mimo_jax.config import ConfigError, OptimizerConfig, TrainingConfig
from mimo_jax.training.state import TrainState, Tree
from mimo_jax.trees import merge, part

_ROUNDING = 0x726F756E  # folded into the seed, so that no other random numbers of the run are these
# Paths of the parameters that weight decay acts on. Discriminators have none (report section 2.1).
_DECAYED = re.compile(r"(?!discriminators/)(.*/)?(kernel|head)|(llm|text_decoder)/embedding")


def schedule(config: OptimizerConfig, steps: int, tokens_per_step: int = 0, tokens: int = 0) -> Callable[[Any], Any]:
    """Factor on the peak learning rate, as a function of the updates made so far (int -> float32).

    Linear warm-up from 0 over `warmup_fraction` of the run (the first update uses 1 / warm-up steps, not 0), then
    constant, or a cosine that reaches `final_fraction` at the last step.

    Where the warm-up or the run is given in tokens, the factor is a function of the tokens of these updates, that of
    the next one included: another batch size changes nothing.

    Args:
        config: warm-up, shape and end.
        steps: length of the run.
        tokens_per_step: of a batch; only looked at where something is given in tokens.
        tokens: the length of the run, where it is given so.
    """
    in_tokens = bool(tokens or config.warmup_tokens)
    total = tokens / tokens_per_step if tokens else steps
    warmup = config.warmup_fraction * total
    if config.warmup_tokens:
        warmup = config.warmup_tokens / tokens_per_step
    warmup, first = (warmup, 0) if in_tokens else (round(warmup), 1)

    def factor(count: Any) -> Any:
        ramp = jnp.minimum(1.0, (count + 1.0) / max(warmup, 1))
        if config.schedule == "constant":
            return ramp
        progress = jnp.clip((count + (1 - first) - warmup) / max(total - warmup - first, 1), 0.0, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return ramp * (config.final_fraction + (1.0 - config.final_fraction) * cosine)

    return factor


def budget(cfg: TrainingConfig) -> tuple[int, int, int]:
    """Length of a job as `schedule` takes it."""
    return cfg.run.steps, cfg.tokens_per_step, cfg.run.tokens


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

    It acts on matrices and on text embeddings; not on norms, biases, the embeddings of audio codes and discriminators.
    Names decide, not ranks: layers that are scanned stack their biases into matrices.
    """

    def matches(path: tuple[Any, ...], _: Any) -> bool:
        return _DECAYED.fullmatch(jax.tree_util.keystr(path, simple=True, separator="/")) is not None

    return jax.tree_util.tree_map_with_path(matches, params)


def make_optimizer(
    config: OptimizerConfig,
    learning_rates: Mapping[str, float],
    steps: int,
    tokens_per_step: int = 0,
    tokens: int = 0,
) -> optax.GradientTransformation:
    """AdamW for the trained groups. Clipping is done in `apply_gradients`, where the norms are computed anyway.

    Moments are stored in `config.moment_dtype`; arithmetic is in float32 or better. `update` wants the loss, the norm
    of the gradient and a random key of the step beside optax's arguments.

    Args:
        config: betas, decay, schedule.
        learning_rates: peak of each group, by its name; groups of rate 0 must not be in the tree (`trained`).
        steps, tokens_per_step, tokens: what the schedule is stretched over, see there.
    """
    factor = schedule(config, steps, tokens_per_step, tokens)

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
    optimizer = optax.partition(transforms, lambda params: {group: group for group in params})
    narrow = config.moment_dtype == "bfloat16"

    def init(params: Tree) -> Tree:
        moments = optimizer.init(_wide(params))
        return _watched(config, _narrow(moments) if narrow else moments)

    def update(gradients: Tree, state: Tree, params: Tree, *, loss: Any, norm: Any, key: Any) -> tuple[Tree, Tree]:
        old = state.moments if isinstance(state, Watched) else state
        updates, moments = optimizer.update(_wide(gradients), _wide(old), _wide(params))
        if narrow:
            moments = _narrow(moments, jax.random.fold_in(key, 0) if config.stochastic_rounding else None)
        return updates, _watched(config, moments, state, jnp.stack([loss, norm]))

    return optax.GradientTransformationExtraArgs(init, update)


class Watched(NamedTuple):
    """State of an optimiser that looks out for spikes.

    Attributes:
        moments: state of AdamW.
        window_2W: float32, loss and gradient norm of the latest steps that counted.
        seen: int32, how many there were in all.
    """

    moments: Tree
    window_2W: jax.Array
    seen: jax.Array


def _watched(config: OptimizerConfig, moments: Tree, before: Tree = None, values_2: Any = None) -> Tree:
    """State of the optimiser with these moments: the first one, or the one after a step with loss and norm."""
    if not config.spike_sigmas:
        return moments
    if before is None:
        return Watched(moments, jnp.zeros((2, config.spike_window), jnp.float32), jnp.zeros((), jnp.int32))
    here = jnp.arange(config.spike_window) == before.seen % config.spike_window
    window_2W = jnp.where(here, values_2.astype(jnp.float32)[:, None], before.window_2W)
    return Watched(moments, window_2W, before.seen + 1)


def _is_spike(config: OptimizerConfig, state: Watched, values_2: jax.Array) -> jax.Array:
    """Whether loss or norm is far above those of the window; never before the window is full."""
    limit_2 = state.window_2W.mean(axis=1) + config.spike_sigmas * state.window_2W.std(axis=1)
    return (state.seen >= config.spike_window) & (values_2.astype(jnp.float32) > limit_2).any()


def _wide(tree: Tree) -> Tree:
    """Floating-point arrays in float32 or better."""

    def widen(x: jax.Array) -> jax.Array:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(widen, tree)


def _narrow(tree: Tree, key: jax.Array | None = None) -> Tree:
    """Floating-point arrays as bfloat16, rounded at random with a key, to the nearest without."""
    leaves, structure = jax.tree.flatten(tree)
    words_N2 = None if key is None else jax.random.bits(key, (len(leaves), 2), jnp.uint32)
    for i, x in enumerate(leaves):
        if jnp.issubdtype(x.dtype, jnp.floating):
            leaves[i] = x.astype(jnp.bfloat16) if words_N2 is None else round_at_random(x, words_N2[i])
    return jax.tree.unflatten(structure, leaves)


def _hashed_places(shape: tuple[int, ...], words_2: jax.Array) -> jax.Array:
    """Random uint32: the place of each element, hashed with two random words by two rounds of MurmurHash3's finaliser.

    `jax.random.bits` for every array of a model would take longer to compile than the rest of the step.
    """
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride & 0xFFFFFFFF)
        stride *= shape[axis]
    for i in range(2):
        place ^= words_2[i]
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            place = (place ^ (place >> shift)) * jnp.uint32(factor)
        place ^= place >> 16
    return place


def round_at_random(x: jax.Array, words_2: jax.Array) -> jax.Array:
    """Floating-point numbers as bfloat16: one of the two neighbours, the nearer the likelier, so that the mean is x.

    Args:
        x: of any shape.
        words_2: uint32, random, of this array and this step alone.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    noise = _hashed_places(x.shape, words_2) >> 16
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


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
    spectral: Tree | None = None,
    seed: int = 0,
    per_group: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the trained groups, clipped to a global norm; a bad step leaves everything as it was.

    A step is bad if loss or gradient are not finite or, with `config.spike_sigmas`, far above those of the latest good
    ones.

    Args:
        state: state before the step.
        gradients: tree of the trained groups, or of the trained parts of groups.
        loss: scalar; with the norm of the gradient it decides whether the step counts.
        optimizer: from `make_optimizer`.
        config: clipping, spikes, rounding.
        max_bad_steps: after so many skipped steps in a row nothing is updated any more.
        codebook: the codebooks after this step, where the model has them.
        spectral: the vectors of the power iterations after this step, where the model has them.
        seed: of the run; with the step it decides how numbers are rounded.
        per_group: each group is clipped to the norm by itself, and the largest norm decides whether the step is good:
            for groups that play against each other.

    Returns:
        The new state, and scalars for the metrics: `loss`, `good`, `bad_in_row`, gradient and update norms (total and
        per group).
    """
    gradient_norms = norms(gradients)
    norm = jnp.sqrt(sum(jnp.square(n) for n in gradient_norms.values()))
    if per_group:
        norm = functools.reduce(jnp.maximum, gradient_norms.values())
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if config.spike_sigmas:
        good &= ~_is_spike(config, state.optimizer, jnp.stack([loss, norm]))
    applied = good & (state.bad_in_row < max_bad_steps)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _ROUNDING), state.step)

    before = part(state.params, gradients)
    clipped = {}
    for group, gradient in gradients.items():
        clip = config.clip_norm / jnp.maximum(gradient_norms[group] if per_group else norm, config.clip_norm)
        clipped[group] = jax.tree.map(lambda g, clip=clip: g * clip.astype(g.dtype), gradient)
    updates, moments = optimizer.update(clipped, state.optimizer, before, loss=loss, norm=norm, key=key)
    after = optax.apply_updates(before, updates)
    if config.stochastic_rounding:
        sums = jax.tree.map(lambda p, u: _wide(p) + u if p.dtype == jnp.bfloat16 else p, before, updates)
        rounded = _narrow(sums, jax.random.fold_in(key, 1))
        after = jax.tree.map(lambda a, r: r if a.dtype == jnp.bfloat16 else a, after, rounded)

    def choose(new: Tree, old: Tree) -> Tree:
        return jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old)

    new_state = dataclasses.replace(
        state,
        step=state.step + 1,
        skipped=state.skipped + ~applied,
        bad_in_row=jnp.where(applied, 0, state.bad_in_row + 1),
        params=merge(state.params, choose(after, before)),
        codebook=state.codebook if codebook is None else choose(codebook, state.codebook),
        spectral=state.spectral if spectral is None else choose(spectral, state.spectral),
        optimizer=choose(moments, state.optimizer),
    )
    scalars = {"loss": loss, "gradient_norm": norm}
    scalars |= {f"gradient_norm/{group}": n for group, n in gradient_norms.items()}
    scalars |= {f"update_norm/{group}": n for group, n in norms(updates).items()}
    return new_state, scalars | {"good": good, "bad_in_row": new_state.bad_in_row}

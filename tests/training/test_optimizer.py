"""Groups, schedule, weight decay, clipping, and the step that must not count."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax import presets
from mimo_jax.config import ConfigError, OptimizerConfig
from mimo_jax.models.audio_lm import init_params
from mimo_jax.training import tokenizer_loss
from mimo_jax.training.optimizer import (
    apply_gradients,
    decays,
    make_optimizer,
    norms,
    round_at_random,
    schedule,
    trained,
)
from mimo_jax.training.state import TrainState

CONFIG = OptimizerConfig(warmup_fraction=0.0, schedule="constant", clip_norm=1e9)
RATES = {"llm": 1e-2, "patch_encoder": 3e-3, "patch_decoder": 0.0}


def make_params(seed: int = 0) -> dict:
    keys = jax.random.split(jax.random.key(seed), 2 * len(RATES))
    return {
        group: {"kernel": jax.random.normal(keys[i], (4, 3)), "bias": jax.random.normal(keys[-i - 1], (3,))}
        for i, group in enumerate(RATES)
    }


def make_state(config: OptimizerConfig = CONFIG, steps: int = 10) -> tuple[TrainState, object]:
    optimizer = make_optimizer(config, RATES, steps)
    params = make_params()
    return TrainState.start(params, optimizer.init(trained(params, RATES))), optimizer


def apply(state, optimizer, gradients, loss=1.0, config=CONFIG, max_bad_steps=3, codebook=None):
    return apply_gradients(
        state, gradients, jnp.float32(loss), optimizer, config, max_bad_steps=max_bad_steps, codebook=codebook
    )


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_schedule_warms_up_then_decays_to_the_final_fraction_at_the_last_step():
    config = OptimizerConfig(warmup_fraction=0.1, final_fraction=0.2, schedule="cosine")
    values = [float(schedule(config, 100)(i)) for i in range(100)]
    np.testing.assert_allclose(values[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert values[10] == pytest.approx(1.0) and values[-1] == pytest.approx(0.2)
    assert values[10:] == sorted(values[10:], reverse=True)
    halfway = float(schedule(config, 111)(11 + 99 / 2))
    assert halfway == pytest.approx(0.6)


def test_constant_schedule_stays_at_the_peak():
    factor = schedule(OptimizerConfig(warmup_fraction=0.02, schedule="constant"), 100)
    np.testing.assert_allclose([float(factor(i)) for i in (0, 1, 2, 99, 500)], [0.5, 1, 1, 1, 1])


@pytest.mark.parametrize("shape", ["constant", "cosine"])
def test_schedule_in_tokens_does_not_depend_on_the_batch(shape):
    config = OptimizerConfig(warmup_tokens=2000, final_fraction=0.2, schedule=shape)
    small, large = (schedule(config, -(-50_000 // batch), batch, 50_000) for batch in (100, 400))
    ends = [float(small(4 * i + 3)) for i in range(125)]
    np.testing.assert_allclose([float(large(i)) for i in range(125)], ends, rtol=1e-6)
    assert ends[0] == pytest.approx(400 / 2000) and ends[4] == pytest.approx(1.0)
    assert ends[-1] == pytest.approx(0.2 if shape == "cosine" else 1.0)
    share = schedule(OptimizerConfig(warmup_fraction=0.04, final_fraction=0.2, schedule=shape), 125, 400, 50_000)
    np.testing.assert_allclose([float(share(i)) for i in range(125)], ends, rtol=1e-6)


def test_frozen_group_keeps_its_bits_and_has_no_moments():
    state, optimizer = make_state()
    before = state.params["patch_decoder"]
    for seed in range(3):
        state, _ = apply(state, optimizer, trained(make_params(seed + 1), RATES))
    assert_same(state.params["patch_decoder"], before)
    moments = jax.tree_util.tree_leaves_with_path(state.optimizer)
    assert {"llm", "patch_encoder"} == {
        g for path, _ in moments for g in RATES if f"'{g}'" in jax.tree_util.keystr(path)
    }
    assert not np.array_equal(state.params["llm"]["bias"], make_params()["llm"]["bias"])


def test_adamw_with_group_rates_equals_the_formula():
    config = dataclasses.replace(CONFIG, weight_decay=0.3)
    state, optimizer = make_state(config)
    expected = jax.tree.map(lambda x: np.asarray(x, np.float64), make_params())
    moments = jax.tree.map(lambda x: (np.zeros(x.shape), np.zeros(x.shape)), expected)
    for t in (1, 2, 3):
        gradients = trained(make_params(t), RATES)
        state, _ = apply(state, optimizer, gradients, config=config)
        for group in gradients:
            for name, g in gradients[group].items():
                g = np.asarray(g, np.float64)
                m, v = moments[group][name]
                m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
                moments[group][name] = m, v
                step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
                decay = 0.3 * expected[group][name] if name == "kernel" else 0.0
                expected[group][name] = expected[group][name] - RATES[group] * (step + decay)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), state.params, expected)


def test_gradient_is_clipped_by_the_norm_over_all_trained_groups():
    gradients = trained(make_params(5), RATES)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradients)))
    clipping = dataclasses.replace(CONFIG, clip_norm=norm / 4)
    state, optimizer = make_state(clipping)
    clipped, scalars = apply(state, optimizer, gradients, config=clipping)
    by_hand, _ = apply(state, optimizer, jax.tree.map(lambda g: g / 4, gradients))
    # Adam's first update hardly depends on the size of the gradient, its moments do.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), clipped.optimizer, by_hand.optimizer)
    assert float(scalars["gradient_norm"]) == pytest.approx(norm, rel=1e-5), "the norm before clipping is reported"
    assert float(scalars["gradient_norm/llm"]) == pytest.approx(float(norms(gradients)["llm"]))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_step_changes_nothing_but_the_counters(where):
    state, optimizer = make_state()
    state, _ = apply(state, optimizer, trained(make_params(1), RATES))
    state = dataclasses.replace(state, codebook={"level_00": {"count": jnp.ones(3)}})
    gradients = trained(make_params(2), RATES)
    if where == "gradient":
        gradients["llm"]["bias"] = gradients["llm"]["bias"].at[1].set(jnp.inf)
    codebook = {"level_00": {"count": jnp.full(3, jnp.nan)}}
    loss = jnp.nan if where == "loss" else 1.0
    after, scalars = apply(state, optimizer, gradients, loss, codebook=codebook)
    assert_same((after.params, after.optimizer, after.codebook), (state.params, state.optimizer, state.codebook))
    assert (int(after.step), int(after.skipped), int(after.bad_in_row)) == (2, 1, 1)
    assert not scalars["good"]
    good, _ = apply(after, optimizer, trained(make_params(2), RATES), codebook={"level_00": {"count": jnp.zeros(3)}})
    assert (int(good.step), int(good.skipped), int(good.bad_in_row)) == (3, 1, 0)
    assert float(good.codebook["level_00"]["count"][0]) == 0.0


def test_after_the_limit_of_bad_steps_nothing_is_updated_any_more():
    state, optimizer = make_state()
    for _ in range(3):
        state, _ = apply(state, optimizer, trained(make_params(1), RATES), jnp.nan)
    after, scalars = apply(state, optimizer, trained(make_params(1), RATES))
    assert_same(after.params, state.params)
    assert int(after.bad_in_row) == 4 and int(scalars["bad_in_row"]) == 4, (
        "the host must find out even if it looks late"
    )


def test_rounding_at_random_gives_the_neighbours_and_on_average_the_number():
    x = jnp.float32([1.0, 1.001, -1.0009765625, 3.14159, -2.7e-12, 6.1e30, 0.0, jnp.inf, jnp.nan])
    words = jax.random.bits(jax.random.key(0), (4096, 2), jnp.uint32)
    drawn = np.asarray(jax.vmap(lambda words: round_at_random(x, words))(words).astype(jnp.float32), np.float64)
    assert np.isposinf(drawn[:, 7]).all() and np.isnan(drawn[:, 8]).all()
    drawn, exact = drawn[:, :7], np.asarray(x[:7], np.float64)
    step = np.abs(exact) * 2.0**-7  # at least the distance of the two neighbours
    assert all(len(np.unique(column)) <= 2 for column in drawn.T) and (drawn[:, 0] == 1.0).all()
    assert (np.abs(drawn - exact) <= step).all()
    np.testing.assert_array_less(np.abs(drawn.mean(0) - exact), 4 * step / np.sqrt(4096) + 1e-45)


def descend(config: OptimizerConfig, dtype=jnp.float32, steps: int = 300) -> float:
    """Loss after so many steps of a small regression."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((64, 16), (64, 4)))
    rates = dict.fromkeys(RATES, 1e-3)
    optimizer = make_optimizer(config, rates, steps)
    shapes = {"llm": (16, 32), "patch_encoder": (32, 32), "patch_decoder": (32, 4)}
    params = {g: {"kernel": jnp.asarray(rng.standard_normal(s) / np.sqrt(s[0]), dtype)} for g, s in shapes.items()}

    def loss(params):
        a, b, c = (params[g]["kernel"].astype(jnp.float32) for g in shapes)
        return jnp.mean((jnp.tanh(jnp.tanh(x @ a) @ b) @ c - y) ** 2)

    @jax.jit
    def step(state, _):
        value, gradients = jax.value_and_grad(loss)(state.params)
        return apply_gradients(state, gradients, value, optimizer, config, max_bad_steps=3, seed=5)[0], value

    state, losses = jax.lax.scan(step, TrainState.start(params, optimizer.init(params)), None, steps)
    dtypes = {str(x.dtype) for x in jax.tree.leaves(state.optimizer) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert dtypes == {config.moment_dtype} and jax.tree.leaves(state.params)[0].dtype == dtype
    return float(losses[-1])


def test_bfloat16_moments_track_the_run_in_float32():
    """Loss after 300 steps: 3.12e-4 in float32; moments rounded at random 3.14e-4, to the nearest 3.29e-4."""
    exact = descend(CONFIG)
    half = dataclasses.replace(CONFIG, moment_dtype="bfloat16")
    nearest, drawn = descend(half), descend(dataclasses.replace(half, stochastic_rounding=True))
    assert drawn == pytest.approx(exact, rel=0.05) and nearest == pytest.approx(exact, rel=0.15)


def test_small_updates_of_bfloat16_parameters_survive_only_with_random_rounding():
    """Loss after 300 steps: rounded at random 1.6e-3, to the nearest 1.9e-2 (float32: 3.1e-4)."""
    nearest = descend(CONFIG, jnp.bfloat16)
    drawn = descend(dataclasses.replace(CONFIG, stochastic_rounding=True), jnp.bfloat16)
    assert drawn < nearest / 4


def test_weight_decay_reaches_matrices_only_in_the_language_model():
    params = jax.eval_shape(
        lambda: init_params(presets.audio_lm("tiny"), presets.compute("tiny"), jax.random.key(0))["params"]
    )
    check_decays(params, {"patch_encoder/embedding"})


def test_weight_decay_reaches_matrices_only_in_the_audio_tokenizer():
    variables = jax.eval_shape(
        lambda key: tokenizer_loss.init_variables(
            presets.audio_tokenizer("tiny"), presets.a2t_decoder("tiny"), presets.compute("tiny"), key
        ),
        jax.random.key(0),
    )
    params = jax.tree.map(lambda x: getattr(x, "value", x), variables["params"], is_leaf=lambda x: hasattr(x, "names"))
    check_decays(params, set())


def check_decays(params, undecayed_matrices: set[str]) -> None:
    """A parameter decays exactly if it has two axes or more, a `layers` axis left out, and is not an exception."""
    found = 0
    for path, decayed in jax.tree_util.tree_leaves_with_path(decays(params)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaf = params
        for key in path:
            leaf = leaf[key.key]
        rank = leaf.ndim - ("/layers/" in name)
        is_vector = rank < 2 or name.endswith(("bias", "scale"))
        assert decayed == (not is_vector and name not in undecayed_matrices), name
        found += decayed
    assert found > 10


def test_learning_rates_that_do_not_name_the_groups_are_refused():
    with pytest.raises(ConfigError, match="patch_decoder"):
        trained(make_params(), {"llm": 1.0, "patch_encoder": 1.0})
    with pytest.raises(ConfigError, match="at least one above 0"):
        trained(make_params(), dict.fromkeys(RATES, 0.0))

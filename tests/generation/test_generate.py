"""Generation: equal to the full forward pass, to the reference's greedy output, and independent of the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.config import AudioLMConfig, ComputeConfig, ConfigError, TransformerConfig
from mimo_jax.generation import generate
from mimo_jax.generation.generate import Generator, Prompt, Request
from mimo_jax.generation.sampling import GREEDY, SamplingConfig
from mimo_jax.models.audio_lm import AudioLM, init_params

EMPTY, STOP = 2, 1
TOP_P = SamplingConfig(temperature=0.9, top_p=0.95)


@pytest.fixture(scope="module")
def config():
    stack = TransformerConfig.qwen2
    return AudioLMConfig(
        vocab_size=24,
        empty_id=EMPTY,
        llm=stack(32, 2, 4, 8, 64, num_kv_heads=2),
        patch_encoder=stack(16, 1, 2, 8, 32, causal=False),
        patch_decoder=stack(24, 2, 2, 8, 32),
        codebook_sizes=(30, 30, 12),
        group_size=2,
        delays=(0, 1, 2),
    )


@pytest.fixture(scope="module")
def params(config):
    params = jax.jit(init_params, static_argnums=(0, 1))(config, ComputeConfig(), jax.random.key(0))["params"]
    # Larger than at the start of training, so that the choices of different positions differ.
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)
    # Logits of `<|empty|>` vary most, so that patches are among the choices.
    return params | {"llm": params["llm"] | {"head": params["llm"]["head"].at[:, EMPTY].multiply(3)}}


@pytest.fixture(scope="module")
def generator(config, params):
    return Generator(config, params)


def prompt(config, length, patches, seed=0):
    rng = np.random.default_rng(seed)
    text = rng.integers(3, config.vocab_size, length)
    text[rng.permutation(length)[:patches]] = EMPTY
    sizes = config.codebook_sizes
    codes = np.stack([rng.integers(0, n, (patches, config.group_size)) for n in sizes], axis=-1)
    return Prompt(text.astype(np.int32), codes)


def request(config, length=6, patches=2, **keywords):
    seed = keywords.get("seed", 0)
    defaults = dict(max_new=12, stop_ids=(STOP,), text_sampling=SamplingConfig(1.0), patch_sampling=TOP_P)
    return Request(prompt(config, length, patches, seed), **(defaults | keywords))


def one(generator, r):
    return generator.generate([r])[0][0]


def same(a, b):
    return a.stop_id == b.stop_id and np.array_equal(a.text, b.text) and np.array_equal(a.patches, b.patches)


def test_greedy_generation_is_the_argmax_of_the_full_forward_pass(config, params, generator):
    r = request(config, 7, 3, max_new=24, stop_ids=(), text_sampling=GREEDY, patch_sampling=GREEDY)
    # Without a ban the random model repeats itself; the ban makes patches and several text ids alternate.
    results = [one(generator, dataclasses.replace(r, allowed_ids=ids)) for ids in (None, (EMPTY, *range(3, 24)))]
    for result in results:
        allowed = np.ones(config.vocab_size, bool) if result is results[0] else np.arange(config.vocab_size) >= EMPTY
        text = np.concatenate([r.prompt.text, result.text])[None]
        patches = np.concatenate([r.prompt.patches, result.patches])[None]
        at = np.flatnonzero(text[0] == EMPTY)
        model = AudioLM(config, ComputeConfig())

        def apply(method, *arguments, model=model):
            return model.apply({"params": params}, *arguments, method=method)

        x_BLD = apply("embed", jnp.asarray(text), jnp.asarray(patches), jnp.asarray(at[None]))
        h_LD = apply("hidden", x_BLD)[0][0]
        first = len(r.prompt.text)
        logits = np.where(allowed, np.asarray(apply("text_head", h_LD[first - 1 : -1])), -np.inf)
        assert result.text.tolist() == logits.argmax(-1).tolist()
        new = at[at >= first]
        assert len(new) == len(result.patches)
        if len(new):
            channels = apply("patch_logits", h_LD[new - 1], jnp.asarray(result.patches))
            expected = np.stack([np.asarray(c)[..., :-1].argmax(-1) for c in channels], axis=-1)
            np.testing.assert_array_equal(result.patches, expected)
    assert any(0 < len(result.patches) < len(result.text) for result in results), "no case mixes text and patches"


@pytest.fixture(scope="module")
def mixed(config):
    """Eight requests that differ in everything a request can differ in."""
    return [
        request(config, 6, 2, seed=1),
        request(config, 20, 9, seed=2, max_new=30, text_sampling=GREEDY),
        request(config, 3, 0, seed=3, allowed_ids=(EMPTY, STOP), min_new=5),
        request(config, 11, 11, seed=4, patch_sampling=SamplingConfig(1.5, top_k=7)),
        request(config, 29, 1, seed=5, text_sampling=GREEDY, patch_sampling=GREEDY, stop_ids=()),
        request(config, 1, 0, seed=6, stop_ids=(STOP, 5, 9), text_sampling=SamplingConfig(2.0, top_k=5)),
        request(config, 8, 4, seed=7, forced_ids=(4, EMPTY, EMPTY, -1, 7), max_new=25),
        request(config, 14, 7, seed=8, text_sampling=SamplingConfig(0.5, top_p=0.9), max_new=7),
    ]


def test_a_request_alone_and_among_others_yield_the_same(generator, mixed):
    together, _ = generator.generate(mixed)
    for r, result in zip(mixed, together, strict=True):
        assert same(one(generator, r), result)  # other padded sizes: the same as long as no two ids are nearly as good
    assert len({len(r.text) for r in together}) > 3


def test_in_one_bucket_neighbours_and_place_do_not_change_a_bit(generator, mixed):
    bucket = generator.bucket_of(mixed)

    def run(requests):
        batch = jax.device_put(generator.arrays(requests, bucket))
        prefill, decode = generator._compiled(generator.params, batch, bucket.new)
        out, cache = decode(generator.params, batch, *prefill(generator.params, batch))
        return [generator._result(out, b) for b in range(len(requests))], np.asarray(cache.k)

    together, keys = run(mixed)
    for b, r in enumerate(mixed):
        filled = len(r.prompt.text) + len(together[b].text) - 1
        for requests, place in (([r], 0), ([mixed[b - 3]] * 5 + [r], 5)):
            (*_, result), other = run(requests)
            assert same(result, together[b])
            np.testing.assert_array_equal(other[:, place, :filled], keys[:, b, :filled])
    with pytest.raises(ConfigError, match="bucket: expected at least"):
        generator.generate(mixed, bucket._replace(requests=4))


def test_forced_ids_stand_where_they_are_asked_for(config, generator):
    free = one(generator, request(config, max_new=6, stop_ids=()))
    forced = one(generator, request(config, max_new=6, stop_ids=(), forced_ids=(7, EMPTY, -1, EMPTY), allowed_ids=(9,)))
    assert forced.text.tolist() == [7, EMPTY, 9, EMPTY, 9, 9] and len(forced.patches) == 2
    assert not same(free, forced)
    stopped = one(generator, request(config, max_new=6, forced_ids=(7, STOP, 7)))
    assert stopped.text.tolist() == [7, STOP] and stopped.stop_id == STOP


def test_the_seed_alone_decides_what_is_drawn(config, generator):
    r = request(config, max_new=20, stop_ids=())
    first, again = one(generator, r), one(generator, r)
    other = one(generator, dataclasses.replace(r, seed=99))
    assert same(first, again) and not same(first, other)


def test_patches_of_neighbouring_positions_do_not_share_their_draws(config, generator):
    r = request(config, max_new=16, stop_ids=(), allowed_ids=(EMPTY,), patch_sampling=SamplingConfig(5.0))
    patches = one(generator, r).patches
    assert len(np.unique(patches.reshape(len(patches), -1), axis=0)) == len(patches)
    assert len({tuple(x) for x in patches.reshape(-1, 3)[:, :2].tolist()}) > 8  # nor do frames


def test_limits_and_stop_ids_are_those_of_each_request(config, generator):
    stop_at_once = request(config, allowed_ids=(STOP,))
    stop_late = request(config, allowed_ids=(STOP, EMPTY), min_new=7, max_new=9)
    never = request(config, allowed_ids=(EMPTY,), max_new=4)
    results, timing = generator.generate([stop_at_once, stop_late, never])
    assert results[0].text.tolist() == [STOP] and results[0].stop_id == STOP and len(results[0].patches) == 0
    assert 7 <= len(results[1].text) <= 9 and STOP not in results[1].text[:7]
    assert results[2].text.tolist() == [EMPTY] * 4 and results[2].stop_id is None
    assert results[2].patches.shape == (4, 2, 3)
    assert timing.positions == sum(len(r.text) for r in results) and timing.patches >= 4


def test_weights_are_cast_before_they_are_joined(config, params, monkeypatch):
    join, dtypes = generate.join_projections, []

    def joined(layer):
        dtypes.extend(linear["kernel"].dtype for part in ("attn", "mlp") for linear in layer[part].values())
        return join(layer)

    monkeypatch.setattr(generate, "join_projections", joined)
    jax.eval_shape(Generator(config, {}, ComputeConfig(dtype="bfloat16")).prepared, params)
    assert set(dtypes) == {jnp.dtype("bfloat16")}


def test_padding_ids_and_empty_codes_are_never_drawn(config, params):
    generator = Generator(config, params, text_vocab_size=20)
    hot = SamplingConfig(50.0)
    result = one(generator, request(config, seed=1, max_new=60, stop_ids=(), text_sampling=hot, patch_sampling=hot))
    assert result.text.max() < 20 and len(result.patches) > 0
    for r, size in enumerate(config.codebook_sizes):
        assert result.patches[..., r].max() < size
    only_patches = one(generator, request(config, max_new=40, stop_ids=(), allowed_ids=(EMPTY,), patch_sampling=hot))
    assert (only_patches.patches.reshape(-1, 3).max(0) >= np.array(config.codebook_sizes) - 3).all()


def test_scanned_and_unrolled_layers_generate_the_same(config, params, generator, monkeypatch):
    r = request(config, max_new=20, stop_ids=())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    scanned = Generator(config, params)
    assert scanned.compute.scan_layers and not generator.compute.scan_layers
    monkeypatch.undo()
    assert same(one(scanned, r), one(generator, r))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(max_new=0), "request 0: max_new"),
        (dict(min_new=13), "request 0: min_new"),
        (dict(seed=-1), "request 0: seed"),
        (dict(stop_ids=(99,)), "request 0: stop_ids"),
        (dict(allowed_ids=()), "request 0: allowed_ids"),
        (dict(allowed_ids=(STOP,), min_new=3), "request 0: allowed_ids"),
        (dict(forced_ids=(-2,)), "request 0: forced_ids"),
        (dict(max_new=40_000), "request 0: max_positions: expected at most 32768 positions"),
        (dict(prompt=Prompt(np.zeros(0, np.int32), np.zeros((0, 2, 3)))), "request 0: prompt.text"),
        (dict(prompt=Prompt(np.array([99]), np.zeros((0, 2, 3)))), "request 0: prompt.text"),
        (dict(prompt=Prompt(np.array([EMPTY]), np.zeros((0, 2, 3)))), "request 0: prompt.patches"),
        (dict(prompt=Prompt(np.array([EMPTY]), np.full((1, 2, 3), 12))), "prompt.patches: expected codes of channel 2"),
    ],
)
def test_an_impossible_request_is_refused_by_name(config, generator, change, message):
    with pytest.raises(ConfigError, match=message):
        generator.generate([dataclasses.replace(request(config), **change)])

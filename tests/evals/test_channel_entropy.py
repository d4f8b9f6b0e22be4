"""Cross-entropy of the RVQ channels: right frames, right context, and the references mean what they say."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mimo_jax.config import AudioLMConfig, ComputeConfig, TransformerConfig
from mimo_jax.data.records import Record
from mimo_jax.evals.channel_entropy import channel_entropies, unigrams
from mimo_jax.models.audio_lm import init_params
from mimo_jax.text.tokenizers import SPECIAL_TOKENS

CONFIG = AudioLMConfig(
    vocab_size=40,
    empty_id=6,
    llm=TransformerConfig.qwen2(16, 1, 2, 8, 32),
    patch_encoder=TransformerConfig.qwen2(8, 1, 2, 4, 16, causal=False),
    patch_decoder=TransformerConfig.qwen2(8, 1, 2, 4, 16),
    codebook_sizes=(5, 3),
    delays=(0, 1),
)


class Letters:
    """A text tokenizer of 26 letters; anything else is letter 0."""

    def __init__(self):
        self.special = {token: i + 1 for i, token in enumerate(SPECIAL_TOKENS)}
        self.vocab_size = 40

    def encode(self, text):
        return [13 + max(0, ord(c) - 97) % 26 for c in text]


def record(frames: int, seed: int) -> Record:
    generator = np.random.default_rng(seed)
    return Record(f"r{seed}", np.stack([generator.integers(0, n, frames) for n in (5, 3)], 1).astype(np.uint16))


HELD_OUT = [record(n, n) for n in (9, 12, 6)]


@pytest.fixture(scope="module")
def params():
    # Drawn here: the initialisation would take longer to compile than everything else. The weights are larger than
    # training starts with, so that context changes the predictions.
    shapes = jax.eval_shape(lambda key: init_params(CONFIG, ComputeConfig(), key), jax.random.key(0))["params"]
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda x: generator.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def measure(params, held_out=HELD_OUT, row_length=24, row_patches=8, batch=2):
    return channel_entropies(
        CONFIG, ComputeConfig(), params, Letters(), [record(50, 99)], held_out, row_length, row_patches, batch
    )


def test_uniform_model_costs_log_of_the_vocabulary_on_every_true_frame(params):
    zero = jax.tree.map(np.zeros_like, params)
    result = measure(zero)
    np.testing.assert_array_equal(result.frames_N, [9, 12, 6])
    # Each audio vocabulary has one id more than its codebook ("empty"); frames that fill up a patch are not counted.
    np.testing.assert_allclose(result.model_NR, np.outer([9, 12, 6], np.log([6, 4])), rtol=1e-5)
    np.testing.assert_allclose(result.control_NR, result.model_NR, rtol=1e-6)


def test_frames_that_only_fill_up_a_patch_do_not_count(params):
    # The last patch of nine frames is one frame and three copies of it; a tenth frame that is another copy changes it
    # in nothing but what is counted.
    nine = HELD_OUT[0]
    ten = Record("ten", np.concatenate([nine.codes_MR, nine.codes_MR[-1:]]))
    a = measure(params, [nine, HELD_OUT[1]]).model_NR[0]
    b = measure(params, [ten, HELD_OUT[1]]).model_NR[0]
    assert (b > a + 1e-3).all()


def test_result_does_not_depend_on_batch_or_padding(params):
    reference = measure(params)
    other = measure(params, row_length=40, row_patches=17, batch=3)
    np.testing.assert_allclose(other.model_NR, reference.model_NR, rtol=1e-5)
    np.testing.assert_allclose(other.control_NR, reference.control_NR, rtol=1e-5)


def test_control_hears_the_next_utterance_and_predicts_this_one(params):
    same = Record("same", HELD_OUT[0].codes_MR.copy())
    twins = measure(params, [HELD_OUT[0], same])
    np.testing.assert_allclose(twins.control_NR, twins.model_NR, rtol=1e-6)
    others = measure(params)
    assert (np.abs(others.control_NR - others.model_NR) > 1e-3).any(axis=1).all()
    first = Record("start", HELD_OUT[0].codes_MR[:4])
    # A single patch has heard nothing yet, so its context cannot be wrong.
    single = measure(params, [first, HELD_OUT[1]])
    np.testing.assert_allclose(single.control_NR[0], single.model_NR[0], rtol=1e-6)


def test_utterance_longer_than_a_row_is_scored_whole(params):
    zero = jax.tree.map(np.zeros_like, params)
    result = measure(zero, [record(70, 1), record(8, 2)])
    np.testing.assert_allclose(result.model_NR, np.outer([70, 8], np.log([6, 4])), rtol=1e-5)


def test_unigram_is_add_one_smoothed_on_training_and_scored_on_held_out(params):
    codes = np.zeros((3, 2), np.uint16)
    (first, second) = unigrams([Record("a", codes), Record("b", codes[:1])], (5, 3))
    np.testing.assert_allclose(np.exp(first), [5 / 9, 1 / 9, 1 / 9, 1 / 9, 1 / 9])
    np.testing.assert_allclose(np.exp(second), [5 / 7, 1 / 7, 1 / 7])
    result = measure(params)
    expected = [-unigrams([record(50, 99)], (5, 3))[1][r.codes_MR[:, 1]].sum() for r in HELD_OUT]
    np.testing.assert_allclose(result.unigram_NR[:, 1], expected)


def test_summaries_are_means_over_frames_and_paired(params):
    result = measure(params)
    total = result.frames_N.sum()
    assert result.mean("model", 0).value == pytest.approx(result.model_NR[:, 0].sum() / total)
    reduction = 1 - result.model_NR[:, 1].sum() / result.unigram_NR[:, 1].sum()
    assert result.reduction(1).value == pytest.approx(reduction)
    gap = (result.control_NR - result.model_NR)[:, 0].sum() / total
    assert result.control_gap(0).value == pytest.approx(gap)
    gaps = [result.control_gap(r).value for r in range(result.model_NR.shape[1])]
    assert result.control_gap().value == pytest.approx(sum(gaps))


def test_single_utterance_has_no_other_context(params):
    with pytest.raises(ValueError, match="at least two utterances"):
        measure(params, HELD_OUT[:1])

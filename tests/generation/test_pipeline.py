"""Where our answers differ from those of the released code on purpose."""

import numpy as np
import pytest

from mimo_jax.generation.app import GenerationSettings, SpeechModel, TaskRequest, run_tasks
from mimo_jax.generation.generate import Generator
from mimo_jax.generation.sampling import GREEDY
from mimo_jax.interop.published import load_lm, load_tokenizer
from mimo_jax.models.tokenizer.codec import Codec
from mimo_jax.text.tokenizers import load_text_tokenizer


@pytest.fixture(scope="module")
def model(parity_dir):
    config, params = load_lm(parity_dir / "lm" / "lm_a" / "model")
    audio, variables = load_tokenizer(parity_dir / "tokenizer" / "tok_a" / "model")
    codec = Codec(audio, variables["params"], variables["codebook"])
    tokenizer = load_text_tokenizer(parity_dir / "lm" / "lm_a" / "model")
    return SpeechModel(Generator(config, params), codec, tokenizer, prompts="chat")


def test_our_answer_keeps_the_last_position_that_the_limit_allows(parity_dir, model):
    wav = np.load(parity_dir / "tokenizer" / "tok_a" / "single_inputs.npz")["wav"][:24000]
    settings = GenerationSettings(text_sampling=GREEDY, patch_sampling=GREEDY, constrain=False, max_new=20)
    request = TaskRequest(task="dialogue", audio=wav, system="You are a helpful assistant.")
    (output,), _ = run_tasks(model, [request], settings)
    golden = np.load(parity_dir / "pipeline" / "expected.npz")
    codes = golden["spoken_dialogue/decoder_codes"]
    np.testing.assert_array_equal(output.codes_MR[: codes.shape[1]].T, codes)
    special = model.tokenizer.special
    assert output.history[-1].text[-2] == special["<|im_end|>"]  # closed, as in training
    assert not any(token in output.text for token in special)

"""A model of the goldens: where our answers differ from the released code's on purpose, and what batches may change."""

import dataclasses

import numpy as np
import pytest

from mimo_jax.generation.app import GenerationSettings, SpeechModel, SpeechOutput, TaskRequest, run_tasks
from mimo_jax.generation.generate import Bucket, Generator
from mimo_jax.generation.sampling import GREEDY, SamplingConfig
from mimo_jax.interop.published import load_lm, load_tokenizer
from mimo_jax.models.tokenizer.codec import Codec
from mimo_jax.parity.language_model import ReferenceRow
from mimo_jax.parity.sequences import Groups, write_ids
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


def ids_of(model: SpeechModel, output: SpeechOutput) -> np.ndarray:
    """The answer as rows of ids: text above, the channels below."""
    config, turn = model.generator.config, output.history[-1]
    return write_ids(Groups.of_prompt(turn, config), config)


def margin(model: SpeechModel, output: SpeechOutput, params, position: int) -> float:
    """Smallest gap between the best two scores of what a greedy answer decides at a position of its turn."""
    config = model.generator.config
    row = ReferenceRow(config, params, {"turn": ids_of(model, output)})
    before, turn = row.places["turn"].start + position - 1, row.groups["turn"]
    second, best = np.sort(row.logits_LV[before])[-2:]
    if turn.text_T[position] != config.empty_id:
        return float(best - second)
    return min(float(best - second), float(row.gaps(np.array([before]), turn.codes_TGR[position][None]).min()))


@pytest.mark.slow
def test_eight_mixed_requests_answer_together_as_each_alone(parity_dir, model):
    wav = np.load(parity_dir / "tokenizer" / "tok_a" / "single_inputs.npz")["wav"]
    greedy = GenerationSettings(text_sampling=GREEDY, patch_sampling=GREEDY, constrain=False, max_new=24)
    drawn = GenerationSettings(max_seconds=2, min_seconds=0.6, max_text=20, seed=11)
    hot = dataclasses.replace(drawn, seed=12, text_sampling=SamplingConfig(1.5), patch_sampling=SamplingConfig(1.2, 9))
    requests = [
        TaskRequest(task="asr", audio=wav, template=0, settings=greedy),
        TaskRequest(task="tts", text="old stone bridges", settings=dataclasses.replace(drawn, force_text=True)),
        TaskRequest(task="instruct-tts", text="good day", instruction="slow", voice=wav[:9000], settings=hot),
        TaskRequest(task="understand", audio=wav[:30000], text="what?", thinking=True, settings=drawn),
        TaskRequest(task="dialogue", audio=wav[:20000], system="be brief", settings=greedy),
        TaskRequest(task="chat", text="hello", turns=("hi", "good day"), settings=hot),
        TaskRequest(task="continue", audio=wav[:15000], settings=dataclasses.replace(drawn, seed=13)),
        TaskRequest(task="clone", text="owls", voice=wav[:24000], voice_text="wise", template=0, settings=greedy),
    ]
    bucket = Bucket(requests=8, prompt=256, patches=256, new=128)
    together, _ = run_tasks(model, requests, bucket=bucket)
    backwards, _ = run_tasks(model, requests[::-1], bucket=bucket)
    params = load_lm(parity_dir / "lm" / "lm_a" / "model")[1]
    for request, output, moved in zip(requests, together, backwards[::-1], strict=True):
        (alone,), _ = run_tasks(model, [request], bucket=bucket)
        (small,), _ = run_tasks(model, [request])
        for same in (moved, alone):
            np.testing.assert_array_equal(ids_of(model, same), ids_of(model, output))
            np.testing.assert_array_equal(same.wav, output.wav)
        a, b = ids_of(model, small), ids_of(model, output)
        assert a.shape == b.shape or request.settings is greedy
        shared = min(a.shape[1], b.shape[1])
        differs = np.flatnonzero((a[:, :shared] != b[:, :shared]).any(0))
        if len(differs):
            assert request.settings is greedy, request.task
            first = int(differs[0]) // model.generator.config.group_size
            assert margin(model, output, params, first) < 1e-4, request.task
        other = dataclasses.replace(request, settings=dataclasses.replace(request.settings, seed=99))
        (other_seed,), _ = run_tasks(model, [other], bucket=bucket)
        assert np.array_equal(ids_of(model, other_seed), b) == (request.settings is greedy), request.task

"""Prompts are the beginnings of the documents that the models were trained on, and allow exactly what may follow."""

import numpy as np
import pytest
from data_pipeline.builders import CharTokenizer, random_record, tiny_model

from mimo_jax.config import ConfigError
from mimo_jax.data.layouts import ASR, CONTINUATION, TTS, Layouts, TextSpan
from mimo_jax.data.shards import record_entry
from mimo_jax.generation.prompts import asr_prompt, continuation_prompt, tts_prompt

TOKENIZER = CharTokenizer()
CONFIG = tiny_model(TOKENIZER)
EMPTY = CONFIG.empty_id


def document(task, record):
    """A training document as text ids and patches."""
    layouts = Layouts(TOKENIZER, CONFIG.group_size, CONFIG.num_channels, row_length=4096, row_patches=4096)
    (piece,) = layouts.plan(task, record_entry(record, TOKENIZER, 25.0), 0)
    spans = layouts.fill(task, piece, record).spans
    text = [s.ids if isinstance(s, TextSpan) else np.full(len(s.patches_NGR), EMPTY) for s in spans]
    patches = [s.patches_NGR for s in spans if not isinstance(s, TextSpan)]
    return np.concatenate(text), np.concatenate(patches)


def check_is_beginning(task_prompt, document):
    text, patches = document
    prompt = task_prompt.prompt
    assert 0 < len(prompt.text) < len(text)
    np.testing.assert_array_equal(prompt.text, text[: len(prompt.text)])
    np.testing.assert_array_equal(prompt.patches, patches[: len(prompt.patches)])
    assert (prompt.text == EMPTY).sum() == len(prompt.patches)
    answer = text[len(prompt.text) :]
    assert set(answer.tolist()) <= set(task_prompt.allowed_ids)
    assert answer[-1] == TOKENIZER.special["<|endoftext|>"] and answer[-1] in task_prompt.stop_ids
    return answer


def test_continuation_prompt_is_the_beginning_of_a_continuation_document():
    record = random_record(np.random.default_rng(0), "r", frames=63)
    for frames in (63, 40, 21):
        task_prompt = continuation_prompt(TOKENIZER, CONFIG, record.codes_MR[:frames])
        assert len(task_prompt.prompt.patches) == frames // 4  # a cut patch is left out
        check_is_beginning(task_prompt, document(CONTINUATION, record))
    assert task_prompt.stop_ids[0] == TOKENIZER.special["<|eosp|>"]
    assert set(task_prompt.allowed_ids) == {EMPTY, *task_prompt.stop_ids}


def test_asr_prompt_is_the_beginning_of_an_asr_document():
    record = random_record(np.random.default_rng(1), "r", frames=63, level=0)
    task_prompt = asr_prompt(TOKENIZER, CONFIG, record.codes_MR)
    answer = check_is_beginning(task_prompt, document(ASR, record))
    assert TOKENIZER.decode(answer.tolist()) == record.text
    assert EMPTY not in task_prompt.allowed_ids
    np.testing.assert_array_equal(task_prompt.prompt.patches[-1, 2], task_prompt.prompt.patches[-1, 3])


def test_tts_prompt_is_the_beginning_of_a_tts_document():
    record = random_record(np.random.default_rng(2), "r", frames=90, level=0)
    task_prompt = tts_prompt(TOKENIZER, CONFIG, record.text)
    answer = check_is_beginning(task_prompt, document(TTS, record))
    assert TOKENIZER.special["<|eostm|>"] in answer and TOKENIZER.special["<|eostm|>"] in task_prompt.stop_ids
    assert TOKENIZER.special["<|sosp|>"] not in task_prompt.allowed_ids


def test_impossible_prompts_are_refused():
    with pytest.raises(ConfigError, match="at least 4 frames of 8 levels"):
        continuation_prompt(TOKENIZER, CONFIG, np.zeros((3, 8), np.uint16))
    with pytest.raises(ConfigError, match="at least 4 frames of 8 levels"):
        asr_prompt(TOKENIZER, CONFIG, np.zeros((8, 7), np.uint16))
    with pytest.raises(ConfigError, match="text"):
        tts_prompt(TOKENIZER, CONFIG, "  \n")

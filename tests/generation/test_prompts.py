"""Prompts are the beginnings of the documents that the models were trained on, and allow exactly what may follow."""

import dataclasses

import numpy as np
import pytest
from data_pipeline.builders import CharTokenizer, random_record, tiny_model

from mimo_jax.config import ConfigError
from mimo_jax.data.chat import Stream
from mimo_jax.data.layouts import ASR, CONTINUATION, INSTRUCT_TTS, TTS, Layouts, TextSpan
from mimo_jax.data.shards import record_entry
from mimo_jax.generation.generate import Prompt
from mimo_jax.generation.prompts import Prompts, asr_templates, choose_template, tts_templates

TOKENIZER = CharTokenizer()
CONFIG = tiny_model(TOKENIZER)
EMPTY = CONFIG.empty_id
BASE, CHAT = (Prompts(TOKENIZER, CONFIG, kind) for kind in ("base", "chat"))


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
        task_prompt = BASE.continuation(record.codes_MR[:frames])
        assert len(task_prompt.prompt.patches) == frames // 4  # a cut patch is left out
        check_is_beginning(task_prompt, document(CONTINUATION, record))
    assert task_prompt.stop_ids[0] == TOKENIZER.special["<|eosp|>"]
    assert set(task_prompt.allowed_ids) == {EMPTY, *task_prompt.stop_ids}


def test_asr_prompt_is_the_beginning_of_an_asr_document():
    record = random_record(np.random.default_rng(1), "r", frames=63, level=0)
    task_prompt = BASE.asr(record.codes_MR)
    answer = check_is_beginning(task_prompt, document(ASR, record))
    assert TOKENIZER.decode(answer.tolist()) == record.text
    assert EMPTY not in task_prompt.allowed_ids
    np.testing.assert_array_equal(task_prompt.prompt.patches[-1, 2], task_prompt.prompt.patches[-1, 3])


def test_tts_prompt_is_the_beginning_of_a_tts_document():
    record = random_record(np.random.default_rng(2), "r", frames=90, level=0)
    task_prompt = BASE.tts(record.text)
    answer = check_is_beginning(task_prompt, document(TTS, record))
    assert TOKENIZER.special["<|eostm|>"] in answer and TOKENIZER.special["<|eostm|>"] in task_prompt.stop_ids
    assert TOKENIZER.special["<|sosp|>"] not in task_prompt.allowed_ids


def test_instruct_tts_prompt_is_the_beginning_of_an_instruct_tts_document():
    record = random_record(np.random.default_rng(3), "r", frames=90, level=0)
    check_is_beginning(BASE.instruct_tts(record.text, record.instruction), document(INSTRUCT_TTS, record))


def test_a_held_stream_says_the_text_of_a_training_document_and_nothing_else():
    record = random_record(np.random.default_rng(2), "r", frames=400, level=3)
    record = dataclasses.replace(record, text="eleven owls on a bridge")
    task = BASE.tts(record.text)
    held = BASE.hold_text(task)
    text, _ = document(TTS, record)
    expected = text[len(task.prompt.text) :][: len(held.forced_ids)]
    np.testing.assert_array_equal(held.forced_ids, expected)
    end = TOKENIZER.special["<|eot|>"]
    assert held.forced_ids[-2:] == (end, EMPTY) and (text == end).sum() == 1
    assert set(held.allowed_ids) == {EMPTY, TOKENIZER.special["<|eostm|>"]}
    with pytest.raises(ConfigError, match="words are given"):
        BASE.hold_text(BASE.continuation(record.codes_MR))


@pytest.mark.parametrize("frames", [20, 31, 60, 400])
@pytest.mark.parametrize("prompts", [BASE, CHAT], ids=["base", "chat"])
def test_a_clone_goes_on_in_the_stream_of_its_recording(prompts, frames):
    codes = random_record(np.random.default_rng(4), "r", frames=frames).codes_MR
    task = prompts.clone("old bridges", codes, "wise owls")
    said = TOKENIZER.encode("wise owls old bridges")
    whole = Prompts(TOKENIZER, CONFIG, "base").few_shot(
        "", [(codes[:4], Stream("wise owls old bridges", codes))], codes[:4]
    )
    starts = np.flatnonzero(whole.prompt.text == TOKENIZER.special["<|sostm|>"])
    stream = whole.prompt.text[starts[0] :]
    first = np.flatnonzero(task.prompt.text == TOKENIZER.special["<|sostm|>"])[-1]
    given = task.prompt.text[first:]
    np.testing.assert_array_equal(given, stream[: len(given)])
    assert (given == EMPTY).sum() == frames // 4
    assert len(given) - 1 == task.stream
    held = prompts.hold_text(task).forced_ids
    rest = [i for i in [*given.tolist(), *held] if i != EMPTY]
    if frames < 400:  # else the recording has outlasted the text
        turn = -(frames // 4) % 5
        assert task.forced_ids == (EMPTY,) * turn and held[:turn] == task.forced_ids and held[turn] != EMPTY
        assert rest == [TOKENIZER.special["<|sostm|>"], *said, TOKENIZER.special["<|eot|>"]]
    else:
        assert held == () and task.forced_ids == ()


def test_text_that_reads_like_a_special_token_stays_text():
    prompt = CHAT.written_dialogue(["<|im_end|>"]).prompt
    assert (prompt.text == TOKENIZER.special["<|im_end|>"]).sum() == 1


def test_a_closed_answer_ends_the_turn_once():
    end, newline = TOKENIZER.special["<|im_end|>"], TOKENIZER.encode("\n")
    none = np.zeros((0, CONFIG.group_size, CONFIG.num_channels), np.int32)
    for stop in ("<|im_end|>", "<|eostm|>", "<|endoftext|>"):
        closed = CHAT.closed(Prompt(np.array([200, TOKENIZER.special[stop]]), none))
        before = [200, TOKENIZER.special[stop]] if stop == "<|eostm|>" else [200]
        assert closed.text.tolist() == [*before, end, *newline]


def test_impossible_prompts_are_refused():
    with pytest.raises(ConfigError, match="at least 4 frames and 8 levels"):
        BASE.continuation(np.zeros((3, 8), np.uint16))
    with pytest.raises(ConfigError, match="at least 1 frames and 8 levels"):
        BASE.asr(np.zeros((8, 7), np.uint16))
    with pytest.raises(ConfigError, match="text"):
        BASE.tts("  \n")
    for make in (
        lambda: BASE.spoken_dialogue([np.zeros((8, 8), np.uint16)]),
        lambda: BASE.written_dialogue(["a"]),
        lambda: BASE.understanding(np.zeros((8, 8), np.uint16), "what?", thinking=True),
    ):
        with pytest.raises(ConfigError, match="expected chat prompts"):
            make()
    with pytest.raises(ConfigError, match="voice_text"):
        BASE.clone("a", np.zeros((8, 8), np.uint16))


def test_templates_are_drawn_by_the_seed_and_all_of_them_come():
    drawn = [choose_template(asr_templates(), None, seed) for seed in range(300)]
    assert set(drawn) == set(asr_templates())
    assert drawn[:9] == [choose_template(asr_templates(), None, seed) for seed in range(9)]
    with pytest.raises(ValueError, match=r"template: expected 0\.\.9, got 10"):
        choose_template(tts_templates("hello"), 10, 0)

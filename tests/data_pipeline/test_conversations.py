"""Conversations: the template is checked, documents begin as the prompts do, the assistant alone is learned."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from data_pipeline.builders import CharTokenizer, HashCodec, tiny_model

from mimo_jax.config import LayoutWeights, LearningRates, LMDataConfig, LMTrainConfig, RunConfig, SourceConfig
from mimo_jax.data import chat
from mimo_jax.data.conversations import Conversations, check_conversation, make_record, render
from mimo_jax.data.ingest import ingest_conversations
from mimo_jax.data.layouts import CONVERSATION, CONVERSATION_FORMATS, TASKS, SpeechSpan
from mimo_jax.data.lm_rows import lm_loader
from mimo_jax.data.manifest import ManifestError
from mimo_jax.data.records import DataError
from mimo_jax.data.shards import ShardSet, load_index
from mimo_jax.data.show import show_rows
from mimo_jax.text.tokenizers import load_text_tokenizer

CHARS = CharTokenizer()
CHAT = LayoutWeights(**{f"sft_{name}": 1.0 for name in CONVERSATION_FORMATS})


def say(role: str, *contents: str, **more) -> dict:
    """A message; contents that end with .wav are audio."""
    items = [{"type": "audio", "audio": c} if c.endswith(".wav") else {"type": "text", "text": c} for c in contents]
    return {"role": role, "content": items, **more}


def think(chain: str) -> dict:
    return {"thinking": True, "Chain-of-thought": chain}


NO = {"thinking": False}
CONVERSATIONS: dict[str, list[dict]] = {
    "asr": [say("user", "Transcribe this voice recording.", "a.wav"), say("assistant", "Hello there.", **NO)],
    "tts": [say("user", "Read this content out loud: Hi you"), say("assistant", "Hi you", "b.wav", thinking=None)],
    "instruct_tts": [
        say("system", chat.STYLE_VOICE_SYSTEM, "c.wav"),
        say("user", "Read this content out loud: Hi you(slowly)"),
        say("assistant", "Hi you", "b.wav", **think("Slow it is.\n")),
    ],
    "understanding": [say("user", "Who speaks?", "a.wav"), say("assistant", "Anna.", **think("A voice like Anna's."))],
    "spoken_dialogue": [
        say("system", "Be kind."),
        say("user", "a.wav"),
        say("assistant", "Hello.", "b.wav"),
        say("user", "c.wav"),
        say("assistant", "Bye now.", "a.wav"),
    ],
    "text_dialogue": [say("user", "Who are you?"), say("assistant", "A model.", **NO)],
    "speech_to_text": [say("user", "a.wav"), say("assistant", "Fine.", **NO)],
}


def write(folder: Path, conversations, missing: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(("a", "b", "c")):
        if name not in missing:
            noise = 0.1 * np.random.default_rng(i).standard_normal(9600 + 4800 * i)
            soundfile.write(folder / f"{name}.wav", noise.astype(np.float32), 24_000)
    path = folder / "conversations.jsonl"
    path.write_text("".join(json.dumps(c) + "\n" for c in conversations))
    return path


def record_of(name: str):
    codec = HashCodec()
    conversation = check_conversation(CONVERSATIONS[name], "here:1", Path("/x"))
    codes = {c: codec.encode([np.full(4000 * (i + 1), i, np.float32)])[0] for i, c in enumerate("abc")}
    record = make_record(conversation, [codes[Path(p).stem] for p in conversation.audio], 1.0, 20)
    return conversation, codes, record


def flat(spans) -> list[tuple]:
    """Positions of a document: (id,) or the codes of a patch."""
    return [
        tuple(np.ravel(item).tolist())
        for span in spans
        for item in (getattr(span, "ids", None) if not isinstance(span, SpeechSpan) else span.patches_NGR)
    ]


def targets(spans) -> list[bool]:
    return [span.target for span in spans for _ in range(len(span))]


def prompts() -> dict[str, tuple]:
    """The prompts of `generation` that the first answers of CONVERSATIONS follow."""
    codes = record_of("spoken_dialogue")[1]
    return {
        "asr": chat.asr(codes["a"], "Transcribe this voice recording."),
        "tts": chat.tts("Hi you", "Read this content out loud"),
        "instruct_tts": chat.instruct_tts("Hi you", "Read this content out loud", "slowly", codes["c"]),
        "understanding": chat.understanding(codes["a"], "Who speaks?", thinking=True),
        "spoken_dialogue": chat.dialogue([codes["a"]], system="Be kind."),
        "text_dialogue": chat.dialogue(["Who are you?"], thinking=False),
        "speech_to_text": chat.dialogue([codes["a"]], thinking=False),
    }


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_document_begins_as_the_prompt_of_its_task_and_only_what_follows_is_learned(name):
    _, _, record = record_of(name)
    spans = render(record, CHARS, 4, 8)
    prompt = flat(chat.render(prompts()[name], CHARS, 4, 8))
    assert flat(spans)[: len(prompt)] == prompt
    learned = targets(spans)
    assert not any(learned[: len(prompt)]) and learned[len(prompt)]
    answer = list(itertools.takewhile(bool, learned[len(prompt) :]))
    end = [(CHARS.special["<|im_end|>"],), (100 + ord("\n"),)]
    assert flat(spans)[: len(prompt) + len(answer)][-2:] == end
    if name == "spoken_dialogue":  # the second answer is learned too, the user between them is not
        between = learned[len(prompt) + len(answer) :]
        assert not between[0] and between[-1] and flat(spans)[-2:] == end
    else:
        assert all(learned[len(prompt) :])


def test_history_of_a_spoken_dialogue_stands_as_generation_puts_it():
    _, codes, record = record_of("spoken_dialogue")
    turns = [codes["a"], chat.Stream("Hello.", codes["b"]), codes["c"]]
    prompt = flat(chat.render(chat.dialogue(turns, system="Be kind."), CHARS, 4, 8))
    assert flat(render(record, CHARS, 4, 8))[: len(prompt)] == prompt


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_format_is_found(name):
    wanted = "spoken_dialogue" if name == "speech_to_text" else name
    assert record_of(name)[0].format == wanted


def test_thought_is_learned_up_to_the_answer():
    spans = render(record_of("understanding")[2], CHARS, 4, 8)
    learned = CHARS.decode([int(i) for s in spans if s.target for i in s.ids])
    assert learned == "A voice like Anna's.\n</think>\nAnna.\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop(), r"messages: expected an answer at the end, got 'user'"),
        (
            lambda c: c.insert(0, say("assistant", "Hi")),
            r"messages\[0\].role: expected system or user, got 'assistant'",
        ),
        (lambda c: c[0].update(content=[{"type": "image"}]), r"messages\[0\].content\[0\]: .*\"text\" or \"audio\""),
        (lambda c: c[0].update(content=[{"type": "text", "text": ""}]), "something that is said or heard"),
        (lambda c: c[1].update(thinking=True), r"messages\[1\].Chain-of-thought: expected what was thought"),
        (lambda c: c[1].update(thinking="yes"), r"messages\[1\].thinking: expected true, false or null"),
        (lambda c: c[1].update(content=[{"type": "audio", "audio": "a.wav"}]), "a text, or a text and an audio"),
        (lambda c: c[1].update(content=["\ud800"]), r"content\[0\]: expected an object"),
    ],
)
def test_wrong_conversation_is_refused_by_line_and_field(tmp_path, change, message):
    wrong = json.loads(json.dumps(CONVERSATIONS["text_dialogue"]))
    change(wrong)
    path = write(tmp_path, [CONVERSATIONS["asr"], wrong])
    with pytest.raises(ManifestError, match=rf"conversations.jsonl:2: .*{message}"):
        Conversations(path)


def test_list_file_and_named_conversations_are_read_alike(tmp_path):
    path = write(tmp_path, [{"messages": CONVERSATIONS["asr"], "id": "one", "format": "understanding"}])
    (one,) = Conversations(path).read(0, 1)
    assert (one.id, one.format) == ("one", "understanding")
    (tmp_path / "list.json").write_text(json.dumps([CONVERSATIONS["asr"]]))
    (other,) = Conversations(tmp_path / "list.json").read(0, 1)
    assert other.messages == one.messages and other.audio == (str(tmp_path / "a.wav"),)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversations")
    path = write(folder, CONVERSATIONS.values())
    return ingest_conversations(path, HashCodec(), folder / "set", text_tokenizer=CHARS, progress=False)


def test_ingest_encodes_each_recording_once_and_stores_all_formats(shards, tmp_path):
    heard: list[int] = []

    class Counting(HashCodec):
        def encode(self, wavs):
            heard.append(len(wavs))
            return super().encode(wavs)

    path = write(tmp_path, CONVERSATIONS.values())
    again = ingest_conversations(path, Counting(), tmp_path / "set", progress=False)
    assert sum(heard) == 3
    assert [s.sha256 for s in again.info.shards] == [s.sha256 for s in shards.info.shards]
    assert shards.info.kind == "conversation" and len(shards) == len(CONVERSATIONS)
    assert {f: shards.info.counts[f] for f in CONVERSATION_FORMATS} == dict.fromkeys(CONVERSATION_FORMATS, 1) | {
        "spoken_dialogue": 2
    }


def test_conversation_with_a_broken_recording_is_left_out_and_counted(tmp_path):
    path = write(tmp_path, CONVERSATIONS.values(), missing=("c",))
    with pytest.raises(DataError, match="2 of 7 inputs cannot be used"):
        ingest_conversations(path, HashCodec(), tmp_path / "set", progress=False)
    made = ingest_conversations(path, HashCodec(), tmp_path / "set", max_skipped=0.5, progress=False)
    assert made.info.skipped == {"no such audio file": 2} and len(made) == 5


def test_killed_ingest_goes_on_with_the_shards_it_has(shards, tmp_path):
    path = write(tmp_path, CONVERSATIONS.values())
    first = ingest_conversations(
        path, HashCodec(), tmp_path / "set", records_per_shard=3, worker=(0, 2), progress=False
    )
    assert first is None
    rest = ingest_conversations(path, HashCodec(), tmp_path / "set", records_per_shard=3, progress=False)
    assert [r.conversation for r in rest] == [r.conversation for r in shards]


def test_tfds_opens_the_set_alone(shards):
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(shards.path).as_data_source("train")
    for stored, record in zip(source, shards, strict=True):
        assert stored["conversation"].decode() == record.conversation
        np.testing.assert_array_equal(stored["codes"], record.codes_MR)


def job(path: Path, row_length: int = 400) -> LMTrainConfig:
    source = {"chat": SourceConfig(str(path), 1.0, CHAT)}
    return LMTrainConfig(
        model=tiny_model(CHARS),
        data=LMDataConfig(source, source, "characters", 2, row_length, 100, block_documents=7),
        run=RunConfig(steps=2),
        learning_rates=LearningRates(llm=1e-3, patch_encoder=1e-3, patch_decoder=1e-3),
    )


def test_rows_hold_every_conversation_whole_with_its_format_as_task(shards):
    documents = {}
    with lm_loader(job(shards.path), "validation", CHARS, process_index=0, process_count=1) as loader:
        for rows in loader:
            for b, k in np.ndindex(len(rows.text_BL), 8):
                here = rows.segment_ids_BL[b] == k + 1
                if here.any():
                    at = rows.patch_positions_BC[b]
                    learned = rows.audio_weights_BC[b][(at < 400) & np.isin(at, np.flatnonzero(here))]
                    key = (TASKS[rows.task_ids_BL[b][here][0]], int(here.sum()))
                    documents[key] = (rows.text_weights_BL[b][here], learned)
    for record in shards:
        spans = render(record, CHARS, 4, 8)
        form = json.loads(record.conversation)["format"]
        text_weights, audio_weights = documents.pop((f"sft_{form}", sum(map(len, spans))))
        patch = [isinstance(s, SpeechSpan) for s in spans for _ in range(len(s))]
        wanted = [0.0 if not t else 0.01 if p else 1.0 for t, p in zip(targets(spans), patch, strict=True)]
        np.testing.assert_allclose(text_weights, wanted)
        np.testing.assert_array_equal(audio_weights, [t for t, p in zip(targets(spans), patch, strict=True) if p])
    assert not documents


def test_conversation_longer_than_a_row_is_left_out_with_a_notice(shards, capsys):
    index = load_index(ShardSet(shards.path), CHARS)
    longest = int(np.sort(index.text + -(-index.frames // 4))[-1])
    config = dataclasses.replace(job(shards.path, row_length=longest - 1))
    with lm_loader(config, "train", CHARS, process_index=0, process_count=1) as loader:
        next(loader)
    assert "of 7 conversations are longer than a row" in capsys.readouterr().err


def test_show_renders_a_format(shards):
    shown = show_rows(job(shards.path), layout="sft_instruct_tts", tokenizer=CHARS)
    assert "(sft_instruct_tts)" in shown and "<|sostm|>" in shown and "(sft_asr)" not in shown
    assert len(TASKS) == CONVERSATION + len(CONVERSATION_FORMATS)


def test_documents_and_label_masks_are_those_of_the_released_toolkit(parity_dir):
    """Sample 0 is a spoken dialogue, sample 1 TTS with an empty think block; both come from the toolkit's own code."""
    folder = parity_dir / "lm" / "lm_a"
    tokenizer = load_text_tokenizer(folder / "model")
    golden = np.load(folder / "train_loss" / "inputs.npz")
    empty, special = tokenizer.special["<|empty|>"], set(tokenizer.special.values())
    for sample in range(len(golden["input_ids"])):
        length = int(golden["attention_mask"][sample].sum())
        ids = golden["input_ids"][sample, :, : 4 * length]
        text, codes = ids[0, ::4], ids[1:].T.reshape(length, 4, 8)
        labels = golden["labels"][sample, 0, : 4 * length : 4]
        begin, stream = int(np.flatnonzero(labels != -100)[0]), codes[np.flatnonzero(text == empty)]
        heard = stream[: int((text[:begin] == empty).sum())]
        said = tokenizer.decode([i for i in text[begin:-1] if i not in special])
        asked = tokenizer.decode([i for i in text[3:begin] if i not in special]).split("assistant")[0].strip()
        content = "a.wav" if len(heard) else asked
        thinking = None if len(heard) else False
        messages = [say("user", content), say("assistant", said, "b.wav", thinking=thinking)]
        conversation = check_conversation(messages, "golden:1", Path("/x"))
        parts = [p.reshape(-1, 8).astype(np.uint16) for p in (heard, stream[len(heard) :]) if len(p)]
        spans = render(make_record(conversation, parts, 1.0, 8), tokenizer, 4, 8)
        assert [p[0] if len(p) == 1 else empty for p in flat(spans)] == text.tolist()
        assert [p for p in flat(spans) if len(p) > 1] == [tuple(p.ravel().tolist()) for p in stream]
        assert targets(spans) == (labels != -100).tolist()

"""24 conversations of all six formats, from recorded and synthetic speech, and a model that can learn them by heart."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from mimo_jax.audio.files import load_audio
from mimo_jax.audio.synth import Synthesizer, Utterance
from mimo_jax.config import (
    AudioLMConfig,
    LayoutWeights,
    LearningRates,
    LMDataConfig,
    LMTrainConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    TransformerConfig,
)
from mimo_jax.data import chat
from mimo_jax.data.conversations import render
from mimo_jax.data.layouts import CONVERSATION_FORMATS, SpeechSpan
from mimo_jax.data.records import Record
from mimo_jax.data.shards import ShardSet
from mimo_jax.generation.generate import Generator, Prompt, Request
from mimo_jax.generation.sampling import SamplingConfig
from mimo_jax.text.tokenizers import TextTokenizer

RECORDED = Path(__file__).parents[1] / "data" / "librivox"
ALL_FORMATS = LayoutWeights(**{f"sft_{name}": 1.0 for name in CONVERSATION_FORMATS})
RATES = LearningRates(llm=1e-3, patch_encoder=2e-3, patch_decoder=2e-3)
GREEDY = SamplingConfig(0.0)


def _text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def _audio(value: str) -> dict[str, str]:
    return {"type": "audio", "audio": value}


def _user(*contents: dict[str, str], role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": list(contents)}


def _assistant(*contents: dict[str, str], thinking: bool | None = None, chain: str = "") -> dict[str, Any]:
    return {"role": "assistant", "thinking": thinking, "Chain-of-thought": chain, "content": list(contents)}


def write_conversations(folder: Path) -> Path:
    """Writes the wavs and `conversations.jsonl`; answers are at most 3 s long."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in (RECORDED / "manifest.jsonl").read_text().splitlines()]
    recorded = {}
    for i, line in enumerate(lines):
        wav = load_audio(RECORDED / line["audio"], 24_000)[: 3 * 24_000]
        soundfile.write(folder / f"recorded{i}.wav", wav, 24_000)
        recorded[f"recorded{i}.wav"] = " ".join(line["text"].split()[:6])
    made: dict[str, str] = {}
    with Synthesizer() as synthesizer:

        def speech(text: str, voice: str = "default") -> dict[str, str]:
            spoken = synthesizer.speak(Utterance(text, voice, rate=200))
            assert len(spoken.wav) <= 3 * spoken.sample_rate
            name = f"{voice}{len(made)}.wav"
            soundfile.write(folder / name, spoken.wav, spoken.sample_rate)
            made[name] = text
            return _audio(name)

        conversations = _conversations(speech, recorded)
    assert len(conversations) == 24
    path = folder / "conversations.jsonl"
    path.write_text("".join(json.dumps(c) + "\n" for c in conversations))
    return path


def _conversations(speech: Any, recorded: dict[str, str]) -> list[list[dict[str, Any]]]:
    asr = [
        [_user(_text(t), _audio(name)), _assistant(_text(words), thinking=False)]
        for t, (name, words) in zip(
            (
                "Transcribe this voice recording",
                "Convert this spoken content to text",
                "Please transcribe this audio file",
            ),
            recorded.items(),
            strict=False,
        )
    ]
    asr.append(
        [
            _user(speech("Open the window."), _text("Transcribe what you hear in this audio")),
            _assistant(_text("Open the window."), thinking=False),
        ]
    )
    tts = [
        [_user(_text(f"{t}: {words}")), _assistant(_text(words), speech(words, voice))]
        for t, words, voice in (
            ("Please convert this text to speech", "Good morning, Anna.", "f2"),
            ("Read this content out loud", "The train leaves at nine.", "default"),
            ("Create an audio version of this text", "Two birds sang.", "m3"),
        )
    ]
    tts.append(
        [
            _user(_text("Please vocalize this content: He was young")),
            _assistant(_text("He was young"), _audio("recorded1.wav")),
        ]
    )
    instruct = [
        [
            _user(_text(chat.STYLE_SYSTEM), role="system"),
            _user(_text(f"Read this content out loud: {words}({style})")),
            _assistant(_text(words), speech(words, voice), thinking=True, chain=plan),
        ]
        for words, style, plan, voice in (
            ("Come here now!", "in anger", "An angry voice is loud.", "reed"),
            ("Sleep well.", "softly", "Soft means slow.", "f4"),
        )
    ]
    instruct += [
        [
            _user(_text(chat.STYLE_VOICE_SYSTEM), _audio(voice), role="system"),
            _user(_text(f"Turn this text into audible format: {words}(calmly)")),
            _assistant(_text(words), speech(words, "m1"), thinking=True, chain=plan),
        ]
        for words, voice, plan in (
            ("I am here.", "recorded2.wav", "Calm, in that voice."),
            ("It will rain.", "recorded3.wav", "No haste, then."),
        )
    ]
    understanding = [
        [
            _user(_audio("recorded0.wav"), _text("Who is spoken of?")),
            _assistant(_text("John Dashwood."), thinking=False),
        ],
        [
            _user(_audio("recorded3.wav"), _text("Is it a man or a woman?")),
            _assistant(_text("It is a woman."), thinking=False),
        ],
        [
            _user(_audio("recorded4.wav"), _text("Of whom does she speak?")),
            _assistant(_text("Of him."), thinking=True, chain="The words: he might even."),
        ],
        [
            _user(speech("Seven wise owls.", "f5"), _text("How many owls?")),
            _assistant(_text("Seven."), thinking=True, chain="Seven wise owls were heard."),
        ],
    ]
    spoken = [
        [
            _user(_text("Your voice should be:"), _audio("recorded1.wav"), role="system"),
            _user(speech("How are you?", "f2")),
            _assistant(_text("I am fine."), speech("I am fine.", "klatt")),
        ],
        [
            _user(_text("You are a kind friend."), role="system"),
            _user(speech("What time is it?", "m1")),
            _assistant(_text("Half past ten."), speech("Half past ten.", "f4")),
        ],
        [
            _user(speech("Hello.", "reed")),
            _assistant(_text("Hello, who is it?"), speech("Hello, who is it?", "f2")),
            _user(speech("It is me.", "reed")),
            _assistant(_text("Then come in."), speech("Then come in.", "f2")),
        ],
        [_user(speech("Name a color.", "m3")), _assistant(_text("Blue."), thinking=True, chain="Any one will do.")],
    ]
    text = [
        [_user(_text("Who wrote Emma?")), _assistant(_text("Jane Austen."), thinking=False)],
        [
            _user(_text("What is 2 + 3?")),
            _assistant(_text("5"), thinking=True, chain="2 and 3 make 5."),
        ],
        [
            _user(_text("Answer in one word."), role="system"),
            _user(_text("Are owls birds?")),
            _assistant(_text("Yes"), thinking=False),
        ],
        [
            _user(_text("你好")),
            _assistant(_text("你好！")),
            _user(_text("Again, in English")),
            _assistant(_text("Hello!"), thinking=False),
        ],
    ]
    return [*asr, *tts, *instruct, *understanding, *spoken, *text]


def model_config(tokenizer: TextTokenizer, vocab_size: int, width: int = 256) -> AudioLMConfig:
    stack = TransformerConfig.qwen2
    return AudioLMConfig(
        vocab_size=vocab_size,
        empty_id=tokenizer.special["<|empty|>"],
        llm=stack(width, 4, 4, 64, 3 * width, num_kv_heads=2),
        patch_encoder=stack(128, 2, 4, 32, 512, causal=False),
        patch_decoder=stack(128, 3, 4, 32, 512),
    )


def job(
    shards: Path,
    tokenizer: TextTokenizer,
    vocab_size: int,
    steps: int = 300,
    rows: int = 4,
    row_length: int = 512,
    row_patches: int = 96,
    rates: LearningRates = RATES,
    **more: Any,
) -> LMTrainConfig:
    source = {"chat": SourceConfig(str(shards), 1.0, ALL_FORMATS)}
    return LMTrainConfig(
        model=model_config(tokenizer, vocab_size),
        data=LMDataConfig(source, source, tokenizer.name, rows, row_length, row_patches, block_documents=24),
        run=RunConfig(steps, log_every=10, eval_every=100, eval_batches=0, checkpoint_every=steps, keep_checkpoints=1),
        learning_rates=rates,
        optimizer=OptimizerConfig(warmup_fraction=0.05, weight_decay=0.0),
        **more,
    )


@dataclasses.dataclass
class Score:
    """Counts over the answers of all conversations."""

    texts: int = 0
    texts_right: int = 0
    codes: int = 0
    codes_right: int = 0


def free_running(generator: Generator, shards: ShardSet, tokenizer: TextTokenizer) -> Score:
    """Lets the model answer every conversation greedily and compares with what it was taught."""
    c, score = generator.config, Score()
    requests: list[Request] = []
    wanted: list[tuple[np.ndarray, np.ndarray]] = []
    stop = tokenizer.special["<|im_end|>"]
    for record in shards:
        text, patches, learned = positions(record, tokenizer, c)
        starts = np.flatnonzero(learned & ~np.roll(learned, 1))
        for start in starts.tolist():
            end = start + int(np.flatnonzero(text[start:] == stop)[0]) + 1
            before = int((text[:start] == c.empty_id).sum())
            count = int((text[start:end] == c.empty_id).sum())
            prompt = Prompt(text[:start], patches[:before].astype(np.int32))
            requests.append(
                Request(prompt, len(text[start:end]) + 4, (stop,), text_sampling=GREEDY, patch_sampling=GREEDY)
            )
            wanted.append((text[start:end], patches[before : before + count]))
    for first in range(0, len(requests), 8):
        for got, (text, patches) in zip(
            generator.generate(requests[first : first + 8])[0], wanted[first : first + 8], strict=True
        ):
            score.texts += 1
            score.texts_right += np.array_equal(got.text, text)
            n = min(len(got.patches), len(patches))
            score.codes += patches.size
            score.codes_right += int((got.patches[:n] == patches[:n]).sum())
    return score


def positions(record: Record, tokenizer: TextTokenizer, c: AudioLMConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Text ids, patches and "is learned" of a conversation's document."""
    spans: Sequence[Any] = render(record, tokenizer, c.group_size, c.num_channels)
    text = np.concatenate([np.full(len(s), c.empty_id) if isinstance(s, SpeechSpan) else s.ids for s in spans])
    patches = np.concatenate(
        [np.zeros((0, c.group_size, c.num_channels)), *(s.patches_NGR for s in spans if isinstance(s, SpeechSpan))]
    )
    learned = np.concatenate([np.full(len(s), s.target) for s in spans])
    return text.astype(np.int32), patches.astype(np.int32), learned

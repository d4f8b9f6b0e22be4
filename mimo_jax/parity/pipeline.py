"""Whole calls: audio and text in, text and waveform out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.config import AudioLMConfig
from mimo_jax.generation.app import GenerationSettings, SpeechModel, SpeechOutput, TaskRequest, run_tasks
from mimo_jax.generation.generate import Generator
from mimo_jax.generation.prompts import asr_templates, tts_templates
from mimo_jax.generation.sampling import GREEDY
from mimo_jax.interop.published import read_lm_config, read_tokenizer_config
from mimo_jax.models.tokenizer.codec import Codec
from mimo_jax.parity.harness import Case, ParityError, load_arrays, read_json
from mimo_jax.parity.language_model import ReferenceRow, cached_lm
from mimo_jax.parity.rvq import DISTANCE_TOLERANCE, decided, margins
from mimo_jax.parity.sequences import Groups, read_ids, write_ids
from mimo_jax.parity.tokenizer import cached_codec, pad_to_groups, quantizer_inputs
from mimo_jax.text.tokenizers import load_text_tokenizer


def whole_calls(case: Case) -> None:
    """The recorded calls, greedy; all but a second turn in one batch."""
    lm, tokenizer = _models(case.root)
    config, params = cached_lm(lm / "model")
    codec = cached_codec(tokenizer / "model", reference_quirks=True)
    model = SpeechModel(Generator(config, params), codec, load_text_tokenizer(lm / "model"), prompts="chat")
    recorded = {call["name"]: call for call in read_json(case.folder / "pipeline.json")}
    wav = load_arrays(tokenizer / "single_inputs.npz")["wav"]
    calls = {call["name"]: call["kwargs"] for call in read_json(case.root / "prompts" / lm.name / "prompts.json")}
    requests = _requests(wav, calls, recorded)
    first = [name for name in requests if name != "history_turn2"]
    outputs = dict(zip(first, run_tasks(model, [requests[name] for name in first])[0], strict=True))
    if "history_turn2" in requests:
        second = dataclasses.replace(requests["history_turn2"], history=outputs["history_turn1"].history)
        outputs["history_turn2"] = run_tasks(model, [second])[0][0]

    row = ReferenceRow(config, params, {f"{name}/all_ids": case.expected[f"{name}/all_ids"] for name in outputs})
    prompt_decided = _prompts_decided(case, codec, requests, config)
    done: dict[str, tuple[np.ndarray, bool]] = {}
    nothing = np.zeros((1 + config.num_channels, 0), np.int64), True
    for name, output in outputs.items():
        before = done["history_turn1"] if name == "history_turn2" else nothing
        text = recorded[name]["returned_text"]
        done[name] = _compare(case, row, output, name, prompt_decided[name], text, before)


def _models(root: Path) -> tuple[Path, Path]:
    """The first language model and audio tokenizer that fit together."""
    for lm in sorted((root / "lm").iterdir()):
        sizes = read_lm_config(lm / "model").codebook_sizes
        for tokenizer in sorted((root / "tokenizer").iterdir()):
            if read_tokenizer_config(tokenizer / "model").rvq.codebook_sizes[: len(sizes)] == sizes:
                return lm, tokenizer
    raise ParityError(f"{root}: expected a language model and an audio tokenizer with the same codebooks")


def _requests(wav: np.ndarray, calls: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, TaskRequest]:
    """The recorded calls as ours; which part of the clip and which texts they got is said in the README."""
    shots = calls["icl_s2s"]
    transcription = shots["prompt_examples"][0]["output_transcription"]
    text = calls["tts_zh"]["text"]

    def wording(name: str, candidates: tuple[str, ...]) -> int:
        return candidates.index(recorded[name]["template"])

    requests = {
        "asr": lambda: TaskRequest(task="asr", audio=wav, template=wording("asr", asr_templates())),
        "tts": lambda: TaskRequest(task="tts", text=text, template=wording("tts", tts_templates(text))),
        "spoken_dialogue": lambda: TaskRequest(
            task="dialogue", audio=wav[:24000], system=calls["spoken_dialogue_system_prompt"]["system_prompt"]
        ),
        "icl": lambda: TaskRequest(
            task="few-shot",
            instruction=shots["instruction"],
            examples=((wav[:15000], wav[15000:40000], transcription),),
            audio=wav[20000:33333],
        ),
        "history_turn1": lambda: TaskRequest(task="dialogue", audio=wav[:20000]),
        "history_turn2": lambda: TaskRequest(task="dialogue", audio=wav[20000:45000]),
    }
    settings = GenerationSettings(
        max_seconds=1e6, text_sampling=GREEDY, patch_sampling=GREEDY, constrain=False, reference_quirks=True
    )
    return {
        name: dataclasses.replace(
            make(), settings=dataclasses.replace(settings, max_new=recorded[name]["max_new_tokens"])
        )
        for name, make in requests.items()
        if name in recorded
    }


def _compare(
    case: Case,
    row: ReferenceRow,
    output: SpeechOutput,
    name: str,
    prompt_decided: np.ndarray,
    text: str | None,
    before: tuple[np.ndarray, bool],
) -> tuple[np.ndarray, bool]:
    """One call. A near-tie excuses what comes after it, in the next turn too.

    Args:
        before: ids of the turns before, and whether no near-tie stood in the way so far.

    Returns:
        The same with this call.
    """
    config, (ids_before, sound) = row.config, before
    turn = output.history[-1]
    ids = write_ids(Groups.of_prompt(turn, config), config, len(turn.text) - output.positions)
    prompt_ids = ids[:, : (len(turn.text) - output.positions) * config.group_size]
    case.check(f"{name}/prompt_ids", prompt_ids, prompt_decided)
    expected = case.expected[f"{name}/prompt_ids"]
    sound = sound and np.array_equal(prompt_ids, expected)
    ids = np.concatenate([ids_before, ids], axis=1)
    begin = (ids_before.shape[1] + expected.shape[1]) // config.group_size
    sound = bool(row.check_answer(case, f"{name}/all_ids", ids, begin, sound=sound).all())
    case.check(f"{name}/decoder_codes", output.codes_MR.T, sound)
    case.check(f"{name}/wav", output.wav, sound)
    if text is not None:
        case.check_value(f"pipeline.json/{name}/returned_text", text, output.text, sound)
    return ids, sound


def _prompts_decided(
    case: Case, codec: Codec, requests: Mapping[str, TaskRequest], config: AudioLMConfig
) -> dict[str, np.ndarray]:
    """Where the codes in each prompt do not depend on a near-tie of the audio tokenizer: bool, as the ids."""
    clips = {
        name: [
            *(wav for given, reply, _ in r.examples for wav in (given, reply)),
            *([] if r.audio is None else [r.audio]),
        ]
        for name, r in requests.items()
    }
    inputs = iter(quantizer_inputs(codec, [wav for wavs in clips.values() for wav in wavs]))
    decided_ids = {}
    for name, wavs in clips.items():
        groups = read_ids(case.expected[f"{name}/prompt_ids"], config)
        codes_NR = groups.patches(config).reshape(-1, config.num_channels)
        parts, first = [np.zeros((0, config.num_channels), bool)], 0
        for z_MD in (next(inputs) for _ in wavs):
            gaps_MR = margins(codec.variables["codebook"], z_MD, codes_NR[first : first + len(z_MD)])
            parts.append(pad_to_groups(decided(gaps_MR, DISTANCE_TOLERANCE), config.group_size))
            first += len(parts[-1])
        ok_TGR = np.ones(groups.codes_TGR.shape, bool)
        ok_TGR[groups.text_T == config.empty_id] = np.concatenate(parts).reshape(-1, *ok_TGR.shape[1:])
        codes_ok = ok_TGR.reshape(-1, config.num_channels).T
        decided_ids[name] = np.concatenate([np.ones((1, codes_ok.shape[1]), bool), codes_ok])
    return decided_ids

"""Samplers, prompts of every task, and whole calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.config import AudioLMConfig
from mimo_jax.data.chat import Stream
from mimo_jax.generation.generate import Prompt
from mimo_jax.generation.prompts import Prompts, TaskPrompt, asr_templates, tts_templates
from mimo_jax.generation.sampling import (
    GREEDY,
    PATCHES,
    SamplingConfig,
    SamplingParams,
    process_logits,
    sample,
    sampling_params,
)
from mimo_jax.interop.published import read_lm_config
from mimo_jax.parity.harness import Case, read_json
from mimo_jax.parity.language_model import render_segments
from mimo_jax.parity.sequences import Groups, write_ids
from mimo_jax.text.tokenizers import load_text_tokenizer


def sampler(case: Case) -> None:
    """Scores after temperature, top-k and top-p, probabilities after the removal of ids, and the best id left."""
    inputs = case.inputs("inputs.npz")
    settings = json.loads(str(inputs["meta"]))
    for source in sorted({setting["logits"] for setting in settings}):
        numbers = [i for i, setting in enumerate(settings) if setting["logits"] == source]
        configs = [
            SamplingConfig(
                temperature=1.0 if settings[i]["temperature"] is None else settings[i]["temperature"],
                top_k=settings[i]["top_k"] or 0,
                top_p=settings[i]["top_p"] or 0.0,
            )
            for i in numbers
        ]
        logits_BV = np.stack([inputs[source]] * len(numbers))
        removed_BV = np.stack([np.isin(np.arange(logits_BV.shape[1]), settings[i]["removed"]) for i in numbers])
        processed_BV, probabilities_BV, best_B = _sampled(logits_BV, sampling_params(configs), removed_BV)
        for b, number in enumerate(numbers):
            case.check(f"setting{number:02d}/processed", processed_BV[b])
            case.check(f"setting{number:02d}/probs_after_removed", probabilities_BV[b])
            case.check(f"setting{number:02d}/greedy_token", best_B[b])


@jax.jit
def _sampled(logits_BV: jax.Array, params: SamplingParams, removed_BV: jax.Array) -> tuple[jax.Array, ...]:
    processed_BV = process_logits(logits_BV, params)
    keys_B = jax.random.split(jax.random.key(0), len(logits_BV))
    best_B = sample(keys_B, logits_BV, sampling_params([GREEDY] * len(logits_BV)), removed_BV)
    return processed_BV, jax.nn.softmax(jnp.where(removed_BV, -jnp.inf, processed_BV)), best_B


# ----------------------------------------------------------------------------------------------------------
# Prompts


def prompts(case: Case) -> None:
    """The prompt of every recorded call, with its wordings, stop ids and samplers."""
    model = case.root / "lm" / case.folder.name / "model"
    config, tokenizer = read_lm_config(model), load_text_tokenizer(model)
    codes = case.inputs("audio_codes.npz")
    _templates(case)
    for call in read_json(case.folder / "prompts.json"):
        task = _prompt(Prompts(tokenizer, config, "chat"), call, codes, config)
        if task is None:
            continue
        name = call["name"]
        ids = write_ids(Groups.of_prompt(task.prompt, config), config)
        case.check(name, ids)
        recorded = Groups.of_prompt(render_segments(call["segments"], codes, tokenizer, config), config)
        for key, expected, actual in (
            ("stop_token_ids", sorted(call["stop_token_ids"]), sorted(task.stop_ids)),
            ("global_sampler", _sampling(call["global_sampler"]), task.text_sampling),
            ("local_sampler", _sampling(call["local_sampler"]), PATCHES),
            ("segments", write_ids(recorded, config).tolist(), ids.tolist()),
        ):
            case.check_value(f"prompts.json/{name}/{key}", expected, actual)


def _templates(case: Case) -> None:
    lists = read_json(case.root / "prompts" / "templates.json")
    both = [*lists["asr_zh_templates"], *lists["asr_en_templates"]]
    case.check_value("templates.json/asr", both, [*asr_templates()])
    case.check_value("templates.json/tts_zh", lists["tts_zh_templates"], [*tts_templates("\u597d")])
    case.check_value("templates.json/tts_en", lists["tts_en_templates"], [*tts_templates("good")])


def _sampling(recorded: Mapping[str, Any]) -> SamplingConfig:
    if not recorded["do_sample"]:
        return GREEDY
    return SamplingConfig(recorded["temperature"], recorded["top_k"] or 0, recorded["top_p"] or 0.0)


def _prompt(
    prompts: Prompts, call: Mapping[str, Any], codes: Mapping[str, np.ndarray], config: AudioLMConfig
) -> TaskPrompt | None:
    """What we make of a call of the released interface; None if there is no such call."""

    def given(value: Any) -> Any:
        if isinstance(value, dict):
            return Stream(value["text"], given(value["audio"]))
        return codes[value[1:]] if isinstance(value, str) and value.startswith("@") else value

    lists = ("message_list", "prompt_examples")
    values = {key: given(value) for key, value in call["kwargs"].items() if key not in lists}
    turns = [given(message["content"]) for message in call["kwargs"].get("message_list", ())]
    system, voice, thinking = values.get("system_prompt"), values.get("prompt_speech"), values.get("thinking", False)
    # Of a turn with history, what is new was recorded.
    none = np.zeros((0, config.group_size, config.num_channels), np.int32)
    history = Prompt(np.zeros(0, np.int32), none) if call["history_present"] else None
    wording = (call["template"] or {}).get("text")

    def index(candidates: Sequence[str]) -> int | None:
        return None if wording is None else candidates.index(wording)

    match call["method"]:
        case "asr_sft":
            return prompts.asr(values["audio"], index(asr_templates()))
        case "tts_sft":
            text, instruction = values["text"], values.get("instruct")
            template = index(tts_templates(text))
            if not values.get("read_text_only", True):
                return prompts.instruct_tts(text, None, voice)
            if not instruction:
                return prompts.tts(text, template)
            return prompts.instruct_tts(text, instruction, voice, template)
        case "audio_understanding_sft":
            return prompts.understanding(values["input_speech"], values["input_text"], thinking)
        case "spoken_dialogue_sft":
            return prompts.spoken_dialogue([values["input_speech"]], system, voice, history)
        case "spoken_dialogue_sft_multiturn":
            return prompts.spoken_dialogue(turns, system, voice)
        case "speech2text_dialogue_sft" | "text_dialogue_sft":
            asked = values["input_speech"] if "input_speech" in values else values["input_text"]
            return prompts.written_dialogue([asked], thinking, history)
        case "speech2text_dialogue_sft_multiturn" | "text_dialogue_sft_multiturn":
            return prompts.written_dialogue(turns, thinking)
        case "in_context_learning_s2s":
            shots = [
                (given(x["input_audio"]), Stream(x["output_transcription"], given(x["output_audio"])))
                for x in call["kwargs"]["prompt_examples"]
            ]
            return prompts.few_shot(values["instruction"], shots, values["audio"])
    return None

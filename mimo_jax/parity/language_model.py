"""The language model: inputs, every layer, patch decoder, greedy patches, greedy generation and its stops.

All sequences of a file stand side by side in one packed row. What is asked of the patch decoder (teacher-forced, and
the margins of greedy decisions) is a batch of patches, each after a hidden state of that row.

T positions of a sequence, L of the row, N patches, G frames of a patch, R channels, S steps of the patch decoder.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.config import AudioLMConfig, ComputeConfig
from mimo_jax.data import chat
from mimo_jax.data.layouts import SpeechSpan, TextSpan
from mimo_jax.generation.generate import Generator, Prompt, Request
from mimo_jax.generation.patch_loop import decode_patches, patch_loop_params
from mimo_jax.generation.sampling import GREEDY, sampling_params
from mimo_jax.interop.published import load_lm
from mimo_jax.models.audio_lm import AudioLM, active_channels, unroll_params, unrolled
from mimo_jax.models.trace import traced
from mimo_jax.models.transformer import KVCache
from mimo_jax.parity.harness import Case
from mimo_jax.parity.sequences import Groups, one_row, read_ids, write_ids
from mimo_jax.rows import LMRows
from mimo_jax.text.tokenizers import TextTokenizer, load_text_tokenizer

cached_lm = functools.lru_cache(maxsize=2)(load_lm)


def whole(case: Case) -> None:
    """Everything of one language model except its training."""
    inputs = case.inputs("inputs.npz")
    meta = json.loads(str(inputs["meta"]))
    config, params = cached_lm(case.folder / "model")
    tokenizer = load_text_tokenizer(case.folder / "model")
    for name, segments in meta["inputs"].items():
        groups = Groups.of_prompt(render_segments(segments, inputs, tokenizer, config), config)
        case.check(f"{name}/input_ids", write_ids(groups, config))
    ids = {n: x for n, x in case.expected.items() if n.endswith("/input_ids") or "/full_ids" in n}
    row = ReferenceRow(config, params, ids)
    names = [n.removesuffix("/input_ids") for n in ids if n.endswith("/input_ids")]
    _layers(case, row, names)
    _teacher_forced(case, row, [n for n in names if f"{n}/tf_patch_positions" in case.entries])
    _greedy_patches(case, row, params, [n for n in names if f"{n}/greedy_local_positions" in case.entries])
    _generation(case, row, params, f"{meta['gen_from']}/input_ids", meta["gen_new"])


def render_segments(
    segments: Sequence[Mapping[str, Any]],
    codes: Mapping[str, np.ndarray],
    tokenizer: TextTokenizer,
    config: AudioLMConfig,
) -> Prompt:
    """Recorded segments (`type` text, audio or streaming), rendered as ours."""
    special = re.compile(f"({'|'.join(map(re.escape, tokenizer.special))})")
    spans: list[TextSpan | SpeechSpan] = []
    for segment in segments:
        ours: chat.Segment
        if segment["type"] == "text":
            parts = (chat.Special(p) if p in tokenizer.special else p for p in special.split(segment["text"]) if p)
            ours = chat.Text(tuple(parts))
        elif segment["type"] == "audio":
            ours = chat.Speech(codes[segment["audio"]])
        else:
            ours = chat.Stream(segment["text"], codes[segment["audio"]])
        rendered = chat.render([ours], tokenizer, config.group_size, config.num_channels)
        spans += rendered if segment.get("add_sosp_eosp", True) else rendered[1:-1]
    return Prompt.of(spans, config)


class ReferenceRow:
    """Reference sequences in one row, and what the model makes of it.

    Attributes:
        groups: of each sequence, by name.
        places: where in the row it lies.
        h_LD, logits_LV, local_LP: hidden states, text logits and inputs of the patch decoder.
        trace: of the call.
    """

    def __init__(self, config: AudioLMConfig, params: Any, ids: Mapping[str, np.ndarray]) -> None:
        self.config = config
        self.model = AudioLM(config, unrolled(ComputeConfig()))
        self.variables = {"params": unroll_params(params, config)}
        self.groups = {name: read_ids(x, config) for name, x in ids.items()}
        self.rows, places = one_row([*self.groups.values()], config)
        self.places = dict(zip(ids, places, strict=True))
        heads, self.trace = traced(self.model, self.variables, self.rows, method=_heads)
        self.h_LD, self.logits_LV, self.local_LP = map(np.asarray, heads)
        # Decisions of a patch in the order in which they are made: step, frame and channel.
        self.decisions = [
            (step, step - delay, r)
            for step in range(config.num_steps)
            for r, delay in enumerate(config.delays)
            if 0 <= step - delay < config.group_size
        ]

    def teacher_forced(self, before_N: np.ndarray, codes_NGR: np.ndarray) -> tuple[Any, Any, list[np.ndarray]]:
        """Inputs and hidden states [N, S, P] and logits [N, S, V_r] of the patch decoder.

        Args:
            before_N: row position of the hidden state before each patch.
        """
        N = len(before_N)
        count = max(1, -(-N // 32)) * 32  # one compiled program serves all
        before_N, codes_NGR = (np.resize(x, (count, *x.shape[1:])) for x in (before_N, codes_NGR))
        args = self.h_LD[before_N], codes_NGR.astype(np.int32)
        logits_R, trace = traced(self.model, self.variables, *args, method=_all_steps)
        decoder = "patch_decoder/transformer"
        return trace.given(decoder)[:N], trace.result(decoder)[:N], [np.asarray(x)[:N] for x in logits_R]

    def gaps(self, before_N: np.ndarray, codes_NGR: np.ndarray) -> np.ndarray:
        """Gap between the best two scores of every decision of greedy patches [N, decisions]."""
        logits_R = self.teacher_forced(before_N, codes_NGR)[2]
        return np.stack([_top_gap(logits_R[r][:, step, :-1]) for step, _, r in self.decisions], axis=1)

    def check_answer(
        self,
        case: Case,
        name: str,
        ids: np.ndarray,
        begin: int,
        stops: Sequence[int] = (),
        min_new: int = 0,
        sound: bool = True,
    ) -> np.ndarray:
        """Compares generated ids and the margins of their decisions, which follow the reference's way.

        Args:
            name: of the ids, `FOLDER/full_ids...` or `FOLDER/all_ids`.
            ids: ours, of all groups.
            begin: group at which the answer begins.
            stops: ids that are not drawn in the first `min_new` groups.
            min_new: see there.
            sound: whether nothing before excuses a difference.

        Returns:
            bool [2, groups of the answer]: whether text and codes follow from decisions that all have a margin.
        """
        G, place, groups = self.config.group_size, self.places[name], self.groups[name]
        folder, suffix = re.fullmatch(r"(.*)/(?:full|all)_ids(.*)", name).groups()  # type: ignore[union-attr]
        scores = np.array(self.logits_LV[place][begin - 1 :])
        case.check(f"{folder}/onepass_text_logits_on_generated{suffix}", scores)
        scores[:min_new, list(stops)] = -np.inf
        text_gaps = _top_gap(scores[:-1])
        is_patch = groups.text_T[begin:] == self.config.empty_id
        at = begin + np.flatnonzero(is_patch)
        local_gaps = self.gaps(place.start + at - 1, groups.codes_TGR[at])
        case.check(f"{folder}/text_margins{suffix}", text_gaps)
        case.check(f"{folder}/local_margins{suffix}", local_gaps.reshape(-1))

        def tolerance(margins: str) -> float:
            """Of margins that may be recorded for this answer, for one like it, or for that of `generate` alone."""
            places = (f"{folder}/{margins}{suffix}", f"{folder}/{margins}", f"generate/{margins}")
            return next((case.atol(place) for place in places if place in case.entries), 0.0)

        text_ok, codes_ok = text_gaps > tolerance("text_margins"), np.ones(len(text_gaps), bool)
        codes_ok[is_patch] = (local_gaps > tolerance("local_margins")).all(axis=1)
        all_ok = np.logical_and.accumulate(text_ok & codes_ok & sound)
        text_ok = text_ok & np.concatenate([[sound], all_ok[:-1]])
        expected = case.expected[name]
        decided = np.ones(expected.shape, bool)
        decided[0, begin * G :], decided[1:, begin * G :] = np.repeat(text_ok, G), np.repeat(all_ok, G)
        if not all_ok.all() and ids.shape != expected.shape:  # after a near-tie it may be of another length
            ids = np.pad(ids, ((0, 0), (0, expected.shape[1])), constant_values=-1)[:, : expected.shape[1]]
        case.check(name, ids, decided)
        return np.stack([text_ok, all_ok])


def _top_gap(scores: np.ndarray) -> np.ndarray:
    best = np.partition(scores, -2, axis=-1)
    return best[..., -1] - best[..., -2]


def _heads(model: AudioLM, rows: LMRows) -> tuple[jax.Array, jax.Array, jax.Array]:
    h_LD = model(rows)[0]
    return h_LD, model.text_head(h_LD), model.start_patch(h_LD)


def _all_steps(model: AudioLM, h_ND: jax.Array, codes_NGR: jax.Array) -> list[jax.Array]:
    y_NSP = model.patch_hidden(h_ND, codes_NGR)
    return [model.channel_logits(y_NSP, r) for r in range(model.config.num_channels)]


def _layers(case: Case, row: ReferenceRow, names: Sequence[str]) -> None:
    def at_patches(x_C: Any) -> np.ndarray:
        out = np.zeros((len(row.h_LD), *x_C.shape[1:]), np.float32)
        out[row.rows.patch_positions_BC[0]] = x_C
        return out

    trace, encoded = row.trace, row.trace.result("patch_encoder/transformer")
    arrays = {
        "patch_encoder_in": at_patches(trace.given("patch_encoder/transformer")),
        "patch_encoder_out_masked": at_patches(encoded.reshape(len(encoded), -1)),
        "patch_embeds": at_patches(trace.result("patch_encoder")),
        "input_embeds": trace.given("llm/transformer")[0],
        "llm_final_norm": row.h_LD,
        "text_logits": row.logits_LV,
        "local_hidden": row.local_LP,
    }
    for i in range(row.config.llm.num_layers):
        arrays[f"llm_layer_{i + 1:02d}"] = trace.result(f"llm/transformer/layers_{i}")[0]
    for name in names:
        place = row.places[f"{name}/input_ids"]
        for array, x in arrays.items():
            case.check(f"{name}/{array}", x[place])
        case.check(f"{name}/forward_last_text_logits", row.logits_LV[place][-1])
        case.check(f"{name}/forward_last_local_hidden", row.local_LP[place][-1])


def _asked(
    case: Case, row: ReferenceRow, names: Sequence[str], array: str
) -> tuple[np.ndarray, np.ndarray, dict[str, slice]]:
    """Sequence and row positions that `array` of each sequence names, joined, and where each sequence's are."""
    at = [case.use(f"{name}/{array}") for name in names]
    ends = np.cumsum([len(x) for x in at])
    mine = {name: slice(end - len(x), end) for name, x, end in zip(names, at, ends, strict=True)}
    starts = [row.places[f"{name}/input_ids"].start for name in names]
    return np.concatenate(at), np.concatenate([s + x for s, x in zip(starts, at, strict=True)]), mine


def _teacher_forced(case: Case, row: ReferenceRow, names: Sequence[str]) -> None:
    if not names:
        return
    c = row.config
    at_N, row_N, of = _asked(case, row, names, "tf_patch_positions")
    codes_NGR = np.concatenate([row.groups[f"{n}/input_ids"].codes_TGR[at_N[mine]] for n, mine in of.items()])
    x_NSP, y_NSP, logits_R = row.teacher_forced(row_N - 1, codes_NGR)
    frames_SR = np.clip(np.arange(c.num_steps)[:, None] - np.array(c.delays), 0, c.group_size - 1)
    codes_NSR = codes_NGR[:, frames_SR, np.arange(c.num_channels)].astype(np.int32)
    stepwise_R = _cached_steps(row.model, row.variables, row.h_LD[row_N - 1], codes_NSR)
    for name, mine in of.items():
        case.check(f"{name}/tf_codes", codes_NGR[mine])
        case.check(f"{name}/tf_local_inputs", x_NSP[mine])
        case.check(f"{name}/tf_local_hidden", y_NSP[mine])
        for r, x in enumerate(logits_R):
            case.check(f"{name}/tf_logits_ch{r}", x[mine])
        difference = max(np.abs(a[mine] - b[mine]).max() for a, b in zip(logits_R, stepwise_R, strict=True))
        case.check(f"{name}/tf_parallel_vs_cached_maxdiff", difference)


@functools.partial(jax.jit, static_argnums=0)
def _cached_steps(model: AudioLM, variables: Any, h_ND: jax.Array, codes_NSR: jax.Array) -> list[jax.Array]:
    """Logits [N, S, V_r] of the same steps, one after the other with a cache; `codes_NSR` are those of each step."""
    c = model.config

    def one(carry: tuple[jax.Array, KVCache], step: Any) -> tuple[tuple[jax.Array, KVCache], Any]:
        logits_R, cache = model.apply(variables, carry[0], carry[1], method="patch_decoder_step")
        active_R = active_channels(c, step)
        return (model.apply(variables, codes_NSR[:, step], active_R, method="embed_codes"), cache), logits_R

    cache = KVCache.zeros(c.patch_decoder, len(h_ND), c.num_steps, jnp.float32)
    start = model.apply(variables, h_ND, method="start_patch"), cache
    return [jnp.swapaxes(x, 0, 1) for x in jax.lax.scan(one, start, jnp.arange(c.num_steps))[1]]


def _greedy_patches(case: Case, row: ReferenceRow, params: Any, names: Sequence[str]) -> None:
    if not names:
        return
    _, row_N, of = _asked(case, row, names, "greedy_local_positions")
    codes_NGR = np.asarray(_decode_greedily(row.config, params, row.h_LD[row_N]))
    gaps_ND = row.gaps(row_N, np.concatenate([case.expected[f"{name}/greedy_local_tokens"] for name in names]))
    for name, mine in of.items():
        case.check(f"{name}/greedy_local_margins", gaps_ND[mine])
        clear_ND = np.logical_and.accumulate(gaps_ND[mine] > case.atol(f"{name}/greedy_local_margins"), axis=1)
        decided_NGR = np.zeros(codes_NGR[mine].shape, bool)
        for i, (_, frame, r) in enumerate(row.decisions):
            decided_NGR[:, frame, r] = clear_ND[:, i]
        case.check(f"{name}/greedy_local_tokens", codes_NGR[mine], decided_NGR)


@functools.partial(jax.jit, static_argnums=0)
def _decode_greedily(config: AudioLMConfig, params: Any, h_ND: jax.Array) -> jax.Array:
    keys = jax.random.split(jax.random.key(0), len(h_ND))
    params = {"patch_loop": patch_loop_params(params, config), "patch_encoder": params["patch_encoder"]}
    return decode_patches(config, ComputeConfig(), params, h_ND, keys, sampling_params([GREEDY] * len(h_ND)))


def _generation(case: Case, row: ReferenceRow, params: Any, start: str, new: int) -> None:
    """Answers of at most `new` groups to the input `start`: free, with a stop id, with one that is held back."""
    stop, min_new = (
        int(case.use(f"generate_stop/{n}")) if f"generate_stop/{n}" in case.entries else 0
        for n in ("stop_token", "min_new")
    )
    settings: dict[str, tuple[tuple[int, ...], int]] = {
        "generate/full_ids": ((), 0),
        "generate_stop/full_ids": ((stop,), 0),
        "generate_stop/full_ids_min_new": ((stop,), min_new),
    }
    names = [name for name in settings if name in case.entries]
    if not names:
        return
    prompt = Prompt(row.groups[start].text_T, row.groups[start].patches(row.config))
    requests = [Request(prompt, new, *settings[name], text_sampling=GREEDY, patch_sampling=GREEDY) for name in names]
    begin = len(prompt.text)
    for name, result in zip(names, Generator(row.config, params).generate(requests)[0], strict=True):
        groups = Groups.of_prompt(prompt + Prompt(result.text, result.patches), row.config)
        text_ok, _ = row.check_answer(case, name, write_ids(groups, row.config, begin), begin, *settings[name])
        if name == "generate/full_ids":
            case.check("generate/new_text", result.text, text_ok)

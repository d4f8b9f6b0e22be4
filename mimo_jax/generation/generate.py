"""Batched generation of text and patches: prefill once, then one jitted loop over positions with a KV cache.

Every position starts with the text head. Where it says `<|empty|>`, the patch decoder writes a patch for that request
and the patch encoder turns it into the next input; elsewhere the text embedding is the next input. Requests of a batch
may differ in prompt, lengths, stop ids, forced ids, samplers and seed; what one yields does not depend on the others:
bit for bit where the padded sizes (`Bucket`) are the same, up to the rounding of sums where they are not.

Axes: B requests, P prompt positions, C prompt patches, N new positions, V vocabulary, D width, G frames of a patch,
R channels.
Source: released inference code (generation loop, `min_new` and stop ids); report section 2.2 (delays).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.config import AudioLMConfig, ComputeConfig, ConfigError
from mimo_jax.data.layouts import SpeechSpan, TextSpan
from mimo_jax.generation.patch_loop import decode_patches, for_one_request, patch_loop_params
from mimo_jax.generation.sampling import (
    DEFAULT_TEXT,
    GREEDY,
    PATCHES,
    SamplingConfig,
    SamplingParams,
    sample,
    sampling_params,
)
from mimo_jax.models.audio_lm import AudioLM, unroll_params, unrolled
from mimo_jax.models.transformer import KVCache, join_projections

Array = jax.Array


@dataclass(frozen=True)
class Prompt:
    """What a request starts from."""

    text: np.ndarray  # int32 [P], text ids, `<|empty|>` where a patch stands
    patches: np.ndarray  # integer [C, G, R], the codes of those patches in order

    @classmethod
    def of(cls, spans: Iterable[TextSpan | SpeechSpan], config: AudioLMConfig) -> Prompt:
        """What `data.chat.render` gives."""
        spans = list(spans)
        text = [s.ids if isinstance(s, TextSpan) else np.full(len(s), config.empty_id, np.int32) for s in spans]
        patches = [s.patches_NGR.astype(np.int32) for s in spans if isinstance(s, SpeechSpan)]
        none = np.zeros((0, config.group_size, config.num_channels), np.int32)
        return cls(np.concatenate(text), np.concatenate([none, *patches]))

    def __add__(self, other: Prompt) -> Prompt:
        """What stands first, then what follows."""
        return Prompt(np.concatenate([self.text, other.text]), np.concatenate([self.patches, other.patches]))


@dataclass(frozen=True)
class Request:
    """One continuation to generate."""

    prompt: Prompt  # at least one position
    max_new: int  # positions to generate at most (text ids and patches together)
    stop_ids: tuple[int, ...]  # text ids that end the request; the one that does is part of the result
    min_new: int = 0  # stop ids are not drawn before this many new positions
    # The only text ids that may be drawn, int32 or a tuple (`<|empty|>` among them, if patches may come); None allows
    # all.
    allowed_ids: np.ndarray | tuple[int, ...] | None = None
    # Text ids of the first new positions whatever the model says; -1 leaves a position to it. A forced `<|empty|>` is a
    # patch that the patch decoder writes.
    forced_ids: tuple[int, ...] = ()
    text_sampling: SamplingConfig = DEFAULT_TEXT  # sampler of the text head
    patch_sampling: SamplingConfig = PATCHES  # sampler of the patch decoder
    seed: int = 0  # all draws of the request follow from it


@dataclass(frozen=True)
class Generated:
    """What a request yielded."""

    text: np.ndarray  # int32 [n], the new positions in order, `<|empty|>` where a patch stands
    patches: np.ndarray  # int32 [patches, G, R], the new patches in order
    stop_id: int | None  # the stop id that ended the request, None where `max_new` did


@dataclass(frozen=True)
class Timing:
    """Wall seconds of calls, which can be added up."""

    encode_seconds: float = 0.0  # audio tokenizer, waves to codes; like vocoding only where waves are asked for
    compile_seconds: float = 0.0  # compilation of the language model's programs
    prefill_seconds: float = 0.0  # prompts through the language model
    decode_seconds: float = 0.0  # new positions
    vocode_seconds: float = 0.0  # audio tokenizer, codes to waves
    positions: int = 0  # new positions
    patches: int = 0  # new patches
    audio_seconds: float = 0.0  # speech generated

    def __add__(self, other: Timing) -> Timing:
        return Timing(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))

    @property
    def patches_per_second(self) -> float:
        return self.patches / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def real_time_factor(self) -> float | None:
        """Seconds of work per second of speech, without compilation; None without speech."""
        work = self.encode_seconds + self.prefill_seconds + self.decode_seconds + self.vocode_seconds
        return work / self.audio_seconds if self.audio_seconds else None


class Bucket(NamedTuple):
    """Padded sizes that one pair of compiled programs serves: rows, prompt positions, prompt patches, new positions."""

    requests: int
    prompt: int
    patches: int
    new: int


class _Batch(NamedTuple):
    """Requests as arrays. Rows beyond the requests hold one position and generate nothing."""

    text_BP: Any
    patches_BCGR: Any
    patch_positions_BC: Any  # P = unused slot
    lengths_B: Any
    max_new_B: Any
    min_new_B: Any
    removed_BV: Any  # bool, ids that are never drawn
    stops_BV: Any  # bool
    forced_BN: Any  # -1 = free
    seeds_B: Any  # uint32
    text: SamplingParams
    patch: SamplingParams


class _Output(NamedTuple):
    """What the decoding loop has written so far."""

    counts_B: Any  # new positions
    done_B: Any
    stopped_B: Any  # a stop id has been drawn
    text_BN: Any
    patches_BNGR: Any


class Generator:
    """A language model ready to generate: parameters on the device, and the programs compiled so far.

    Lengths are rounded up to few sizes, so that requests of similar size share a compiled program. On a CPU the scanned
    layers are split, because streaming stacked weights through a scan is several times slower there, and projections of
    the same input are joined.
    """

    def __init__(
        self,
        config: AudioLMConfig,
        params: Any,
        compute: ComputeConfig | None = None,
        text_vocab_size: int | None = None,
        max_positions: int = 32_768,
        platform: str | None = None,
    ) -> None:
        """
        Args:
            params: parameter tree of `AudioLM`, as training leaves it (layers stacked if `compute.scan_layers`); an
                empty one makes a generator whose programs can only be lowered.
            compute: precision that the model was trained with.
            text_vocab_size: ids from here on are rows that no text token uses; they are never drawn.
            max_positions: prompt and new positions of a request at most, which bounds the KV cache.
            platform: what the programs are for; by default what is here.
        """
        compute = dataclasses.replace(compute or ComputeConfig(), remat="none")
        self._on_cpu = (platform or jax.default_backend()) == "cpu"
        self._splits = self._on_cpu and compute.scan_layers
        self.config = config
        self.compute = unrolled(compute) if self._splits else compute
        self.params = self.prepared(params) if params else params
        self.text_vocab_size = config.vocab_size if text_vocab_size is None else text_vocab_size
        self.max_positions = max_positions
        self._model = AudioLM(config, self.compute)
        self._programs: dict[Any, tuple[Any, Any]] = {}

    def generate(self, requests: Sequence[Request], bucket: Bucket | None = None) -> tuple[list[Generated], Timing]:
        """Runs all requests as one batch.

        Args:
            requests: at least one. A batch costs what its longest prompt and its longest answer cost.
            bucket: padded sizes; by default the smallest that hold the requests.

        Returns:
            One result per request, in order, and the time it took.

        Raises:
            ConfigError: a request is impossible (empty prompt, ids outside the vocabulary, no id left to draw, ...) or
                does not fit the bucket.
        """
        if not requests:
            raise ConfigError("requests: expected at least one")
        for number, request in enumerate(requests):
            try:
                self.check(request)
            except ConfigError as error:
                raise ConfigError(f"request {number}: {error}") from None
        bucket = self.bucket_of(requests, bucket)
        batch = jax.device_put(self.arrays(requests, bucket))
        started = time.perf_counter()
        params = self._params_of_one if self._on_cpu and bucket.requests == 1 else self.params
        prefill, decode = self._compiled(params, batch, bucket.new)
        compiled = time.perf_counter()
        h_BD, cache = jax.block_until_ready(prefill(params, batch))
        prefilled = time.perf_counter()
        end = jax.device_get(decode(params, batch, h_BD, cache)[0])
        decoded = time.perf_counter()
        results = [self._result(end, b) for b in range(len(requests))]
        timing = Timing(
            compile_seconds=compiled - started,
            prefill_seconds=prefilled - compiled,
            decode_seconds=decoded - prefilled,
            positions=sum(len(r.text) for r in results),
            patches=sum(len(r.patches) for r in results),
        )
        return results, timing

    def bucket_of(self, requests: Sequence[Request], bucket: Bucket | None = None) -> Bucket:
        """The smallest bucket that holds some requests, or the given one; raises ConfigError if they do not fit it."""
        prompt = _round_up(max(len(r.prompt.text) for r in requests))
        patches = max(len(r.prompt.patches) for r in requests)
        smallest = Bucket(
            requests=1 << (len(requests) - 1).bit_length(),
            prompt=prompt,
            patches=min(prompt, _round_up(patches)) if patches else 0,
            new=_round_up(max(r.max_new for r in requests)),
        )
        bucket = bucket or smallest
        if any(have < need for have, need in zip(bucket, smallest, strict=True)):
            raise ConfigError(f"bucket: expected at least {smallest}, got {bucket}")
        return bucket

    def prepared(self, params: Any) -> Any:
        """Parameters of `AudioLM` as the programs read them: those of the patch decoder under `patch_loop`."""
        stored = functools.partial(jax.tree_util.tree_map_with_path, self._stored)
        loop = stored(patch_loop_params(params, self.config))
        if self._splits:
            params = unroll_params(params, self.config)
        groups = {group: stored(params[group]) for group in ("llm", "patch_encoder")}
        # Elsewhere the caller's weights and these shall be the same arrays: on an accelerator there may be no room for
        # two LLMs.
        if self._on_cpu:
            groups = {name: _joined(group) for name, group in groups.items()}
        return groups | {"patch_loop": loop}

    def _stored(self, path: Any, x: Array) -> Array:
        """A parameter in the dtype that it is used in. Norms compute in float32, so their scales stay as they are."""
        is_norm = any(str(getattr(key, "key", "")).startswith("norm") for key in path)
        return jnp.asarray(x) if is_norm else jnp.asarray(x, self.compute.dtype)

    # ------------------------------------------------------------------------------------------------------
    # Requests to arrays and back

    def check(self, request: Request) -> None:
        """Raises ConfigError for an impossible request, with the setting and what is expected."""
        c, prompt = self.config, request.prompt

        def require(condition: bool, setting: str, expected: str) -> None:
            if not condition:
                raise ConfigError(f"{setting}: expected {expected}")

        text, patches = np.asarray(prompt.text), np.asarray(prompt.patches)
        require(text.ndim == 1 and len(text) > 0, "prompt.text", "at least one position")
        require(text.min() >= 0 and text.max() < c.vocab_size, "prompt.text", f"ids in 0..{c.vocab_size - 1}")
        shape = (int((text == c.empty_id).sum()), c.group_size, c.num_channels)
        expected = f"shape {shape} (one patch for each <|empty|>), got {patches.shape}"
        require(patches.shape == shape, "prompt.patches", expected)
        for r, size in enumerate(c.codebook_sizes):
            codes = patches[..., r]
            inside = codes.size == 0 or 0 <= codes.min() <= codes.max() < size
            require(inside, "prompt.patches", f"codes of channel {r} in 0..{size - 1}")
        require(request.max_new > 0, "max_new", "a positive number of positions")
        positions = len(text) + request.max_new
        limit = f"at most {self.max_positions} positions in prompt and answer, got {len(text)} + {request.max_new}"
        require(positions <= self.max_positions, "max_positions", limit)
        require(0 <= request.min_new <= request.max_new, "min_new", f"0..max_new ({request.max_new})")
        drawn = np.arange(self.text_vocab_size) if request.allowed_ids is None else np.asarray(request.allowed_ids)
        stops, forced = np.asarray(request.stop_ids), np.asarray(request.forced_ids)
        for setting, ids in (("allowed_ids", drawn), ("stop_ids", stops), ("forced_ids", forced[forced != -1])):
            inside = ids.size == 0 or 0 <= ids.min() <= ids.max() < c.vocab_size
            require(bool(inside), setting, f"ids in 0..{c.vocab_size - 1}")
        require(drawn.size > 0, "allowed_ids", "at least one id")
        goes_on = request.min_new == 0 or not np.isin(drawn, stops).all()
        require(goes_on, "allowed_ids", "an id that does not stop, for min_new")
        require(0 <= request.seed < 2**32, "seed", "an integer in 0..2^32-1")

    def arrays(self, requests: Sequence[Request], bucket: Bucket) -> _Batch:
        """Requests as the programs take them, padded to a bucket that holds them; NumPy arrays."""
        c = self.config
        B, P, C, N = bucket
        text_BP = np.zeros((B, P), np.int32)
        patches_BCGR = np.zeros((B, C, c.group_size, c.num_channels), np.int32)
        patch_positions_BC = np.full((B, C), P, np.int32)
        removed_BV = np.zeros((B, c.vocab_size), bool)
        removed_BV[:, self.text_vocab_size :] = True
        stops_BV = np.zeros((B, c.vocab_size), bool)
        forced_BN = np.full((B, N), -1, np.int32)
        for b, request in enumerate(requests):
            text, patches = np.asarray(request.prompt.text), np.asarray(request.prompt.patches)
            text_BP[b, : len(text)] = text
            patches_BCGR[b, : len(patches)] = patches
            patch_positions_BC[b, : len(patches)] = np.flatnonzero(text == c.empty_id)
            if request.allowed_ids is not None:
                removed_BV[b] = True
                removed_BV[b, np.asarray(request.allowed_ids)] = False
            stops_BV[b, list(request.stop_ids)] = True
            forced = request.forced_ids[: request.max_new]
            forced_BN[b, : len(forced)] = forced
        spare = B - len(requests)
        return _Batch(
            text_BP=text_BP,
            patches_BCGR=patches_BCGR,
            patch_positions_BC=patch_positions_BC,
            lengths_B=np.asarray([len(r.prompt.text) for r in requests] + [1] * spare, np.int32),
            max_new_B=np.asarray([r.max_new for r in requests] + [0] * spare, np.int32),
            min_new_B=np.asarray([r.min_new for r in requests] + [0] * spare, np.int32),
            removed_BV=removed_BV,
            stops_BV=stops_BV,
            forced_BN=forced_BN,
            seeds_B=np.asarray([r.seed for r in requests] + [0] * spare, np.uint32),
            text=sampling_params([r.text_sampling for r in requests] + [GREEDY] * spare),
            patch=sampling_params([r.patch_sampling for r in requests] + [GREEDY] * spare),
        )

    def _result(self, end: _Output, b: int) -> Generated:
        text = end.text_BN[b, : end.counts_B[b]]
        patches = end.patches_BNGR[b, : end.counts_B[b]][text == self.config.empty_id]
        return Generated(text=text, patches=patches, stop_id=int(text[-1]) if end.stopped_B[b] else None)

    @functools.cached_property
    def _params_of_one(self) -> Any:
        return {**self.params, "patch_loop": for_one_request(self.params["patch_loop"])}

    def _compiled(self, params: Any, batch: _Batch, new: int) -> tuple[Any, Any]:
        key = (*batch.text_BP.shape, batch.patches_BCGR.shape[1], new)
        if key not in self._programs:
            prefill, decode = self.lowered(params, batch, new)
            self._programs[key] = (prefill.compile(), decode.compile())
        return self._programs[key]

    def lowered(self, params: Any, batch: Any, new: int, platforms: tuple[str, ...] | None = None) -> tuple[Any, Any]:
        """The two programs for arrays of such shapes, lowered: for what is here, or for other platforms."""
        prefill = jax.jit(self._prefill, static_argnums=2).trace(params, batch, new)
        h_BD, cache = jax.eval_shape(lambda p, b: self._prefill(p, b, new), params, batch)
        decode = jax.jit(self._decode, static_argnums=4, donate_argnums=3).trace(params, batch, h_BD, cache, new)
        return prefill.lower(lowering_platforms=platforms), decode.lower(lowering_platforms=platforms)

    # ------------------------------------------------------------------------------------------------------
    # The two programs

    def _apply(self, params: Any, method: Any, *arguments: Any, **keywords: Any) -> Any:
        return self._model.apply({"params": params}, *arguments, method=method, **keywords)

    def _prefill(self, params: Any, batch: _Batch, new: int) -> tuple[Array, KVCache]:
        """Runs the prompts; returns the hidden state after each prompt's last position, and the cache."""
        B, P = batch.text_BP.shape
        x_BPD = self._apply(params, AudioLM.embed, batch.text_BP, batch.patches_BCGR, batch.patch_positions_BC)
        cache = KVCache.zeros(self.config.llm, B, P + new, x_BPD.dtype)
        valid_BP = jnp.arange(P) < batch.lengths_B[:, None]
        h_BPD, cache = self._apply(params, AudioLM.hidden, x_BPD, cache=cache, cache_valid_BL=valid_BP)
        h_BD = jnp.take_along_axis(h_BPD, (batch.lengths_B - 1)[:, None, None], axis=1)[:, 0]
        return h_BD, cache

    def _decode(self, params: Any, batch: _Batch, h_BD: Array, cache: KVCache, new: int) -> tuple[_Output, KVCache]:
        """Generates until every request has stopped or has its `max_new` positions. `h_BD` predicts the first one.

        The cache is returned so that the loop can work in the memory of the one it was given.
        """
        c, B = self.config, h_BD.shape[0]
        request_keys_B = jax.vmap(jax.random.key)(batch.seeds_B)
        patch_shape = (c.group_size, c.num_channels)

        def body(carry: tuple[Array, Array, KVCache, _Output]) -> tuple[Array, Array, KVCache, _Output]:
            position, h_BD, cache, out = carry
            keys_B = jax.vmap(jax.random.fold_in, (0, None))(request_keys_B, position)
            removed_BV = batch.removed_BV | (batch.stops_BV & (out.counts_B < batch.min_new_B)[:, None])
            drawn_B = sample(keys_B, self._apply(params, AudioLM.text_head, h_BD), batch.text, removed_BV)
            forced_B = jax.lax.dynamic_index_in_dim(batch.forced_BN, position, axis=1, keepdims=False)
            ids_B = jnp.where(forced_B >= 0, forced_B, drawn_B)
            is_patch_B = (ids_B == c.empty_id) & ~out.done_B
            text_x_BD = self._apply(params, AudioLM.embed_text, ids_B[:, None])[:, 0]

            def patch() -> tuple[Array, Array]:
                patches_BGR = decode_patches(c, self.compute, params, h_BD, keys_B, batch.patch)
                return patches_BGR, self._apply(params, AudioLM.embed_patches, patches_BGR)

            nothing = jnp.zeros((B, *patch_shape), jnp.int32), text_x_BD
            patches_BGR, patch_x_BD = jax.lax.cond(jnp.any(is_patch_B), patch, lambda: nothing)
            x_BD = jnp.where(is_patch_B[:, None], patch_x_BD, text_x_BD)

            counts_B = out.counts_B + ~out.done_B
            is_stop_B = jnp.take_along_axis(batch.stops_BV, ids_B[:, None], axis=1)[:, 0]
            stopped_B = out.stopped_B | (is_stop_B & ~out.done_B)
            update = jax.lax.dynamic_update_slice_in_dim
            out = _Output(
                counts_B=counts_B,
                done_B=out.done_B | stopped_B | (counts_B >= batch.max_new_B),
                stopped_B=stopped_B,
                text_BN=update(out.text_BN, ids_B[:, None], position, axis=1),
                patches_BNGR=update(out.patches_BNGR, patches_BGR[:, None], position, axis=1),
            )
            # Finished requests run along, but their caches do not grow, so nothing is written beyond the last slot.
            valid_B1 = ~out.done_B[:, None]
            h_B1D, cache = self._apply(params, AudioLM.hidden, x_BD[:, None], cache=cache, cache_valid_BL=valid_B1)
            return position + 1, h_B1D[:, 0], cache, out

        out = _Output(
            counts_B=jnp.zeros(B, jnp.int32),
            done_B=batch.max_new_B == 0,
            stopped_B=jnp.zeros(B, bool),
            text_BN=jnp.zeros((B, new), jnp.int32),
            patches_BNGR=jnp.zeros((B, new, *patch_shape), jnp.int32),
        )
        start = (jnp.int32(0), h_BD, cache, out)
        _, _, cache, out = jax.lax.while_loop(lambda carry: ~jnp.all(carry[3].done_B), body, start)
        return out, cache


def _joined(group: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a group whose stack has its projections joined."""
    stack = group["transformer"]
    layers = {name: join_projections(stack[name]) for name in stack if name.startswith("layers")}
    return {**group, "transformer": {**stack, **layers}}


def _round_up(n: int) -> int:
    """The size that lengths up to it share: multiples of 32, from 512 on of an eighth of the power of two below."""
    step = 32 if n <= 512 else 1 << (n.bit_length() - 4)
    return -(-n // step) * step

"""The patch decoder at generation: all steps of a patch in one loop, over weights laid out for it.

A step of B requests is latency and memory traffic, hardly arithmetic. So the layers are split rather than stacked; q, k
and v, gate and up, and the heads of all channels are one matrix each; the audio tables are projected to the decoder's
width beforehand; and what lies between two steps, draws and embeddings, is one kernel.

Axes: B requests, T steps of a patch, G frames, R channels, V rows of all audio tables, P width, N query heads, K key
heads, M query heads of a key head, H head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mimo_jax.config import AudioLMConfig, ComputeConfig, TransformerConfig
from mimo_jax.generation.sampling import SamplingParams
from mimo_jax.kernels.delay_sample import delay_sample
from mimo_jax.models.attention import rope_tables, rotate
from mimo_jax.models.transformer import Norm, join_projections, unstack_layers

Array = jax.Array
_Cache = tuple[Array, Array]  # keys and values [B, K, T, H]


def patch_loop_params(params: Mapping[str, Any], config: AudioLMConfig) -> dict[str, Any]:
    """The patch decoder's parameters as `decode_patches` reads them.

    Args:
        params: parameters of `AudioLM`, layers stacked or split.

    Returns:
        `input`, `layers` (a list, projections joined), `norm`, `heads` [P, V], and `table` [V, P] unless that is the
        patch encoder's own.
    """
    decoder = params["patch_decoder"]
    num_layers, stack = config.patch_decoder.num_layers, decoder["transformer"]
    if "layers" in stack:
        stack = unstack_layers(stack, num_layers)
    heads = [decoder[f"head_{r}"]["kernel"] for r in range(config.num_channels)]
    loop = {
        "input": decoder["input"],
        "layers": [join_projections(stack[f"layers_{i}"]) for i in range(num_layers)],
        "norm": stack["norm"],
        "heads": {"kernel": jnp.concatenate(heads, axis=1)},
    }
    if "codes" in decoder:
        loop["table"] = params["patch_encoder"]["embedding"] @ decoder["codes"]["kernel"]
    return loop


def for_one_request(loop: Mapping[str, Any]) -> dict[str, Any]:
    """The same parameters for products of a matrix and a single vector on CPU.

    The weights of an output lie side by side, which XLA reads twice as fast. For several vectors it is slower so.
    """

    def turned(params: Mapping[str, Array], inputs: int) -> dict[str, Array]:
        rest = {name: x for name, x in params.items() if name != "kernel"}
        return {"rows": params["kernel"].reshape(inputs, -1).T, **rest}

    width = loop["heads"]["kernel"].shape[0]
    layers = []
    for layer in loop["layers"]:
        attn, mlp = layer["attn"], layer["mlp"]
        out, down = (math.prod(x["kernel"].shape[:-1]) for x in (attn["out"], mlp["down"]))
        attn = {"qkv": turned(attn["qkv"], width), "out": turned(attn["out"], out)}
        mlp = {name: turned(x, down if name == "down" else width) for name, x in mlp.items()}
        layers.append({**layer, "attn": attn, "mlp": mlp})
    return {**loop, "layers": layers, "heads": turned(loop["heads"], width)}


def decode_patches(
    config: AudioLMConfig,
    compute: ComputeConfig,
    params: Mapping[str, Any],
    h_BD: Array,
    keys_B: Array,
    sampling: SamplingParams,
) -> Array:
    """Writes the next patch of each request.

    Args:
        params: what `patch_loop_params` gives under `patch_loop`, and the parameters of the patch encoder.
        h_BD: LLM hidden state of the position before the patch.
        keys_B: one typed key per request, from which all draws of its patch follow.
        sampling: sampler of each request; the "empty" id of a channel is never drawn.

    Returns:
        int32 codes [B, G, R].
    """
    c, stack, loop = config, config.patch_decoder, params["patch_loop"]
    table_VP = loop.get("table", params["patch_encoder"]["embedding"])
    B, T, G, R = len(h_BD), c.num_steps, c.group_size, c.num_channels
    dtype = jnp.dtype(compute.dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    cos_1T1H, sin_1T1H = rope_tables(jnp.arange(T)[None], stack.head_dim, stack.rope_theta, wide)
    bits_TBR = jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, 1), (T, R)), out_axes=1)(keys_B)
    delays = jnp.array(c.delays)

    def norm(x: Array, params: Mapping[str, Array]) -> Array:
        return Norm(stack.norm, stack.d_model, stack.norm_eps, compute).apply({"params": params}, x)

    def step(carry: tuple[Array, list[_Cache], Array], inputs: tuple[Array, Array]) -> Any:
        x_BP, caches, patches_BGR = carry
        t, bits_BR = inputs
        at = [jax.lax.dynamic_slice_in_dim(table, t, 1, axis=1) for table in (cos_1T1H, sin_1T1H)]
        caches = list(caches)
        for i, layer in enumerate(loop["layers"]):
            y_BP, caches[i] = _attend(stack, layer["attn"], norm(x_BP, layer["norm_attn"]), caches[i], t, *at)
            x_BP = x_BP + y_BP
            x_BP = x_BP + _mlp(layer["mlp"], norm(x_BP, layer["norm_mlp"]))
        logits_BV = _linear(norm(x_BP, loop["norm"]), loop["heads"]).astype(wide)
        codes_BR, x_BP = delay_sample(
            logits_BV,
            bits_BR,
            t,
            table_VP,
            sampling,
            sizes=c.audio_vocab_sizes,
            delays=c.delays,
            group_size=G,
            implementation=compute.kernels,
        )
        is_frame_GR = jnp.arange(G)[:, None] == t - delays
        return (x_BP.astype(dtype), caches, jnp.where(is_frame_GR, codes_BR[:, None], patches_BGR)), None

    empty_BKTH = jnp.zeros((B, stack.num_kv_heads, T, stack.head_dim), dtype)
    caches = [(empty_BKTH, empty_BKTH) for _ in loop["layers"]]
    start = (_linear(h_BD.astype(dtype), loop["input"]), caches, jnp.zeros((B, G, R), jnp.int32))
    (_, _, patches_BGR), _ = jax.lax.scan(step, start, (jnp.arange(T), bits_TBR))
    return patches_BGR


def _linear(x: Array, params: Mapping[str, Array]) -> Array:
    """`Linear` of vectors; the output's axes are one."""
    if "rows" in params:
        # What XLA on CPU fuses with such a product, it computes without its routine for them.
        y = jax.lax.optimization_barrier(jax.lax.optimization_barrier(x) @ params["rows"].T)
    else:
        y = x @ params["kernel"].reshape(x.shape[-1], -1)
    if "bias" in params:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        y = (y.astype(wide) + params["bias"].reshape(-1).astype(wide)).astype(x.dtype)
    return y


def _mlp(params: Mapping[str, Any], x_BP: Array) -> Array:
    if "gate_up" in params:
        gate, up = jnp.split(_linear(x_BP, params["gate_up"]), 2, axis=-1)
        return _linear(jax.nn.silu(gate) * up, params["down"])
    return _linear(jax.nn.gelu(_linear(x_BP, params["up"]), approximate=False), params["down"])


def _attend(
    stack: TransformerConfig, params: Mapping[str, Any], x_BP: Array, cache: _Cache, t: Array, cos: Array, sin: Array
) -> tuple[Array, _Cache]:
    """Attention of step t over the steps up to it; keys and values of the steps are in `cache`."""
    N, K, H = stack.num_heads, stack.num_kv_heads, stack.head_dim
    B, T = len(x_BP), cache[0].shape[2]
    wide = jnp.promote_types(x_BP.dtype, jnp.float32)
    qkv = _linear(x_BP, params["qkv"]).reshape(B, 1, N + 2 * K, H)
    q, k, v = jnp.split(qkv, [N, N + K], axis=2)
    new = rotate(k, cos, sin), v
    k_BKTH, v_BKTH = (
        jax.lax.dynamic_update_slice_in_dim(old, x.reshape(B, K, 1, H), t, axis=2)
        for old, x in zip(cache, new, strict=True)
    )
    q_BKMH = rotate(q, cos, sin).reshape(B, K, N // K, H)
    scores_BKMT = jnp.einsum("bkmh,bkth->bkmt", q_BKMH, k_BKTH, preferred_element_type=wide) * (1 / math.sqrt(H))
    ago_T, left = t - jnp.arange(T), stack.window[0]
    seen_T = (ago_T >= 0) & (ago_T <= (T if left < 0 else left))
    probs_BKMT = jax.nn.softmax(jnp.where(seen_T, scores_BKMT, -jnp.inf), axis=-1).astype(x_BP.dtype)
    y_BKMH = jnp.einsum("bkmt,bkth->bkmh", probs_BKMT, v_BKTH)
    return _linear(y_BKMH.reshape(B, N * H), params["out"]), (k_BKTH, v_BKTH)

"""Pre-norm transformer: the one block that every stack of the system is made of.

`TransformerConfig` says which: LayerNorm + GELU with biases is the audio tokenizer's block, RMSNorm + SwiGLU with q/k/v
biases the Qwen2 block of the language model. Parameters of a block: `norm_attn`, `attn/{q,k,v,out}`, `norm_mlp`,
`mlp/{up,gate,down}`; linear kernels are [in..., out...] with heads as an axis of their own, so that the mesh can cut
them. A stack holds its blocks under `layers` with a leading axis (scanned) or under `layers_0`, `layers_1`, ...
(unrolled), and its final norm under `norm`.

Axes: B batch, L positions, D width, N query heads, K key/value heads, H head dimension, S cache slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mimo_jax.config import ComputeConfig, ConfigError, TransformerConfig
from mimo_jax.models.attention import KERNELS, attention, rope_tables, rotate
from mimo_jax.sharding import LONG_ROW, constrain_residual, scatter_by_rows

INIT_SCALE = 0.02

_RESIDUAL = "residual"  # the input of a block
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_RESIDUAL],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of the positions a stack has seen. Request b owns slots 0 .. lengths_B[b] - 1.

    Attributes:
        k: [layers, B, S, K, H], rotated keys.
        v: [layers, B, S, K, H].
        lengths_B: int32, filled slots of each request.
    """

    k: jax.Array
    v: jax.Array
    lengths_B: jax.Array

    @staticmethod
    def zeros(config: TransformerConfig, batch: int, size: int, dtype: Any) -> KVCache:
        """An empty cache of `size` slots for each of `batch` requests."""
        shape = (config.num_layers, batch, size, config.num_kv_heads, config.head_dim)
        return KVCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), lengths_B=jnp.zeros(batch, jnp.int32))


class _Shared(NamedTuple):
    """What all layers of a stack read."""

    cos: jax.Array
    sin: jax.Array
    segment_ids_BL: jax.Array | None
    slots_BL: jax.Array | None  # cache slot that each position is written to


def initializer(scale: float = INIT_SCALE) -> nn.initializers.Initializer:
    """Normal of standard deviation `scale`: every matrix and table of the system.

    The numbers are a hash of key and index, and so the same on every mesh. `jax.random.normal` would do, but on CPU
    each of its calls takes XLA half a second to compile, and a model has dozens.
    """

    def mix(x: jax.Array) -> jax.Array:
        """Bijection of uint32 in which every input bit moves every output bit (C. Wellons, lowbias32)."""
        x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
        return x ^ (x >> 16)

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
        del out_sharding  # follows from the parameter's axes
        words = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
        index = jnp.zeros(shape, jnp.uint32)
        for axis in range(len(shape)):
            stride = math.prod(shape[axis + 1 :]) % 2**32
            index += jax.lax.broadcasted_iota(jnp.uint32, tuple(shape), axis) * jnp.uint32(stride)
        bits = mix(mix(index ^ words[0]) + words[-1])
        uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-22 - 1.0
        return (jax.lax.erf_inv(uniform) * (math.sqrt(2) * scale)).astype(dtype)

    return init


class Linear(nn.Module):
    """Affine map of the trailing axes: [..., *inputs] -> [..., *outputs], with kernel [*inputs, *outputs].

    `input_axes` and `output_axes` are the logical names of the kernel's axes. Where the collection "lora" holds `a`
    [*inputs, rank] and `b` [rank, *outputs], their product is added to the kernel without ever being formed.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_axes: tuple[str | None, ...]
    output_axes: tuple[str | None, ...]
    use_bias: bool
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype, param_dtype = jnp.dtype(self.compute.dtype), jnp.dtype(self.compute.param_dtype)
        init = nn.with_logical_partitioning(initializer(), self.input_axes + self.output_axes)
        kernel = self.param("kernel", init, self.inputs + self.outputs, param_dtype)
        leading = x.shape[: x.ndim - len(self.inputs)]
        # As one product of two matrices: XLA CPU takes twice as long for the gradients of anything else.
        matrix = kernel.astype(dtype).reshape(math.prod(self.inputs), math.prod(self.outputs))
        x = x.astype(dtype).reshape(math.prod(leading), matrix.shape[0])
        y = x @ scatter_by_rows(matrix, self.input_axes[0], self.output_axes[0])
        if self.has_variable("lora", "a"):
            a, b = (jnp.asarray(self.get_variable("lora", name), dtype) for name in ("a", "b"))
            y = y + (x @ a.reshape(len(matrix), -1)) @ b.reshape(-1, matrix.shape[1])
        y = y.reshape(*leading, *self.outputs)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.output_axes)
            bias = self.param("bias", zeros, self.outputs, param_dtype)
            # Added in float32, so that the gradient, a sum over all positions, is one too.
            wide = jnp.promote_types(dtype, jnp.float32)
            y = (y.astype(wide) + bias.astype(wide)).astype(dtype)
        return y


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, computed in float32 (float64 for float64 inputs)."""

    kind: str
    features: int
    eps: float
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        param_dtype = jnp.dtype(self.compute.param_dtype)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", ones, (self.features,), param_dtype).astype(wide)
        y = x.astype(wide)
        if self.kind == "layernorm":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps) * scale
        if self.kind == "layernorm":
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
            y = y + self.param("bias", zeros, (self.features,), param_dtype).astype(wide)
        return y.astype(jnp.dtype(self.compute.dtype))


class _Attention(nn.Module):
    config: TransformerConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x_BLD, shared: _Shared, kv, layer):
        c = self.config

        def project(name: str, heads: int, axis: str, use_bias: bool) -> jax.Array:
            shape, axes = (heads, c.head_dim), (axis, "head_dim")
            return Linear((c.d_model,), shape, ("embed",), axes, use_bias, self.compute, name=name)(x_BLD)

        if self.has_variable("params", "qkv"):
            heads = c.num_heads + 2 * c.num_kv_heads
            qkv = project("qkv", heads, "heads", c.q_bias or c.k_bias or c.v_bias)
            q, k, v = jnp.split(qkv, [c.num_heads, c.num_heads + c.num_kv_heads], axis=-2)
        else:
            q = project("q", c.num_heads, "heads", c.q_bias)
            k = project("k", c.num_kv_heads, "kv_heads", c.k_bias)
            v = project("v", c.num_kv_heads, "kv_heads", c.v_bias)
        q, k = rotate(q, shared.cos, shared.sin), rotate(k, shared.cos, shared.sin)
        impl = self.compute.attention
        mask: dict[str, Any] = {"q_segments_BL": shared.segment_ids_BL, "kv_segments_BS": shared.segment_ids_BL}
        if kv is not None:
            rows = jnp.arange(x_BLD.shape[0])[:, None]
            kv = tuple(
                all_.at[layer, rows, shared.slots_BL].set(new.astype(all_.dtype), mode="drop")
                for all_, new in zip(kv, (k, v), strict=True)
            )
            k, v = (all_[layer].astype(q.dtype) for all_ in kv)
            slots_BS = jnp.arange(k.shape[1])[None]
            mask = {"q_positions_BL": shared.slots_BL, "kv_positions_BS": slots_BS}
            impl = "auto" if impl in KERNELS else impl  # kernels are for whole rows
        y = attention(q, k, v, causal=c.causal, window=c.window, impl=impl, **mask)
        out = Linear(
            (c.num_heads, c.head_dim),
            (c.d_model,),
            ("heads", "head_dim"),
            ("embed",),
            c.out_bias,
            self.compute,
            name="out",
        )
        return out(y), kv


class _MLP(nn.Module):
    config: TransformerConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x_BLD):
        c = self.config

        def linear(name: str, a: int, b: int, axes: tuple[str, str]) -> Linear:
            return Linear((a,), (b,), axes[:1], axes[1:], c.mlp_bias, self.compute, name=name)

        if self.has_variable("params", "gate_up"):
            gate, h = jnp.split(linear("gate_up", c.d_model, 2 * c.d_ff, ("embed", "mlp"))(x_BLD), 2, axis=-1)
            return linear("down", c.d_ff, c.d_model, ("mlp", "embed"))(nn.silu(gate) * h)
        h = linear("up", c.d_model, c.d_ff, ("embed", "mlp"))(x_BLD)
        if c.mlp == "swiglu":
            h = nn.silu(linear("gate", c.d_model, c.d_ff, ("embed", "mlp"))(x_BLD)) * h
        else:
            h = nn.gelu(h, approximate=False)
        return linear("down", c.d_ff, c.d_model, ("mlp", "embed"))(h)


class _Block(nn.Module):
    config: TransformerConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, carry, shared: _Shared):
        c = self.config
        x, kv, layer = carry
        if self.compute.remat == "offload":
            x = checkpoint_name(x, _RESIDUAL)

        def norm(name: str) -> Norm:
            return Norm(c.norm, c.d_model, c.norm_eps, self.compute, name=name)

        y, kv = _Attention(c, self.compute, name="attn")(norm("norm_attn")(x), shared, kv, layer)
        x = x + y
        x = constrain_residual(x + _MLP(c, self.compute, name="mlp")(norm("norm_mlp")(x)))
        return (x, kv, layer + 1), None


class Transformer(nn.Module):
    """A stack of pre-norm blocks and, unless `final_norm` is False, a norm after them."""

    config: TransformerConfig
    compute: ComputeConfig
    final_norm: bool = True

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        *,
        segment_ids_BL: jax.Array | None = None,
        positions_BL: jax.Array | None = None,
        cache: KVCache | None = None,
        cache_valid_BL: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Runs the stack over whole rows, or over the next positions of requests whose past is in `cache`.

        Args:
            x_BLD: input vectors.
            segment_ids_BL: int32 document of each position, 0 = padding: documents do not attend to each other.
            positions_BL: int32 rotary positions; by default the index in the row, with a cache the slot.
            cache: keys and values of the past. Position l of request b is written to slot lengths_B[b] + l and sees the
                slots up to its own. The caller sees to it that the slots exist: writes beyond them are dropped.
            cache_valid_BL: bool, with a cache: the real positions of a right-padded prompt. Lengths grow by their
                number, so that later positions overwrite the slots of the padding.

        Returns:
            Outputs [B, L, D] in the compute dtype, and the new cache (None without one).

        Raises:
            ValueError: a cache is given to a stack that is not causal, or together with segments.
        """
        c, compute = self.config, self.compute
        L = x_BLD.shape[1]
        dtype = jnp.dtype(compute.dtype)
        slots_BL = None
        if cache is not None:
            if not c.causal or segment_ids_BL is not None:
                raise ValueError("Transformer: a cache needs a causal stack and rows without segment ids")
            slots_BL = cache.lengths_B[:, None] + jnp.arange(L, dtype=jnp.int32)
        elif cache_valid_BL is not None:
            raise ValueError("Transformer: cache_valid_BL is given without a cache")
        if positions_BL is None:
            positions_BL = jnp.arange(L, dtype=jnp.int32)[None] if slots_BL is None else slots_BL
        wide = jnp.promote_types(dtype, jnp.float32)
        shared = _Shared(*rope_tables(positions_BL, c.head_dim, c.rope_theta, wide), segment_ids_BL, slots_BL)

        block: Any = _Block
        if compute.remat != "none" and cache is None:
            # A scan already keeps XLA from merging the recomputation with the forward pass.
            policy = _REMAT_POLICIES[_remat(compute, L)]
            block = nn.remat(_Block, policy=policy, prevent_cse=not compute.scan_layers)
        kv = None if cache is None else (cache.k, cache.v)
        carry = (constrain_residual(x_BLD.astype(dtype)), kv, 0)
        if compute.scan_layers:
            stack = nn.scan(
                block,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=c.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            carry, _ = stack(c, compute, name="layers")((*carry[:2], jnp.int32(0)), shared)
        else:
            for i in range(c.num_layers):
                (x, kv, _), _ = block(c, compute, name=f"layers_{i}")((*carry[:2], i), shared)
                carry = (x, kv, i + 1)
        x, kv, _ = carry
        if self.final_norm:
            x = Norm(c.norm, c.d_model, c.norm_eps, compute, name="norm")(x)
        if cache is None or kv is None:
            return x, None
        grown = L if cache_valid_BL is None else cache_valid_BL.sum(-1, dtype=jnp.int32)
        return x, KVCache(k=kv[0], v=kv[1], lengths_B=cache.lengths_B + grown)


def _remat(compute: ComputeConfig, length: int) -> str:
    """What the backward pass keeps of rows of some length. Those of patches are not worth a way to the host."""
    if compute.remat != "offload":
        return compute.remat
    if "pinned_host" not in {memory.kind for memory in jax.local_devices()[0].addressable_memories()}:
        raise ConfigError(
            f"compute.remat: expected none, dots or full: {jax.default_backend()} has no pinned_host memory"
        )
    return "offload" if length >= LONG_ROW else "full"


def join_projections(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a block, or of a stack of them, with q, k and v as one matrix, and gate and up as one.

    `Transformer` reads either form. At generation few rows meet each matrix, and a few large ones are read faster.
    """
    attn, mlp = dict(layer["attn"]), dict(layer["mlp"])
    parts = [attn.pop(name) for name in "qkv"]
    attn["qkv"] = {"kernel": jnp.concatenate([part["kernel"] for part in parts], axis=-2)}
    if any("bias" in part for part in parts):
        zeros = [part["kernel"].take(0, axis=-3) * 0 for part in parts]
        biases = [part.get("bias", zero) for part, zero in zip(parts, zeros, strict=True)]
        attn["qkv"]["bias"] = jnp.concatenate(biases, axis=-2)
    if "gate" in mlp:
        mlp["gate_up"] = jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), mlp.pop("gate"), mlp.pop("up"))
    return {**layer, "attn": attn, "mlp": mlp}


def unstack_layers(params: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Parameters of a scanned stack (`layers`, with a leading axis) as those of an unrolled one (`layers_0`, ...)."""
    layers = {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(num_layers)}
    return {**layers, **{name: value for name, value in params.items() if name != "layers"}}

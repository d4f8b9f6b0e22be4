"""Discriminators of the adversarial stage: multi-period and multi-scale STFT, spectral norm on every layer.

Each looks at a row of wave through a grid of its own, scores every place of the grid, and shows what its layers made of
it. Padding is zero in real and in reconstructed rows alike; places whose middle is padding are marked, so that losses
can leave them out. A row is one sound to them: what a place sees may reach into the clip beside it, the same one for
both (so losses depend on packing, unlike those of the first stage).

B rows, S samples, H x W places of a grid (periods: H samples of a period x W periods; STFT: H frames x W frequencies),
I and O channels, K discriminators.

Sources: report section 2.1; the shapes are those of HiFi-GAN's multi-period (Kong et al., 2020) and EnCodec's
multi-scale STFT discriminators (Defossez et al., 2022), spectral norm is that of Miyato et al. (2018).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mimo_jax.audio.features import stft
from mimo_jax.config import ComputeConfig, DiscriminatorConfig, MelConfig
from mimo_jax.models.transformer import initializer

PERIOD_SLOPE, STFT_SLOPE = 0.1, 0.2  # of the leaky ReLUs
_SHARDED_WIDTH = 512  # channels from which on a kernel is worth cutting over `fsdp`
_FIRST_ITERATIONS = 15  # of the power iteration, before the first step
_HIGHEST = jax.lax.Precision.HIGHEST


class DiscriminatorOutput(NamedTuple):
    """What one discriminator says of rows; or, of the same structure, which of its places lie inside clips."""

    logits_BHW: jax.Array  # float32 (float64 in float64); high where it takes the sound for real
    features: tuple[jax.Array, ...]  # of each layer but the last, after its activation: [B, H, W_j, O_j]


Outputs = tuple[DiscriminatorOutput, ...]


class SpectralConv(nn.Module):
    """Convolution over H x W whose kernel is divided by its largest singular value, as a matrix [taps * I, O].

    The singular value comes from one step of the power iteration a call, from the left vector `u` in the collection
    "spectral"; the new one is kept where that collection is mutable. Gradients pass through the value, not the vectors.

    Attributes:
        kernel: taps along H and W, odd.
        stride: along W.
        dilation: along H.
    """

    features_in: int
    features_out: int
    kernel: tuple[int, int]
    compute: ComputeConfig
    stride: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x_BHWI: jax.Array) -> jax.Array:
        """Maps [B, H, W, I] to [B, H, ceil(W / stride), O]; place w of the output has w * stride as its middle."""
        taps, outputs = math.prod(self.kernel), self.features_out
        dtype, param_dtype = jnp.dtype(self.compute.dtype), jnp.dtype(self.compute.param_dtype)
        wide = jnp.promote_types(param_dtype, jnp.float32)
        names = (None, None, None, "embed" if outputs >= _SHARDED_WIDTH else None)
        init = nn.with_logical_partitioning(initializer((taps * self.features_in) ** -0.5), names)
        kernel = self.param("kernel", init, (*self.kernel, self.features_in, outputs), param_dtype)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, names[3:])
        bias = self.param("bias", zeros, (outputs,), param_dtype)

        matrix_NO = kernel.astype(wide).reshape(-1, outputs)
        u = self.variable("spectral", "u", self._first_vector, jax.lax.stop_gradient(matrix_NO))
        value, u_O = power_iteration(matrix_NO, u.value)
        if not self.is_initializing() and self.is_mutable_collection("spectral"):
            u.value = u_O
        normalized = (kernel.astype(wide) / value).astype(dtype)
        y = conv(x_BHWI.astype(dtype), normalized, self.stride, self.dilation)
        return (y.astype(wide) + bias.astype(wide)).astype(dtype)

    def _first_vector(self, matrix_NO: jax.Array) -> jax.Array:
        draw = initializer(1.0)(self.make_rng("params"), (self.features_out,), matrix_NO.dtype)
        return jax.lax.fori_loop(0, _FIRST_ITERATIONS, lambda _, u_O: power_iteration(matrix_NO, u_O)[1], draw)


def power_iteration(matrix_NO: jax.Array, u_O: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One step: an estimate from below of the largest singular value, and the next vector (without gradient)."""
    fixed_NO = jax.lax.stop_gradient(matrix_NO)
    v_N = _unit(jnp.matmul(fixed_NO, u_O, precision=_HIGHEST))
    u_O = _unit(jnp.matmul(v_N, fixed_NO, precision=_HIGHEST))
    return jnp.maximum(jnp.vdot(v_N, jnp.matmul(matrix_NO, u_O, precision=_HIGHEST)), 1e-12), u_O


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.sqrt(jnp.sum(x * x)), 1e-12)


def conv(x_BHWI: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> jax.Array:
    """Centred convolution with kernel [H taps, W taps, I, O] and zeros outside: [B, H, ceil(W / stride), O].

    Where many taps meet a small stride, blocks of `stride` places become channels and their taps taps of blocks: the
    gradient of nine taps at stride 2 takes a third of the time on CPU then. Five taps at stride 3 gain nothing.
    """
    rows, taps, inputs, outputs = kernel.shape
    width, before, beside = x_BHWI.shape[2], (taps - 1) // 2, (rows - 1) // 2 * dilation
    convolve = functools.partial(
        jax.lax.conv_general_dilated, rhs_dilation=(dilation, 1), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    if taps < 4 * stride:
        around = ((beside, beside), (before, before))
        return convolve(x_BHWI, kernel, (1, stride), around)
    places, blocks = -(-width // stride), -(-taps // stride)
    needed = (places + blocks - 1) * stride
    x = jnp.pad(x_BHWI, ((0, 0), (0, 0), (before, max(0, needed - width - before)), (0, 0)))[:, :, :needed]
    x = x.reshape(*x.shape[:2], needed // stride, stride * inputs)
    kernel = jnp.pad(kernel, ((0, 0), (0, blocks * stride - taps), (0, 0), (0, 0)))
    kernel = kernel.reshape(rows, blocks, stride * inputs, outputs)
    return convolve(x, kernel, (1, 1), ((beside, beside), (0, 0)))


class _Layer(NamedTuple):
    """One convolution: output channels, taps, stride along W, dilation along H."""

    channels: int
    kernel: tuple[int, int]
    stride: int = 1
    dilation: int = 1


class Discriminator(nn.Module):
    """A stack of convolutions over a grid: features after each, then a score of every place."""

    layers: tuple[_Layer, ...]
    last_kernel: tuple[int, int]
    slope: float
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x_BHWI: jax.Array, inside_BHW: jax.Array) -> tuple[DiscriminatorOutput, DiscriminatorOutput]:
        """Scores a grid [B, H, W, I]; `inside_BHW`, bool, says whether the middle of a place lies inside a clip."""
        features, inside = [], []
        for i, layer in enumerate(self.layers):
            sizes = (x_BHWI.shape[-1], layer.channels, layer.kernel, self.compute, layer.stride, layer.dilation)
            x_BHWI = nn.leaky_relu(SpectralConv(*sizes, name=f"conv_{i}")(x_BHWI), self.slope)
            inside_BHW = inside_BHW[:, :, :: layer.stride]
            features.append(x_BHWI)
            inside.append(inside_BHW)
        last = SpectralConv(x_BHWI.shape[-1], 1, self.last_kernel, self.compute, name="last")(x_BHWI)[..., 0]
        logits_BHW = last.astype(jnp.promote_types(last.dtype, jnp.float32))
        return DiscriminatorOutput(logits_BHW, tuple(features)), DiscriminatorOutput(inside_BHW, tuple(inside))


class Discriminators(nn.Module):
    """All of them: `period_P` and `stft_N`, in the order of the config."""

    config: DiscriminatorConfig
    sample_rate: int
    compute: ComputeConfig

    @nn.compact
    def __call__(self, wav_BS: jax.Array, inside_BS: jax.Array) -> tuple[Outputs, Outputs]:
        """Scores rows.

        Args:
            wav_BS: float32 or float64, zero outside of clips.
            inside_BS: bool, whether a sample lies inside a clip.

        Returns:
            The output of each discriminator, in the order of `config.names`; and for each place of it, bool, whether
            it lies inside a clip (features have one answer for all channels, logits of an STFT one for each frequency).
        """
        c, compute, out = self.config, self.compute, []
        *strided, channels = c.period_channels
        layers = (*(_Layer(n, (1, 5), 3) for n in strided), _Layer(channels, (1, 5)))
        for period in c.periods:
            discriminator = Discriminator(layers, (1, 3), PERIOD_SLOPE, compute, name=f"period_{period}")
            out.append(discriminator(_fold(wav_BS, period)[..., None], _fold(inside_BS, period)))
        n = c.stft_channels
        layers = (_Layer(n, (3, 9)), *(_Layer(n, (3, 9), 2, d) for d in (1, 2, 4)), _Layer(n, (3, 3)))
        for size in c.stft_sizes:
            discriminator = Discriminator(layers, (3, 3), STFT_SLOPE, compute, name=f"stft_{size}")
            hop = size // 4
            spectrum = stft(wav_BS, MelConfig(self.sample_rate, size, size, hop), normalized=True)
            middle = jnp.minimum(jnp.arange(spectrum.shape[1]) * hop + size // 2, wav_BS.shape[1] - 1)
            inside_BHW = jnp.broadcast_to(inside_BS[:, middle, None], spectrum.shape)
            out.append(discriminator(jnp.stack([spectrum.real, spectrum.imag], axis=-1), inside_BHW))
        outputs, inside = zip(*out, strict=True)
        return outputs, inside


def _fold(x_BS: jax.Array, period: int) -> jax.Array:
    """Every `period`-th sample in a row of its own: [B, period, ceil(S / period)], zeros at the end."""
    x_BS = jnp.pad(x_BS, ((0, 0), (0, -x_BS.shape[1] % period)))
    return x_BS.reshape(x_BS.shape[0], -1, period).swapaxes(1, 2)


def init_variables(
    config: DiscriminatorConfig, sample_rate: int, compute: ComputeConfig, key: jax.Array
) -> dict[str, Any]:
    """Random variables {"params", "spectral"}; parameters are boxed with their logical axes."""
    wav_BS, inside_BS = _some_row(config, compute)
    return dict(Discriminators(config, sample_rate, compute).init(key, wav_BS, inside_BS))


def init_spectral(
    config: DiscriminatorConfig, sample_rate: int, compute: ComputeConfig, params: Any, key: jax.Array
) -> Any:
    """The collection "spectral" of parameters that come from elsewhere."""
    rngs = {"params": key}
    model = Discriminators(config, sample_rate, compute)
    _, found = model.apply({"params": params}, *_some_row(config, compute), mutable=["spectral"], rngs=rngs)
    return found["spectral"]


def _some_row(config: DiscriminatorConfig, compute: ComputeConfig) -> tuple[jax.Array, jax.Array]:
    shape = (1, max(config.stft_sizes, default=1024))
    return jnp.zeros(shape, jnp.dtype(compute.param_dtype)), jnp.ones(shape, bool)

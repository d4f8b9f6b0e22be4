"""Up-convolution with group norm, and the inverse STFT, against plain NumPy, segment by segment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.audio.features import hann_window, istft_frames
from mimo_jax.config import ComputeConfig
from mimo_jax.models.tokenizer.decoder import UpConv
from mimo_jax.models.tokenizer.segments import segment_positions, segment_sum, shift
from mimo_jax.models.tokenizer.vocoder import overlap_add

# Segments side by side, one of a single position, padding between and at the end.
IDS = np.array([[1, 1, 1, 2, 3, 3, 0, 4, 4, 0], [0, 0, 1, 1, 1, 1, 1, 2, 2, 2]], np.int32)


def test_positions_sums_and_shifts_stay_inside_a_segment():
    np.testing.assert_array_equal(segment_positions(jnp.asarray(IDS))[0], [0, 1, 2, 0, 0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(segment_positions(jnp.asarray(IDS))[1], [0, 0, 0, 1, 2, 3, 4, 0, 1, 2])
    sums = np.asarray(segment_sum(jnp.arange(20.0).reshape(2, 10), jnp.asarray(IDS)))
    np.testing.assert_array_equal(sums[0, [0, 1, 2, 3, 4, 5, 7, 8]], [3, 3, 3, 3, 9, 9, 15, 15])
    x = jnp.asarray([[1, 2, 3]])
    np.testing.assert_array_equal(shift(x, 1), [[0, 1, 2]])
    np.testing.assert_array_equal(shift(x, -2), [[3, 0, 0]])
    np.testing.assert_array_equal(shift(x, 5), [[0, 0, 0]])


def _naive_up_conv(x_LD, params, stride, norm):
    kernel, (length, _) = params["conv"]["kernel"], x_LD.shape
    size = kernel.shape[1]
    y = np.zeros(((length - 1) * stride + size, kernel.shape[2])) + params["bias"]
    for i in range(length):
        for k in range(size):
            y[i * stride + k] += x_LD[i] @ kernel[:, k]
    # The published statistics are of all samples, the cropped ones too; those of a frame are of its own samples.
    over = y if norm == "sequence" else y[: length * stride].reshape(length, -1)
    mean, variance = (f(axis=None if norm == "sequence" else 1, keepdims=True) for f in (over.mean, over.var))
    y = (over - mean) / np.sqrt(variance + 1e-5)
    return y.reshape(-1, kernel.shape[2])[: length * stride] * params["norm_scale"] + params["norm_bias"]


@pytest.mark.parametrize(("kernel_size", "norm"), [(2, "sequence"), (3, "sequence"), (4, "sequence"), (3, "frame")])
def test_up_conv_normalises_each_segment_by_itself(kernel_size, norm):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 10, 5))
    params = {
        "conv": {"kernel": rng.normal(size=(5, kernel_size, 4))},
        "bias": rng.normal(size=4),
        "norm_scale": rng.normal(size=4),
        "norm_bias": rng.normal(size=4),
    }
    module = UpConv(5, 4, kernel_size, 2, ComputeConfig(), norm)
    y = np.asarray(jax.jit(module.apply)({"params": jax.tree.map(np.float32, params)}, jnp.float32(x), IDS))
    ids_out = np.repeat(IDS, 2, axis=1)
    for row in range(2):
        for segment in np.unique(IDS[row][IDS[row] > 0]):
            expected = _naive_up_conv(x[row][IDS[row] == segment], params, 2, norm)
            np.testing.assert_allclose(y[row][ids_out[row] == segment], expected, atol=2e-5)
    assert not y[ids_out == 0].any()


def test_with_norm_frame_nothing_depends_on_what_comes_later_and_gradients_are_finite():
    rng = np.random.default_rng(0)
    x, later = np.float32(rng.normal(size=(1, 4, 5))), np.float32([[[0], [0], [1], [1]]])
    params = {"conv": {"kernel": rng.normal(size=(5, 3, 4))}} | {n: np.ones(4) for n in ("norm_scale", "norm_bias")}
    params = {"params": jax.tree.map(np.float32, params | {"bias": np.zeros(4)})}
    module, ids = UpConv(5, 4, 3, 2, ComputeConfig(), "frame"), np.ones((1, 4), np.int32)

    @jax.jit
    def run(params, x):
        return jax.value_and_grad(lambda p: jnp.sum(module.apply(p, x, ids) ** 2))(params)[1], module.apply(
            params, x, ids
        )

    grads, y = run(params, x)
    changed = np.asarray(y != run(params, x + later)[1]).any((0, 2))
    assert changed.tolist() == [False] * 4 + [True] * 4
    # Frames of zeros have no variance.
    for g in (grads, run(params, 0 * x)[0]):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(g))


def _naive_istft(spectrum_TF, hop):
    size = 2 * (spectrum_TF.shape[1] - 1)
    window = hann_window(size)
    wav = np.zeros(hop * (len(spectrum_TF) - 1) + size)
    envelope = np.zeros_like(wav)
    for t, frame in enumerate(np.fft.irfft(spectrum_TF, n=size) * window):
        wav[t * hop : t * hop + size] += frame
        envelope[t * hop : t * hop + size] += window**2
    crop = (size - hop) // 2
    return wav[crop : crop + hop * len(spectrum_TF)] / envelope[crop : crop + hop * len(spectrum_TF)]


@pytest.mark.parametrize(("size", "hop"), [(16, 4), (20, 6), (12, 8)])
def test_overlap_add_equals_a_plain_inverse_stft_of_each_segment(size, hop):
    rng = np.random.default_rng(0)
    shape = (2, 10, size // 2 + 1)
    spectrum = rng.normal(size=shape) + 1j * rng.normal(size=shape)
    wav = np.asarray(overlap_add(istft_frames(jnp.complex64(spectrum)), jnp.asarray(IDS), hop))
    ids_out = np.repeat(IDS, hop, axis=1)
    for row in range(2):
        for segment in np.unique(IDS[row][IDS[row] > 0]):
            expected = _naive_istft(spectrum[row][IDS[row] == segment], hop)
            found = wav[row][ids_out[row] == segment]
            # Where the squared windows nearly vanish the quotient has few digits.
            np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    assert not wav[ids_out == 0].any()

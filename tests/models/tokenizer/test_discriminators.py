"""Discriminators: convolutions without strides, spectral norm, published shapes, and what lies outside of clips."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tokenizer.tiny import compute, fast_jit

from mimo_jax.config import DiscriminatorConfig
from mimo_jax.models.tokenizer.discriminators import (
    Discriminators,
    SpectralConv,
    conv,
    init_spectral,
    init_variables,
    power_iteration,
)

SMALL = DiscriminatorConfig(periods=(2, 3), period_channels=(4, 6, 8), stft_sizes=(64, 32), stft_channels=4)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "width"),
    [((1, 5), 3, 1, 40), ((1, 5), 3, 1, 42), ((1, 5), 1, 1, 41), ((1, 3), 1, 1, 7), ((3, 9), 1, 1, 33)]
    + [((3, 9), 2, d, w) for d in (1, 2, 4) for w in (33, 32)],
)
def test_convolution_equals_the_strided_one(kernel, stride, dilation, width):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 9, width, 3)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(*kernel, 3, 4)), jnp.float32)
    rows, taps = kernel
    around = ((rows // 2 * dilation,) * 2, (taps // 2,) * 2)
    layout = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(
        x, weights, (1, stride), around, rhs_dilation=(dilation, 1), dimension_numbers=layout
    )
    assert expected.shape[2] == -(-width // stride)
    np.testing.assert_allclose(conv(x, weights, stride, dilation), expected, atol=1e-4)


def _largest(kernel):
    return np.linalg.svd(np.asarray(kernel).reshape(-1, kernel.shape[-1]), compute_uv=False)[0]


def test_power_iteration_finds_the_largest_singular_value_from_below():
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.normal(size=(30, 7)), jnp.float32)
    u, found = jnp.asarray(rng.normal(size=7), jnp.float32), []
    for _ in range(60):
        value, u = power_iteration(matrix, u)
        found.append(float(value))
    exact = _largest(matrix)
    assert (np.diff(found) > -1e-4).all() and found[0] < exact * (1 + 1e-5)
    np.testing.assert_allclose(found[-1], exact, rtol=1e-4)
    gradient = jax.grad(lambda m: power_iteration(m, u)[0])(matrix)
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(gradient, np.outer(left[:, 0], right[0]), atol=2e-3)  # of a singular value: its vectors


def test_a_layer_uses_the_normalised_kernel_and_keeps_its_vector_only_where_it_may():
    layer = SpectralConv(3, 5, (3, 9), compute("float32"))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 20, 3)), jnp.float32)
    variables = nn.unbox(layer.init(jax.random.key(0), x))
    kernel = variables["params"]["kernel"]
    assert variables["spectral"]["u"].shape == (5,)
    apply = jax.jit(lambda variables: layer.apply(variables, x, mutable=["spectral"]))
    for _ in range(300):
        _, moved = apply(variables)
        variables = variables | moved
    expected = conv(x, kernel / _largest(kernel), 1, 1)
    np.testing.assert_allclose(layer.apply(variables, x), expected, atol=1e-4)
    scaled = variables | {"params": {"kernel": 50 * kernel, "bias": variables["params"]["bias"]}}
    np.testing.assert_allclose(layer.apply(scaled, x), expected, atol=1e-4)


@pytest.fixture(scope="module")
def small():
    return nn.unbox(init_variables(SMALL, 24_000, compute("float32"), jax.random.key(0)))


def test_every_layer_of_every_discriminator_is_normalised(small):
    kernels = [path for path, _ in jax.tree_util.tree_leaves_with_path(small["params"]) if "kernel" in str(path[-1])]
    vectors = [path for path, _ in jax.tree_util.tree_leaves_with_path(small["spectral"])]
    assert [path[:-1] for path in kernels] == [path[:-1] for path in vectors]
    assert len(kernels) == 2 * 4 + 2 * 6
    assert set(small["params"]) == set(SMALL.names)


def test_shapes_at_the_published_size():
    published = DiscriminatorConfig()
    model = Discriminators(published, 24_000, compute("float32"))
    variables = jax.eval_shape(
        lambda: nn.unbox(init_variables(published, 24_000, compute("float32"), jax.random.key(0)))
    )
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == published.num_params()
    shapes = {k: v.shape for k, v in variables["params"]["period_7"]["conv_3"].items()}
    assert shapes == {"kernel": (1, 5, 512, 1024), "bias": (1024,)}
    samples = 7 * 81 * 8
    wav = jax.ShapeDtypeStruct((2, samples), jnp.float32)
    inside = jax.ShapeDtypeStruct((2, samples), jnp.bool_)
    outputs, places = jax.eval_shape(model.apply, variables, wav, inside)
    assert len(outputs) == 10 and all(len(one.features) == 5 for one in outputs)
    for one, where in zip(outputs, places, strict=True):
        assert one.logits_BHW.shape == where.logits_BHW.shape
        assert [f.shape[:3] for f in one.features] == [f.shape for f in where.features]
    widths = [f.shape for f in outputs[3].features]
    assert widths == [(2, 7, 216, 32), (2, 7, 72, 128), (2, 7, 24, 512), (2, 7, 8, 1024), (2, 7, 8, 1024)]
    frequencies = [f.shape[2] for f in outputs[5].features]
    assert frequencies == [1025, 513, 257, 129, 129] and outputs[5].features[0].shape[1] == samples // 512


def test_flops_are_those_of_the_convolutions():
    published = DiscriminatorConfig()
    samples, counted = 7 * 11 * 81 * 16, 0.0
    variables = jax.eval_shape(
        lambda: nn.unbox(init_variables(published, 24_000, compute("float32"), jax.random.key(0)))
    )
    model = Discriminators(published, 24_000, compute("float32"))
    arguments = (jax.ShapeDtypeStruct((1, samples), jnp.float32), jax.ShapeDtypeStruct((1, samples), jnp.bool_))
    outputs, _ = jax.eval_shape(model.apply, variables, *arguments)
    for name, one in zip(published.names, outputs, strict=True):
        kernels = [variables["params"][name][k]["kernel"].shape for k in sorted(variables["params"][name])]
        places = [np.prod(f.shape[1:3]) for f in one.features] + [np.prod(one.logits_BHW.shape[1:])]
        counted += sum(2.0 * np.prod(k) * p for k, p in zip(kernels, places, strict=True))
    assert published.flops_per_sample() * samples == pytest.approx(counted, rel=0.03)


def test_vectors_for_kernels_from_elsewhere_are_fitted_to_them(small):
    kernels = jax.tree.map(lambda x: 3.0 * x, small["params"])
    found = jax.jit(lambda key: init_spectral(SMALL, 24_000, compute("float32"), kernels, key))(jax.random.key(5))
    assert jax.tree.structure(found) == jax.tree.structure(small["spectral"])
    for name in ("period_2", "stft_64"):
        for layer, kernel in ((k, kernels[name][k]["kernel"]) for k in kernels[name]):
            estimate, _ = power_iteration(jnp.reshape(kernel, (-1, kernel.shape[-1])), found[name][layer]["u"])
            assert 0.9 * _largest(kernel) < float(estimate) < 1.0001 * _largest(kernel), (name, layer)


def test_places_outside_of_clips_are_marked(small):
    model = Discriminators(SMALL, 24_000, compute("float32"))
    inside = np.zeros((1, 960), bool)
    inside[:, 240:600] = True
    wav = jnp.asarray(np.random.default_rng(0).normal(size=(1, 960)), jnp.float32) * inside
    _, places = fast_jit(model.apply)(small, wav, jnp.asarray(inside))
    first = np.asarray(places[0].features[0])[0]  # period 2, stride 3: place w of row h has sample 2 * 3 w + h
    np.testing.assert_array_equal(first, [[inside[0, 6 * w + h] for w in range(160)] for h in range(2)])
    stft = np.asarray(places[2].logits_BHW)[0]  # frames of 64 samples every 16
    np.testing.assert_array_equal(stft[:, 0], [inside[0, min(16 * t + 32, 959)] for t in range(60)])
    assert (stft == stft[:, :1]).all()

"""Mesh and logical-axis rules: errors name what is wrong, and a sharded model computes what one device computes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from models import lm_cases

from mimo_jax.config import ConfigError, LMLossConfig, MeshConfig
from mimo_jax.models.audio_lm import AudioLM, abstract_params, init_params
from mimo_jax.sharding import batch_sharding, make_mesh, partition_spec, scatter_by_rows, shardings
from mimo_jax.training.lm_loss import lm_loss

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 (virtual) devices")


def test_mesh_fills_the_open_axis():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2), jax.devices()[:4])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1}
    assert all(t == jax.sharding.AxisType.Auto for t in mesh.axis_types)


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(data=-1, fsdp=3), MeshConfig(data=2, fsdp=4)])
def test_mesh_that_does_not_fit_the_devices_is_refused(config):
    with pytest.raises(ConfigError, match=r"data \* fsdp \* tensor = 4 \(the number of devices\), got data="):
        make_mesh(config, jax.devices()[:4])


def test_indivisible_axis_is_refused_by_name():
    config = dataclasses.replace(lm_cases.CONFIG, vocab_size=41)
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    with pytest.raises(ValueError, match=r"params/llm/embedding: axis 'vocab' of size 41 .* 'tensor' of size 2"):
        shardings(abstract_params(config, lm_cases.COMPUTE), mesh)


def test_axes_that_collide_or_are_unknown_are_refused():
    with pytest.raises(ValueError, match="'heads' and 'mlp' are both cut over mesh axis 'tensor'"):
        partition_spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="'wings' is not in LOGICAL_RULES"):
        partition_spec(("wings",))


def test_parameters_are_cut_as_the_rules_say():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    boxed = abstract_params(lm_cases.CONFIG, lm_cases.COMPUTE)
    tree = shardings(boxed, mesh)["params"]
    layers = tree["llm"]["transformer"]["layers"]
    assert layers["attn"]["q"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert layers["mlp"]["down"]["kernel"].spec == PartitionSpec(None, "tensor", "fsdp")
    assert tree["llm"]["head"].spec == PartitionSpec("fsdp", "tensor")
    create = jax.jit(init_params, static_argnums=(0, 1), out_shardings={"params": tree})
    with jax.set_mesh(mesh):
        params = create(lm_cases.CONFIG, lm_cases.COMPUTE, jax.random.key(0))["params"]
    kernel = params["llm"]["transformer"]["layers"]["attn"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 8, 2, 4)
    # The same numbers as on one device.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, lm_cases.fresh_params())


@pytest.mark.parametrize("sizes", [(2, 2, 1), (1, 2, 2)])
def test_sharded_loss_and_gradients_equal_one_device(sizes):
    loss = LMLossConfig(channel_weights=(12.0, 8.0, 6.0))
    documents = [[d] for d in lm_cases.DOCUMENTS]
    rows = lm_cases.rows(documents, 16, 8)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:4])
    with jax.enable_x64(True):
        model = AudioLM(lm_cases.CONFIG, dataclasses.replace(lm_cases.COMPUTE64, remat="full"))
        step = jax.value_and_grad(lambda p, r: lm_loss(model, p, r, loss), has_aux=True)
        params = lm_cases.params64()
        (expected, sums), gradient = jax.jit(step, compiler_options=lm_cases.QUICK)(params, rows)
        places = shardings(abstract_params(lm_cases.CONFIG, lm_cases.COMPUTE64), mesh)["params"]
        with jax.set_mesh(mesh):
            spread = jax.device_put(params, places)
            (value, spread_sums), spread_gradient = jax.jit(step, compiler_options=lm_cases.QUICK)(
                spread, jax.device_put(rows, batch_sharding(mesh))
            )
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for a, b in zip(spread_sums, sums, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), spread_gradient, gradient)
    assert jnp.isfinite(value)


def test_gradients_cut_by_columns_are_summed_as_rows():
    """What TPUs need to scatter the sum: the transpose is cut, and only where columns lie over fsdp on a mesh."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((8, 6), (6, 4)))

    def gradient(rows, columns):
        return jax.jit(jax.grad(lambda w: jnp.sin(x @ scatter_by_rows(w, rows, columns)).sum())).trace(w)

    assert "sharding_constraint" not in str(gradient("mlp", "embed").jaxpr)
    with jax.set_mesh(mesh):
        cut = gradient("mlp", "embed")
        assert str(cut.jaxpr).count("sharding_constraint[") == 2  # of the matrix, of its gradient
        assert "sharding_constraint" not in str(gradient("embed", "mlp").jaxpr)
        found = cut.lower().compile()(w)
    np.testing.assert_allclose(found, x.T @ jnp.cos(x @ w), rtol=1e-5, atol=1e-5)

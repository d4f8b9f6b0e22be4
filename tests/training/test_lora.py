"""LoRA: branches compute what the merged matrices do, the base stays as it is, adapters alone are saved."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import lm_cases
from training import jobs

from mimo_jax.config import ConfigError, LearningRates, LMLossConfig, LoRAConfig, MeshConfig, OptimizerConfig
from mimo_jax.models.audio_lm import abstract_params
from mimo_jax.sharding import batch_sharding, make_mesh, shardings
from mimo_jax.training import checkpoint, language_model, loop, lora, metrics
from mimo_jax.training.checkpoint import CheckpointError, base_of, load_params, transfer
from mimo_jax.training.lm_loss import lm_loss
from mimo_jax.training.optimizer import make_optimizer, trained
from mimo_jax.training.state import TrainState
from mimo_jax.trees import flatten

CONFIG = LoRAConfig(rank=3, alpha=6.0, tables=True, targets=("q", "k", "v", "out", "up", "gate", "down", "projection"))
RATES = {"llm": 1e-3, "patch_encoder": 3e-3, "patch_decoder": 2e-3}
LOSS = LMLossConfig(channel_weights=(12.0, 8.0, 6.0))


def boxed(compute=lm_cases.COMPUTE):
    return abstract_params(lm_cases.CONFIG, compute)["params"]


def adapters(config=CONFIG, dtype=np.float32):
    """A trained tree whose B are not zero, and the base it stands on."""
    shapes = language_model.unboxed(lora.abstract(config, RATES, boxed()))
    base, tables = lora.split(shapes, lm_cases.params())
    learnt = lora.start(shapes, tables, jax.random.key(3))
    rng = np.random.default_rng(4)
    return jax.tree.map(lambda x: np.asarray(x + 0.1 * rng.standard_normal(x.shape), dtype), learnt), base


def test_branches_equal_the_merged_matrices():
    with jax.enable_x64(True):
        learnt, base = adapters(dtype=np.float64)
        base = jax.tree.map(lambda x: x.astype(np.float64), base)
        rows = lm_cases.rows([[d] for d in lm_cases.DOCUMENTS], 16, 8)
        merged = lora.merge_lora(CONFIG, lm_cases.params64(), learnt)

        given = lora.variables(CONFIG, base, learnt)

        @functools.partial(jax.jit, compiler_options=lm_cases.QUICK)
        def loss(params, branches):
            return lm_loss(lm_cases.MODEL64, params, rows, LOSS, lora=branches)[0]

        branched = loss(given["params"], given["lora"])
        none = jax.tree.map(np.zeros_like, given["lora"])
        np.testing.assert_allclose(branched, loss(merged, none), rtol=1e-12)
        without = loss(given["params"], none)
    assert abs(branched - without) > 1e-3, "the branches do nothing"


def test_new_adapters_change_nothing_and_frozen_groups_get_none():
    rates = RATES | {"llm": 0.0}
    shapes = language_model.unboxed(lora.abstract(CONFIG, rates, boxed()))
    assert shapes["llm"] == {} and shapes["patch_decoder"]["head_1"]["kernel"].dtype == jnp.float32
    base, tables = lora.split(shapes, lm_cases.params())
    assert "embedding" in base["llm"] and "embedding" not in base["patch_encoder"]
    merged = lora.merge_lora(CONFIG, lm_cases.params(), lora.start(shapes, tables, jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, merged, lm_cases.params())


def test_nothing_to_train_is_refused_by_group():
    with pytest.raises(ConfigError, match=r"lora.targets: nothing to train in llm, whose learning rate is 0.001"):
        lora.abstract(LoRAConfig(rank=2, targets=("projection",)), RATES, boxed())


def test_adapters_of_another_shape_are_refused_by_name():
    learnt, _ = adapters()
    learnt["llm"]["transformer"]["layers"]["attn"]["q"]["a"] = np.zeros((2, 17, 3), np.float32)
    with pytest.raises(ConfigError, match=r"llm/transformer/layers/attn/q/kernel: expected a base with shape"):
        lora.merge_lora(CONFIG, lm_cases.params(), learnt)


# ----------------------------------------------------------------------------------------------------------
# One step and several: learning rates, meshes


def job(**changes):
    """Settings of a fine-tuning of the case model; no data is read."""
    config = jobs.LMTrainConfig(
        model=lm_cases.CONFIG,
        data=jobs.LMDataConfig({}, {}, "", 4, 16, 8),
        run=jobs.RunConfig(steps=10),
        learning_rates=LearningRates(**RATES),
        loss=LOSS,
        optimizer=OptimizerConfig(weight_decay=0.0, warmup_fraction=0.0, schedule="constant"),
        compute=lm_cases.COMPUTE64,
        init_from="base",
    )
    return dataclasses.replace(config, **changes)


@functools.cache
def steps(config: LoRAConfig, mesh_sizes: tuple[int, ...] = ()) -> tuple[list, list[float]]:
    """Trains on the case's documents, on one device or on a mesh: what is learnt after 0, 1, .. 4 steps, and losses."""
    cfg = job(lora=config)
    with jax.enable_x64(True):
        rows = lm_cases.rows([[d] for d in lm_cases.DOCUMENTS], 16, 8)
        everything = boxed(cfg.compute)
        learnt = lora.abstract(config, RATES, everything) if config.rank else everything
        params, base = lm_cases.params64(), {}
        if config.rank:
            params, base = adapters(config, np.float64)
            base = jax.tree.map(lambda x: x.astype(np.float64), base)
        optimizer = make_optimizer(cfg.optimizer, RATES, cfg.run.steps)
        update = language_model.make_train_step(cfg, lm_cases.MODEL64, optimizer)
        mesh = make_mesh(MeshConfig(*mesh_sizes or (1, 1, 1)), jax.devices()[: math.prod(mesh_sizes)])
        with jax.set_mesh(mesh):
            params = jax.device_put(params, shardings(learnt, mesh))
            base = jax.device_put(base, shardings(lora.split(learnt, everything)[0], mesh)) if base else {}
            state = TrainState.start(params, optimizer.init(trained(params, RATES)))
            step = jax.jit(update, compiler_options=lm_cases.QUICK)
            seen, losses = [jax.device_get(params)], []
            for _ in range(4):
                state, measured = step(state, loop.to_devices(rows, batch_sharding(mesh)), base)
                seen.append(jax.device_get(state.params))
                losses.append(float(measured.unpack(np.asarray(measured.values_N))["scalars"]["loss"]))
        return seen, losses


FULL = LoRAConfig()


@pytest.mark.parametrize("config", [FULL, CONFIG], ids=["full", "lora"])
def test_each_group_moves_by_its_own_learning_rate(config):
    before, after, *_ = steps(config)[0]
    for group, rate in RATES.items():  # the first step of Adam moves whatever has a gradient by the learning rate
        pairs = zip(*map(jax.tree.leaves, (before[group], after[group])), strict=True)
        assert max(float(np.abs(a - b).max()) for a, b in pairs) == pytest.approx(rate, rel=1e-3), group


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 (virtual) devices")
@pytest.mark.parametrize("config", [pytest.param(FULL, marks=pytest.mark.slow), CONFIG], ids=["full", "lora"])
def test_fine_tuning_cut_over_fsdp_and_tensor_equals_one_device(config):
    (*_, one), losses = steps(config)
    (*_, cut), cut_losses = steps(config, (1, 2, 2))
    np.testing.assert_allclose(cut_losses, losses, rtol=1e-9)
    assert losses[-1] < losses[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), cut, one)


# ----------------------------------------------------------------------------------------------------------
# The job


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base, and a LoRA run on its step 2 in bfloat16; then the base goes on to step 3."""
    folder = tmp_path_factory.mktemp("lora")
    config = jobs.language_model(folder)
    run = dataclasses.replace(config.run, steps=2, checkpoint_every=1, eval_every=2, eval_batches=1)
    base = dataclasses.replace(config, run=run)
    jobs.train(base, folder / "base")
    adapting = dataclasses.replace(
        base,
        lora=LoRAConfig(rank=2, tables=True),
        init_from=str(folder / "base"),
        compute=dataclasses.replace(base.compute, param_dtype="bfloat16"),
    )
    jobs.train(adapting, folder / "adapters")
    jobs.train(dataclasses.replace(base, run=dataclasses.replace(run, steps=3)), folder / "base")
    return folder, adapting


def test_only_adapters_and_tables_are_saved_and_loaded_ones_are_merged(runs):
    folder, config = runs
    step = folder / "adapters" / "checkpoints" / "2"
    saved = (step / "variables" / "_METADATA").read_text()
    assert "'a'" in saved and "kernel" in saved and "norm_attn" not in saved and "'attn', 'q', 'kernel'" not in saved
    _, base, _ = load_params(folder / "base", 2)
    _, merged, meta = load_params(folder / "adapters")
    assert meta["trained_groups"] == ["llm", "patch_decoder", "patch_encoder"]
    old, new = flatten(base["params"]), flatten(merged["params"])
    assert {p: (x.shape, x.dtype) for p, x in old.items()} == {p: (x.shape, x.dtype) for p, x in new.items()}
    changed = {path for path in old if not np.array_equal(old[path], new[path])}
    assert changed == {
        p for p in old if lora.is_table(p) or (p.endswith("kernel") and p.split("/")[-2] in config.lora.targets)
    }
    part = {
        "llm": jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), merged["params"]["llm"]
        )
    }
    jax.tree.map(np.testing.assert_array_equal, transfer(step, part)["llm"], merged["params"]["llm"])


def test_base_has_no_moments_and_its_loss_is_where_the_run_begins(runs):
    folder, _ = runs
    assert "norm_attn" not in (folder / "adapters" / "checkpoints" / "2" / "optimizer" / "_METADATA").read_text()
    lines = {name: metrics.read(folder / name / "metrics.jsonl") for name in ("base", "adapters")}
    last, first = (
        next(line for line in lines[name] if line["split"] == "validation" and line["step"] == step)
        for name, step in (("base", 2), ("adapters", 0))
    )
    assert first["loss"] == pytest.approx(last["loss"], rel=1e-2)  # the base is rounded to bfloat16


def test_continued_run_ends_with_the_same_bits_although_its_base_went_on(runs, monkeypatch):
    folder, config = runs
    shutil.copytree(folder / "adapters", folder / "again")
    shutil.rmtree(folder / "again" / "checkpoints" / "2")
    hashed, verify = [], checkpoint.verify
    monkeypatch.setattr(checkpoint, "verify", lambda path, *rest: (hashed.append(path), verify(path, *rest)))
    jobs.train(config, folder / "again")
    assert jobs.digest(folder / "again", 2) == jobs.digest(folder / "adapters", 2)
    base = folder / "base" / "checkpoints" / "2"
    assert hashed[:2] == [folder / "again" / "checkpoints" / "1", base], "its own step, then the base"
    assert base_of(folder / "again" / "checkpoints" / "2") == base


def test_adapters_find_their_base_and_refuse_another(runs, tmp_path):
    folder, _ = runs
    shutil.copytree(folder / "base", tmp_path / "base")
    shutil.copytree(folder / "adapters", tmp_path / "adapters")
    step, base = tmp_path / "adapters" / "checkpoints" / "2", tmp_path / "base" / "checkpoints" / "2"
    meta = step / "meta" / "metadata"
    values = json.loads(meta.read_text())
    values["base"]["path"] = str(tmp_path / "gone" / "checkpoints" / "2")
    meta.write_text(json.dumps(values))
    assert base_of(step) is not None, "both were moved together"
    marker = base / "commit.json"
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    marker.write_text(marker.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"step 2 of the run .*/gone \(fingerprint \w+\), but it is missing;"):
        base_of(step)
    for place in (".", "checkpoints", "checkpoints/2"):
        assert base_of(step, tmp_path / "copy" / place) == tmp_path / "copy" / "checkpoints" / "2"
    values["base"]["path"] = str(base)
    meta.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="another checkpoint is there"):
        base_of(step)


def test_a_base_that_its_run_removed_is_named_and_taken_from_a_copy(runs, tmp_path):
    folder, config = runs
    shutil.copytree(folder / "adapters", folder / "orphans")
    (folder / "base" / "checkpoints" / "2").rename(tmp_path / "copy")
    try:
        with pytest.raises(CheckpointError) as caught:
            jobs.train(config, folder / "orphans")
        said = str(caught.value)
        assert f"step 2 of the run {folder / 'base'} " in said and "the run has kept steps [1, 3]" in said
        assert "put a copy back there" in said
        jobs.train(dataclasses.replace(config, init_from=str(tmp_path / "copy")), folder / "orphans")
    finally:
        (tmp_path / "copy").rename(folder / "base" / "checkpoints" / "2")

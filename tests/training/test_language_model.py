"""The language-model job on real shards: stages hand over to each other, nothing is weighed wrongly."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from training import jobs

from mimo_jax.config import MeshConfig
from mimo_jax.data.lm_rows import lm_loader
from mimo_jax.models.audio_lm import AudioLM, init_params
from mimo_jax.training import metrics
from mimo_jax.training.checkpoint import CheckpointError, load_params
from mimo_jax.training.language_model import count_rows, make_train_step, train_flops
from mimo_jax.training.optimizer import make_optimizer, trained
from mimo_jax.training.state import TrainState


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return jobs.language_model(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def text_run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("text")
    jobs.train(jobs.text_only(config), workdir)
    return workdir


@pytest.fixture(scope="module")
def joint_run(config, text_run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("joint")
    cut = MeshConfig(data=2, fsdp=2)  # the text run was on data=4
    held = dataclasses.replace(config.data.validation["held"], layouts=dataclasses.replace(jobs.ALL_LAYOUTS, text=0.0))
    data = dataclasses.replace(config.data, validation={"held": held, "words": config.data.sources["words"]})
    jobs.train(dataclasses.replace(config, init_from=str(text_run), mesh=cut, data=data), workdir)
    return workdir


def initial(config):
    return init_params(config.model, config.compute, jax.random.key(config.run.seed))["params"]


def test_text_run_trains_the_llm_and_leaves_the_rest_as_initialised(config, text_run):
    _, variables, meta = load_params(text_run)
    assert meta["trained_groups"] == ["llm"]
    start = initial(config)
    for group in ("patch_encoder", "patch_decoder"):
        jax.tree.map(np.testing.assert_array_equal, variables["params"][group], start[group])
    assert not np.array_equal(variables["params"]["llm"]["head"], start["llm"]["head"])


@pytest.mark.slow
def test_stage_takes_over_what_the_one_before_has_trained(config, text_run, tmp_path, capsys):
    frozen = dataclasses.replace(
        config,
        init_from=str(text_run),
        learning_rates=dataclasses.replace(config.learning_rates, llm=0.0),
        run=dataclasses.replace(config.run, steps=1, seed=7),
    )
    jobs.train(frozen, tmp_path)
    _, variables, meta = load_params(tmp_path)
    assert meta["trained_groups"] == ["llm", "patch_decoder", "patch_encoder"]
    jax.tree.map(np.testing.assert_array_equal, variables["params"]["llm"], load_params(text_run)[1]["params"]["llm"])
    assert f"llm from {text_run}" in capsys.readouterr().out


def test_start_from_another_shape_is_refused_by_name(config, text_run, tmp_path):
    model = dataclasses.replace(config.model, llm=dataclasses.replace(config.model.llm, d_ff=80))
    with pytest.raises(CheckpointError, match=r"llm/transformer/.*mlp.*64.*"):
        jobs.train(dataclasses.replace(config, model=model, init_from=str(text_run)), tmp_path)


COUNT = """
import sys, jax, numpy as np
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
from mimo_jax.config import MeshConfig
from mimo_jax.rows import LMRows
from mimo_jax.sharding import batch_sharding, make_mesh
from mimo_jax.training import loop
from mimo_jax.training.language_model import count_rows
rng = np.random.default_rng(0)
segments, patches = rng.integers(0, 2, (8, 64)), rng.integers(0, 65, (8, 32))
rows = LMRows(segments, patches, patches, segments, segments, segments, segments, patches)
mesh = make_mesh(MeshConfig())
half = slice(4 * int(sys.argv[2]), 4 * int(sys.argv[2]) + 4)
with jax.set_mesh(mesh):
    counted = jax.jit(lambda rows: count_rows(rows, 4))(
        loop.to_devices(LMRows(*(x[half] for x in rows)), batch_sharding(mesh))
    )
print(float(counted["positions"]) - (segments > 0).sum(), float(counted["patches"]) - (patches < 64).sum())
"""


def test_tokens_are_counted_over_all_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    commands = [[sys.executable, "-c", COUNT, str(port), str(i)] for i in range(2)]
    processes = [subprocess.Popen(c, env=environment, stdout=-1, stderr=-1, text=True) for c in commands]
    done = [process.communicate(timeout=120) for process in processes]
    assert [out.splitlines()[-1] for out, _ in done] == ["0.0 0.0"] * 2, done


def test_training_lowers_the_validation_loss_and_reports_channels_and_tasks(config, joint_run):
    lines = metrics.read(joint_run / "metrics.jsonl")
    validation = [line for line in lines if line["split"] == "validation"]
    assert [line["step"] for line in validation] == [0, 3, 6]
    assert validation[-1]["loss"] < validation[0]["loss"]
    train = [line for line in lines if line["split"] == "train"][-1]
    assert {f"channel/{r}/ce" for r in range(2)} | {"text/word_ce", "audio/ce", "loss"} <= set(train)
    assert sum(name.endswith("word_ce") and name.startswith("task/") for name in validation[0]) >= 4
    for group in ("llm", "patch_encoder", "patch_decoder"):
        assert train[f"gradient_norm/{group}"] > 0 and train[f"update_norm/{group}"] > 0
        assert train[f"learning_rate/{group}"] > 0
    assert train["total/positions"] == train["total/patches"] + train["total/text_tokens"]
    assert train["tokens"] == validation[-1]["tokens"] == 6 * 4 * 128
    loader = lm_loader(config, "train")
    rows = [next(loader) for _ in range(6)]
    loader.close()
    assert train["total/positions"] == sum(int((r.segment_ids_BL > 0).sum()) for r in rows)
    assert train["total/patches"] == sum(int((r.patch_positions_BC < 128).sum()) for r in rows)
    assert train["total/audio_hours"] == pytest.approx(train["total/patches"] * 4 / 25 / 3600, rel=1e-5)


def test_forgetting_of_text_is_measured_from_where_the_text_model_ended(text_run, joint_run):
    before, after = (
        [line for line in metrics.read(run / "metrics.jsonl") if line["split"] == "validation"]
        for run in (text_run, joint_run)
    )
    assert after[0]["task/text/word_ce"] == pytest.approx(before[-1]["task/text/word_ce"], rel=1e-5)
    assert after[-1]["task/text/word_ce"] != after[0]["task/text/word_ce"]


def test_loss_before_the_first_step_is_that_of_a_uniform_guess(joint_run):
    first = metrics.read(joint_run / "metrics.jsonl")[0]
    assert first["channel/0/ce"] == pytest.approx(np.log(1025), rel=0.02)


def step_of(config, state_of=None):
    """One training step on the first batch, in one process on one device: state and metrics."""
    model = AudioLM(config.model, config.compute)
    rates = dataclasses.asdict(config.learning_rates)
    optimizer = make_optimizer(config.optimizer, rates, config.run.steps)
    params = initial(config)
    state = TrainState.start(params, optimizer.init(trained(params, rates)))
    loader = lm_loader(config, "train")
    rows = next(loader)
    loader.close()
    return jax.jit(make_train_step(config, model, optimizer))(state, rows)


@pytest.mark.slow
def test_accumulated_step_equals_the_step_on_the_whole_batch(config):
    whole, whole_metrics = step_of(config)
    accumulating = dataclasses.replace(config, run=dataclasses.replace(config.run, accumulation=2))
    parts, parts_metrics = step_of(accumulating)
    a, b = (m.unpack(np.asarray(m.values_N)) for m in (whole_metrics, parts_metrics))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), a, b)
    moments = [jax.tree.leaves(s.optimizer) for s in (whole, parts)]
    for x, y in zip(*moments, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-5 * float(np.abs(np.asarray(x)).max() + 1e-6))


def test_flops_are_three_forward_passes_of_the_documents(config):
    loader = lm_loader(config, "train")
    rows = next(loader)
    loader.close()
    counters = {name: float(value) for name, value in count_rows(rows, config.model.group_size).items()}
    lengths, patches = [], []
    for b in range(len(rows.text_BL)):
        at = rows.patch_positions_BC[b][rows.patch_positions_BC[b] < rows.text_BL.shape[1]]
        for segment in range(1, rows.segment_ids_BL[b].max() + 1):
            lengths.append(int((rows.segment_ids_BL[b] == segment).sum()))
            patches.append(int((rows.segment_ids_BL[b][at] == segment).sum()))
    assert counters["positions"] == sum(lengths) and counters["patches"] == sum(patches)
    expected = sum(3 * n * config.model.flops_per_position(n, p / n) for n, p in zip(lengths, patches, strict=True))
    assert train_flops(config, counters) == pytest.approx(expected, rel=1e-5)

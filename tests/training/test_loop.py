"""The loop: what it skips, when it stops, how it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from training import toy

from mimo_jax.config import ConfigError, MeshConfig
from mimo_jax.sharding import batch_sharding, make_mesh
from mimo_jax.training import checkpoint, loop, metrics

# Metrics that depend on how fast the machine is.
CLOCKED = {"step_seconds", "rows_per_second", "data_wait", "flops_per_second"}


def lines(workdir, split: str) -> list[dict]:
    """Lines of a split, without what the clock says."""
    found = metrics.read(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in found if line["split"] == split]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 12 steps: folder and digest."""
    workdir = tmp_path_factory.mktemp("whole")
    loader = toy.ToyLoader()
    state = toy.train(workdir, toy.make_config(12), loader)
    assert loader.seen == list(range(1, 13))
    return workdir, toy.digest(state)


def test_validates_before_the_first_step_in_between_and_at_the_end(whole):
    validation = lines(whole[0], "validation")
    assert [line["step"] for line in validation] == [0, 8, 12]
    assert validation[-1]["loss"] < validation[0]["loss"]


def test_writes_every_interval_and_the_totals(whole):
    train = lines(whole[0], "train")
    assert [line["step"] for line in train] == [2, 4, 6, 8, 10, 12]
    assert train[-1]["total/rows"] == 96 and train[-1]["total/skipped_steps"] == 0
    assert {"gradient_norm/llm", "update_norm/patch_encoder"} <= set(train[0])
    assert "gradient_norm/patch_decoder" not in train[0], "frozen groups have no gradient"


def test_console_shows_loss_speed_and_remaining_time(tmp_path, capsys):
    toy.train(tmp_path, toy.make_config(4), toy.ToyLoader())
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("step 4/4") and "rows/s" in x)
    assert "loss " in line and "data wait" in line and "ETA 0s" in line


def test_finished_run_is_left_alone(whole, capsys):
    before = (whole[0] / "metrics.jsonl").read_text()
    loader = toy.ToyLoader()
    state = toy.train(whole[0], toy.make_config(12), loader)
    assert toy.digest(state) == whole[1] and loader.seen == []
    assert (whole[0] / "metrics.jsonl").read_text() == before
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_the_same_command_goes_on_exactly(whole, tmp_path, number, code):
    before = signal.getsignal(number)  # a shell that starts jobs in the background has them ignore Ctrl-C
    with pytest.raises(SystemExit) as stopped:
        toy.train(tmp_path, toy.make_config(12), toy.ToyLoader(signals={7: number}))
    assert stopped.value.code == code
    assert checkpoint.good_steps(tmp_path / "checkpoints")[-1] == 7, "the step in progress is finished and saved"
    assert signal.getsignal(number) == before
    loader = toy.ToyLoader()
    state = toy.train(tmp_path, toy.make_config(12), loader)
    assert loader.seen == [8, 9, 10, 11, 12]
    assert toy.digest(state) == whole[1]
    assert lines(tmp_path, "validation") == lines(whole[0], "validation")
    assert lines(tmp_path, "train")[-1] == lines(whole[0], "train")[-1]


@pytest.mark.parametrize(("at", "call"), [(0, 2), (1, 2), (1, 1)])
def test_signal_breaks_a_validation_off_and_saves_that_step(whole, tmp_path, monkeypatch, at, call):
    evaluate, calls = loop.evaluate, []

    def signalling(batches):
        for i, rows in enumerate(batches):
            if i == at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield rows

    def interrupted(eval_step, state, batches, *rest):
        calls.append(1)
        return evaluate(eval_step, state, signalling(batches) if len(calls) == call else batches, *rest)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    with pytest.raises(SystemExit, match="143"):
        toy.train(tmp_path, toy.make_config(12), toy.ToyLoader())
    assert checkpoint.good_steps(tmp_path / "checkpoints")[-1:] == ([8] if call == 2 else [])
    assert [line["step"] for line in lines(tmp_path, "validation")] == ([0] if call == 2 else [])
    monkeypatch.undo()
    assert toy.digest(toy.train(tmp_path, toy.make_config(12), toy.ToyLoader())) == whole[1]


PROGRAM = """
import json, pathlib, sys, time
from training import toy

class Slow(toy.ToyLoader):
    def __next__(self):
        if self.position == 5:
            print("asleep", flush=True)
            time.sleep(60)
        return super().__next__()

toy.train(pathlib.Path(sys.argv[1]), toy.make_config(12, **json.loads(sys.argv[2])), Slow())
"""


@pytest.mark.parametrize(
    ("settings", "number", "code", "message"),
    [
        ({"hang_seconds": 8.0}, None, 1, "in __next__"),
        ({"grace_seconds": 0.5}, signal.SIGTERM, 143, "no step ended within 0.5 s"),
    ],
    ids=["hang", "grace"],
)
def test_a_run_that_is_stuck_ends_itself_and_its_checkpoint_is_intact(tmp_path, settings, number, code, message):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(settings)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment) as process:
        assert process.stdout is not None
        while "asleep" not in process.stdout.readline():
            assert process.poll() is None
        while not checkpoint.good_steps(tmp_path / "checkpoints"):  # it is written in the background
            time.sleep(0.05)
        if number is not None:
            process.send_signal(number)
        _, errors = process.communicate(timeout=40)
    assert process.returncode == code and message in errors, errors
    assert checkpoint.good_steps(tmp_path / "checkpoints") == [4]


def test_run_can_be_made_longer(whole, tmp_path):
    """With a constant schedule, 6 + 6 steps are 12 steps."""
    import dataclasses

    def constant(steps: int):
        config = toy.make_config(steps)
        return dataclasses.replace(
            config, optimizer=dataclasses.replace(config.optimizer, schedule="constant", warmup_fraction=0.0)
        )

    toy.train(tmp_path / "a", constant(6), toy.ToyLoader())
    longer = toy.train(tmp_path / "a", constant(12), toy.ToyLoader())
    at_once = toy.train(tmp_path / "b", constant(12), toy.ToyLoader())
    assert toy.digest(longer) == toy.digest(at_once)


def test_non_finite_batch_is_skipped_recorded_and_its_data_is_not_used_again(tmp_path):
    loader = toy.ToyLoader(poison=[5])
    state = toy.train(tmp_path, toy.make_config(8), loader)
    assert loader.seen == list(range(1, 9))
    assert (int(state.step), int(state.skipped), int(state.bad_in_row)) == (8, 1, 0)
    (skipped,) = lines(tmp_path, "skipped")
    assert skipped["step"] == 5 and skipped["loss"] is None and skipped["gradient_norm"] is None
    train = {line["step"]: line for line in lines(tmp_path, "train")}
    assert train[6]["loss"] is not None and train[8]["total/skipped_steps"] == 1
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state.params))


def test_too_many_non_finite_steps_in_a_row_end_the_run_with_the_last_good_checkpoint(tmp_path):
    config = toy.make_config(20, max_bad_steps=3)
    with pytest.raises(loop.TrainingError, match=r"not finite in 3 steps in a row.*max_bad_steps = 3"):
        toy.train(tmp_path, config, toy.ToyLoader(poison=[6, 7, 8]))
    assert checkpoint.good_steps(tmp_path / "checkpoints") == [4], "no checkpoint of the broken state"
    assert [line["step"] for line in lines(tmp_path, "skipped")] == [6, 7, 8]


def test_bad_steps_that_are_not_in_a_row_do_not_end_the_run(tmp_path):
    state = toy.train(tmp_path, toy.make_config(8, max_bad_steps=2), toy.ToyLoader(poison=[2, 4, 6]))
    assert int(state.skipped) == 3


def test_run_with_other_settings_or_in_use_is_refused(whole):
    import dataclasses

    other = dataclasses.replace(toy.make_config(12), run=dataclasses.replace(toy.make_config(12).run, seed=1))
    with pytest.raises(checkpoint.CheckpointError, match=r"run\.seed was 0 and is 1"):
        toy.train(whole[0], other, toy.ToyLoader())
    assert json.loads((whole[0] / "config.json").read_text())["run"]["seed"] == 0, "the run keeps its own settings"
    with loop.working_directory(whole[0]), pytest.raises(loop.TrainingError, match="another process"):
        toy.train(whole[0], toy.make_config(12), toy.ToyLoader())


def test_working_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="not writable.*file/run"):
        toy.train(tmp_path / "file" / "run", toy.make_config(2), toy.ToyLoader())
    with pytest.raises(OSError, match="mounted.*gs://bucket/run"):
        toy.train("gs://bucket/run", toy.make_config(2), toy.ToyLoader())


def test_read_only_working_directory_is_named(tmp_path, monkeypatch):
    import errno
    import pathlib

    def refuse(self, *arguments, **keywords):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "open", refuse)  # tests may run as root, whom no permission stops
    with pytest.raises(PermissionError, match="working directory is not writable") as error:
        toy.train(tmp_path, toy.make_config(2), toy.ToyLoader())
    assert str(tmp_path) in str(error.value)


def test_rows_that_cannot_be_cut_are_refused():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    loop.check_rows(8, 2, mesh)
    with pytest.raises(ConfigError, match=r"data\.rows: .*2 \* 2 \* 2.*got 12"):
        loop.check_rows(12, 2, mesh)


def test_moments_lie_like_their_parameters():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    config = toy.make_config(4)
    optimizer = toy.make_optimizer(config.optimizer, toy.RATES, 4)
    abstract = jax.eval_shape(
        lambda key: toy.TrainState.start(toy.init(key), optimizer.init(toy.trained(toy.init(key), toy.RATES))),
        jax.random.key(0),
    )
    cut = {
        "kernel": NamedSharding(mesh, PartitionSpec("fsdp", None)),
        "bias": NamedSharding(mesh, PartitionSpec("fsdp")),
    }
    placed = loop.state_shardings(abstract, dict.fromkeys(toy.RATES, cut), mesh)
    specs = {jax.tree_util.keystr(k): s.spec for k, s in jax.tree_util.tree_leaves_with_path(placed)}
    moments = [spec for name, spec in specs.items() if ".nu" in name and "kernel" in name]
    assert moments == [PartitionSpec("fsdp", None)] * 2
    assert all(spec == PartitionSpec() for name, spec in specs.items() if "count" in name or "step" in name)


@pytest.mark.parametrize("devices", [1, 4])
def test_accumulated_gradient_equals_that_of_the_whole_batch(devices):
    """Rows have different numbers of targets: a mean of micro-batch means would be wrong."""
    mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((16, 6)), (rng.random((16, 6)) < np.linspace(0.1, 1, 16)[:, None]) * 1.0
    kernel = rng.standard_normal((6, 6))

    def run(count: int):
        def step(kernel, rows):
            _, w_BL = rows
            total = w_BL.sum()

            def loss(kernel, x_BL, w_BL):
                return jnp.sum(w_BL * jnp.tanh(x_BL @ kernel) ** 2) / total

            def micro(rows):
                return jax.value_and_grad(loss)(kernel, *rows)

            return loop.accumulate(micro, rows, count)

        with jax.set_mesh(mesh):
            return jax.jit(step)(jnp.asarray(kernel), loop.to_devices((x, w), batch_sharding(mesh)))

    with jax.enable_x64(True):
        whole, parts = run(1), run(4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), whole, parts)


def test_empty_validation_set_is_an_error():
    with pytest.raises(loop.TrainingError, match="validation"):
        loop.evaluate(lambda s, r: None, None, [], lambda r: r, dict, 0, lambda: False)


def test_validation_weighs_batches_by_their_counts_and_stops_at_the_limit():
    batches = [{"total": 1.0, "count": 1.0}, {"total": 9.0, "count": 3.0}, {"total": 100.0, "count": 1.0}]

    def run(limit: int) -> dict:
        return loop.evaluate(
            lambda state, rows: metrics.StepMetrics.make(rows),
            None,
            batches,
            lambda rows: rows,
            lambda sums: {"loss": sums["total"] / sums["count"], "absent": np.nan},
            limit,
            lambda: False,
        )

    assert run(2) == {"loss": 2.5}
    assert run(0) == {"loss": 22.0}

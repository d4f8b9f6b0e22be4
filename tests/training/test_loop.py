"""The loop: what it skips, when it stops, how it goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
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


@pytest.mark.parametrize(
    ("damage", "item", "message"),
    [
        ("flip", "variables", r"checkpoint passed over: .*/9/{file}: damaged: size or SHA-256 differs"),
        ("delete", "optimizer", r"checkpoint passed over: .*/9/{file}: missing"),
        ("half", "variables", r"unfinished checkpoint removed: .*/9$"),
    ],
    ids=["flip", "delete", "half"],
)
def test_a_broken_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(whole, tmp_path, damage, item, message):
    with pytest.raises(SystemExit):
        toy.train(tmp_path, toy.make_config(12), toy.ToyLoader(signals={9: signal.SIGTERM}))
    newest = tmp_path / "checkpoints" / "9"
    file = max((p for p in (newest / item).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    if damage == "half":  # as a process leaves it that is killed while it writes
        (newest / "commit.json").unlink()
    loader = toy.ToyLoader()
    with pytest.warns(UserWarning, match=message.format(file=file.relative_to(newest))):
        state = toy.train(tmp_path, toy.make_config(12), loader)
    assert loader.seen == [9, 10, 11, 12] and toy.digest(state) == whole[1]
    assert (tmp_path / "checkpoints" / "9.damaged").is_dir() == (damage != "half")


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
    with pytest.raises(loop.TrainingError, match=r"not finite, or a spike, in 3 steps in a row.*max_bad_steps = 3"):
        toy.train(tmp_path, config, toy.ToyLoader(poison=[6, 7, 8]))
    assert checkpoint.good_steps(tmp_path / "checkpoints") == [4], "no checkpoint of the broken state"
    assert [line["step"] for line in lines(tmp_path, "skipped")] == [6, 7, 8]


def test_bad_steps_that_are_not_in_a_row_do_not_end_the_run(tmp_path):
    state = toy.train(tmp_path, toy.make_config(8, max_bad_steps=2), toy.ToyLoader(poison=[2, 4, 6]))
    assert int(state.skipped) == 3


def spiky(steps: int = 20, **run: int):
    """A job that skips spikes, once it has seen six good steps, and rounds its moments at random."""
    config = toy.make_config(steps, **{"keep_checkpoints": 20, "max_rollbacks": 2, **run})
    rounded = dict(moment_dtype="bfloat16", stochastic_rounding=True)
    optimizer = dataclasses.replace(config.optimizer, spike_sigmas=20.0, spike_window=6, **rounded)
    return dataclasses.replace(config, optimizer=optimizer)


def test_a_spike_leaves_every_bit_as_it_was_and_is_recorded(tmp_path, capsys):
    state = toy.train(tmp_path, spiky(12, checkpoint_every=1), toy.ToyLoader(spikes=[2, 9]))
    assert int(state.skipped) == 1, "nothing is a spike before the window is full"
    (line,) = lines(tmp_path, "skipped")
    assert line["step"] == 9 and line["loss"] > 1e5 and line["rows_left_out"] == 8
    assert "step 9/12  SKIPPED: loss " in capsys.readouterr().out
    before, at, after = (checkpoint.load_params(tmp_path, step)[1] for step in (8, 9, 10))
    jax.tree.map(np.testing.assert_array_equal, before, at)
    assert not np.array_equal(at["params"]["llm"]["kernel"], after["params"]["llm"]["kernel"])


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory):
    """A run of 20 steps whose batches 9, 10 and 11 are spikes: folder, state, steps whose batch was asked for."""
    workdir, loader = tmp_path_factory.mktemp("rolled"), toy.ToyLoader(spikes=[9, 10, 11])
    state = toy.train(workdir, spiky(rollback_after=2), loader)
    return workdir, state, loader.seen


def test_after_skipped_steps_in_a_row_the_run_goes_back_and_on_with_the_rows_after_them(rolled_back):
    workdir, state, seen = rolled_back
    (line,) = lines(workdir, "rollback")
    assert (line["step"], line["to_step"], line["rows_left_out"]) == (10, 8, 16) and line["loss"] > 1e5
    assert [line["step"] for line in lines(workdir, "skipped")] == [9, 10, 11]
    first = seen.index(11)
    assert seen == [*range(1, first + 2), *range(11, 21)], "some are read ahead, and read again"
    train = lines(workdir, "train")[-1]
    assert train["total/rows"] == 160 and train["total/rollbacks"] == 1 and train["total/skipped_steps"] == 3
    assert (int(state.step), int(state.skipped)) == (20, 3)
    assert lines(workdir, "validation")[-1]["loss"] < lines(workdir, "validation")[0]["loss"]


def test_rhythm_of_reports_does_not_matter_to_a_rollback(rolled_back, tmp_path):
    other = toy.train(tmp_path, spiky(rollback_after=2, log_every=7), toy.ToyLoader(spikes=[9, 10, 11]))
    assert toy.digest(other) == toy.digest(rolled_back[1])


SPIKY = """
import pathlib, signal, sys
import jax
if len(sys.argv) > 3:
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[4]}", 2, int(sys.argv[3]))
from training import test_loop, toy
loader = toy.ToyLoader(spikes=[9, 10, 11], signals={int(sys.argv[2]): signal.SIGKILL})
toy.train(pathlib.Path(sys.argv[1]), test_loop.spiky(rollback_after=2), loader)
"""


@pytest.mark.parametrize("kill_at", [12, 15])
def test_killed_after_a_rollback_the_run_ends_with_the_same_bits_and_lines(rolled_back, tmp_path, kill_at):
    """Step 12 comes before the next checkpoint: the spikes and the rollback come again."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3]))}
    killed = subprocess.run([sys.executable, "-c", SPIKY, str(tmp_path), str(kill_at)], env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    state = toy.train(tmp_path, spiky(rollback_after=2), toy.ToyLoader(spikes=[9, 10, 11]))
    assert toy.digest(state) == toy.digest(rolled_back[1])
    for split in ("validation", "skipped", "rollback", "train"):
        assert lines(tmp_path, split) == lines(rolled_back[0], split)


@pytest.mark.slow
def test_two_processes_go_back_like_one(rolled_back, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(map(str, Path(__file__).parents[1:3]))
    environment = {**os.environ, "PYTHONPATH": paths, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", SPIKY, str(tmp_path), "0"]
    processes = [subprocess.Popen([*command, str(i), str(port)], env=environment) for i in range(2)]
    assert [process.wait(timeout=180) for process in processes] == [0, 0]
    for split in ("skipped", "rollback", "validation"):
        one, two = lines(rolled_back[0], split), lines(tmp_path, split)
        assert [line["step"] for line in one] == [line["step"] for line in two]
        assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-5)


def test_rollbacks_end_where_they_do_not_help_or_have_no_checkpoint(tmp_path):
    spikes = [9, 10, 13, 14, 17, 18]
    with pytest.raises(loop.TrainingError, match=r"step 18: 2 steps in a row .* 2 rollbacks were not enough"):
        toy.train(tmp_path / "many", spiky(rollback_after=2), toy.ToyLoader(spikes=spikes))
    assert [line["to_step"] for line in lines(tmp_path / "many", "rollback")] == [8, 12]
    with pytest.raises(loop.TrainingError, match="step 2: 2 steps in a row .* no checkpoint to go back to"):
        toy.train(tmp_path / "early", spiky(rollback_after=2), toy.ToyLoader(poison=[1, 2]))


def test_a_checkpoint_among_bad_steps_is_not_what_a_rollback_goes_back_to(tmp_path):
    config = spiky(16, rollback_after=3, keep_checkpoints=1)
    toy.train(tmp_path, config, toy.ToyLoader(poison=[11, 12, 13]))
    (line,) = lines(tmp_path, "rollback")
    assert (line["step"], line["to_step"]) == (13, 8), "step 12 was saved after two bad ones, and 8 kept"
    assert checkpoint.good_steps(tmp_path / "checkpoints") == [16]


def test_a_run_that_goes_back_at_its_last_step_is_finished_and_saved(tmp_path, capsys):
    config = spiky(12, rollback_after=2)
    state = toy.train(tmp_path, config, toy.ToyLoader(poison=[11, 12]))
    assert [line["step"] for line in lines(tmp_path, "rollback")] == [12]
    assert lines(tmp_path, "validation")[-1]["step"] == checkpoint.good_steps(tmp_path / "checkpoints")[-1] == 12
    assert toy.digest(toy.train(tmp_path, config, toy.ToyLoader())) == toy.digest(state)
    assert "nothing to do" in capsys.readouterr().out


def test_with_less_patience_a_run_among_bad_steps_goes_back_at_once(tmp_path):
    loader = toy.ToyLoader(poison=[9, 10], signals={10: signal.SIGTERM})
    with pytest.raises(SystemExit):
        toy.train(tmp_path, spiky(12, rollback_after=3), loader)
    toy.train(tmp_path, spiky(12, rollback_after=2), toy.ToyLoader())
    assert [line["step"] for line in lines(tmp_path, "skipped")] == [9, 10, 11]
    assert [(line["step"], line["to_step"]) for line in lines(tmp_path, "rollback")] == [(11, 8)]


def test_run_with_other_settings_or_in_use_is_refused(whole):
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
    with pytest.raises(ConfigError, match=r"data\.rows: .*2 \* 4.*got 10"):
        loop.check_rows(10, 2, mesh)
    with pytest.raises(ConfigError, match=r"run\.accumulation: expected a divisor of the 3 rows .*got 2"):
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

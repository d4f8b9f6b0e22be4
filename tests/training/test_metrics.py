"""Metrics must weigh every target the same, survive a kill, and never show a step twice."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.training import metrics
from mimo_jax.training.metrics import MetricsWriter, StepMetrics, summarize


def one(total: float, count: float, good: bool = True, bad: int = 0, rows: float = 4.0) -> StepMetrics:
    sums = {"loss": jnp.float32(total), "count": jnp.float32(count), "codes": jnp.array([1.0, count])}
    return StepMetrics.make(sums, {"norm": total, "good": good, "bad_in_row": bad}, {"rows": rows})


def test_sums_and_counters_add_up_and_scalars_average():
    summary = summarize([1, 2], [one(2.0, 1.0), one(4.0, 5.0)])
    assert summary.sums["loss"] == 6.0 and summary.sums["count"] == 6.0
    np.testing.assert_array_equal(summary.sums["codes"], [2.0, 6.0])
    assert summary.scalars == {"norm": 3.0} and summary.counters == {"rows": 8.0}
    assert summary.skipped == [] and summary.bad_in_row == 0


def test_skipped_steps_are_listed_and_stay_out_of_means_but_their_data_counts():
    steps = [one(2.0, 1.0), one(np.nan, 1.0, good=False, bad=1), one(np.inf, 1.0, good=False, bad=2), one(4.0, 1.0)]
    summary = summarize([5, 6, 7, 8], steps)
    assert summary.sums["loss"] == 6.0 and summary.scalars == {"norm": 3.0}
    assert summary.counters == {"rows": 16.0}
    assert [step for step, _ in summary.skipped] == [6, 7] and (summary.last, summary.bad_in_row) == (8, 0)
    frozen = summarize([5, 6, 7, 8], steps, patience=2)
    assert (frozen.last, frozen.bad_in_row) == (7, 2), "after two bad steps nothing was changed any more"
    assert frozen.counters == {"rows": 12.0} and frozen.sums["loss"] == 2.0


def test_interval_without_any_finite_step_has_no_sums():
    assert summarize([1], [one(np.nan, 1.0, good=False, bad=1)]).sums is None


def test_metrics_come_out_of_a_jitted_step_as_they_went_in():
    made = jax.jit(lambda x: StepMetrics.make({"a": x, "b": (x[0], x[1:])}, {"s": x[1]}))(jnp.arange(3.0))
    tree = made.unpack(np.asarray(made.values_N))
    np.testing.assert_array_equal(tree["sums"]["a"], [0, 1, 2])
    np.testing.assert_array_equal(tree["sums"]["b"][1], [1, 2])
    assert tree["sums"]["b"][0] == 0 and tree["scalars"]["s"] == 1


def test_lines_are_json_and_what_is_not_finite_becomes_null(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(3, "train", {"loss": 1.5, "norm": float("nan")})
    writer.write(3, "skipped", {"loss": float("inf")})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 3, "split": "train", "loss": 1.5, "norm": None}
    assert json.loads(lines[1]) == {"step": 3, "split": "skipped", "loss": None}


def write_steps(folder, steps, resume=None) -> None:
    writer = MetricsWriter(folder, resume)
    for step in steps:
        writer.write(step, "train", {"loss": float(step)})
    writer.close()


def test_resuming_drops_later_and_unfinished_lines(tmp_path):
    write_steps(tmp_path, [10, 20, 30])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "spl')  # the process was killed here
    write_steps(tmp_path, [25, 30], resume=20)
    assert [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")] == [10, 20, 25, 30]


def test_starting_afresh_drops_every_line(tmp_path):
    write_steps(tmp_path, [0, 10])
    write_steps(tmp_path, [0])
    assert [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")] == [0]


def test_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        metrics.read(path)


def test_tensorboard_shows_each_step_once_after_resuming(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_steps(tmp_path, [10, 20, 30])
    # Event files are read in the order of their names, which begin with the second they were made in.
    first = next((tmp_path / "tensorboard").iterdir())
    first.rename(first.with_name("events.out.tfevents.1000000000.first"))
    write_steps(tmp_path, [25], resume=20)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [10, 20, 25]


def test_tensorboard_forgets_a_run_that_was_killed_before_its_first_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_steps(tmp_path, [0, 10])
    first = next((tmp_path / "tensorboard").iterdir())
    first.rename(first.with_name("events.out.tfevents.1000000000.first"))
    write_steps(tmp_path, [0])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [0]

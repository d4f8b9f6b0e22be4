"""The loop that every training job runs, once the job has built its step, its data and its validation."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mimo_jax.atomic import atomic_write
from mimo_jax.config import ConfigError, JobConfig, TrainingConfig
from mimo_jax.config_files import to_json
from mimo_jax.data.loader import RowLoader
from mimo_jax.progress import clock
from mimo_jax.sharding import BATCH_AXES, check_batch
from mimo_jax.training import metrics as metrics_lib
from mimo_jax.training.checkpoint import CheckpointStore, check_same_run, make_meta, read_meta
from mimo_jax.training.health import Watch
from mimo_jax.training.metrics import MetricsWriter, StepMetrics
from mimo_jax.training.signals import stop_signal, watchdog
from mimo_jax.training.state import TrainState, Tree


class TrainingError(RuntimeError):
    """The run cannot go on, for example because too many steps in a row were not finite."""


@dataclasses.dataclass(frozen=True)
class View:
    """How a job's metrics are read and shown."""

    # Makes metrics, such as means, of the job's sums; `loss` is among them, NaN where nothing was counted.
    describe: Callable[[Any], Mapping[str, Any]]
    losses: Mapping[str, str]  # label on the console -> name of the metric
    unit: str  # label of the throughput
    counter: str  # name of the counter that the throughput counts
    flops: Callable[[Mapping[str, float]], float]  # model FLOPs, forward and backward, of what the counters counted
    # What is wrong, by name, from the metrics of a report: said when two reports in a row have it.
    symptoms: Callable[[Mapping[str, float]], Mapping[str, str]] = lambda values: {}
    ranked_by: str = "loss"  # metric of the validation by which the best checkpoints are kept


# ----------------------------------------------------------------------------------------------------------
# Working directory, devices


@contextlib.contextmanager
def working_directory(workdir: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes sure that this run, and no other, can write to `workdir`, and keeps it so until the end of the block."""
    if "://" in str(workdir):
        raise OSError(errno.EINVAL, "working directory: expected a path of a file system that is mounted", str(workdir))
    folder = Path(workdir).absolute()
    if jax.process_index() != 0:
        yield folder
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise type(error)(error.errno, f"working directory is not writable ({error.strerror})", str(folder)) from error
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system gives it back when the process ends, however
        except BlockingIOError:
            raise TrainingError(f"{folder}: another process is training in this working directory") from None
        except (ImportError, OSError):  # a file system without locks
            pass
        yield folder


def describe_run(folder: Path, config: JobConfig, params: Tree) -> None:
    """Writes `config.json` (settings) and `parameters.txt` (name, shape and size of every parameter), for people."""
    if jax.process_index() == 0:
        from clu import parameter_overview

        atomic_write(folder / "config.json", (to_json(config) + "\n").encode())
        table = parameter_overview.get_parameter_overview(params, include_stats=False)
        atomic_write(folder / "parameters.txt", (table + "\n").encode())


def check_rows(rows: int, accumulation: int, mesh: Mesh) -> None:
    """Raises ConfigError unless `rows` can be cut into equal micro-batches, and those over data x fsdp devices.

    Nor may devices that hold the same rows (those along `tensor`) belong to several processes: each process reads rows
    of its own.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    check_batch(rows, accumulation, devices)
    if any(len({d.process_index for d in group}) > 1 for group in mesh.devices.reshape(devices, -1)):
        found = f"got {mesh.shape['tensor']} of several: take fewer"
        raise ConfigError(f"mesh.tensor: expected devices of one process along this axis, {found}")


def to_devices(rows: Any, sharding: NamedSharding) -> Any:
    """Global arrays from this process's part of the rows (a tree of numpy arrays); the copy runs in the background."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), rows)


def state_shardings(abstract: TrainState, params: Tree, mesh: Mesh | AbstractMesh) -> TrainState:
    """Shardings of a training state: moments lie like their parameters, counters and codebooks are replicated."""
    # The path of a moment ends with the path of its parameter.
    placed = dict(jax.tree_util.tree_leaves_with_path(params))
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple[Any, ...], _: Any) -> NamedSharding:
        return next((placed[path[i:]] for i in range(len(path)) if path[i:] in placed), replicated)

    return jax.tree_util.tree_map_with_path(place, abstract)


def with_shardings(abstract: Tree, shardings: Tree) -> Tree:
    """Puts shardings on a tree of shapes: what a checkpoint needs to know to restore it."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def resume(
    store: CheckpointStore, abstract: TrainState, shardings: TrainState, config: JobConfig, loader: RowLoader
) -> tuple[TrainState, dict[str, Any]] | None:
    """Goes back to the newest intact checkpoint of this run, in state and data position.

    Returns:
        The state on its devices and the saved meta; None where there is no checkpoint yet.

    Raises:
        CheckpointError: it belongs to other settings or other data, or all are damaged.
    """
    step_dir = store.find()
    if step_dir is None:
        return None
    meta = read_meta(step_dir)
    check_same_run(meta, config, loader.fingerprint, step_dir)
    wanted = with_shardings(abstract, shardings)
    state = TrainState.join(*store.restore(step_dir, wanted.variables(), wanted.progress()))
    loader.restore(meta["data_state"])
    return state, meta


# ----------------------------------------------------------------------------------------------------------
# Inside the jitted step


def accumulate(step: Callable[[Any], Tree], rows: Any, count: int) -> Tree:
    """Adds up what `step` returns for `count` micro-batches of `rows`: loss, gradients and sums.

    They have to be divided by the totals of the whole batch already: so every target weighs the same, whichever
    micro-batch it is in.
    """
    if count == 1:
        return step(rows)

    def split(x: jax.Array) -> jax.Array:
        # Row i goes to micro-batch i % count, so that every device keeps working on rows that it already holds.
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        if jax.sharding.get_abstract_mesh().empty:
            return x
        return jax.lax.with_sharding_constraint(x, PartitionSpec(None, BATCH_AXES))

    micro_batches = jax.tree.map(split, rows)
    shapes = jax.eval_shape(step, jax.tree.map(lambda x: x[0], micro_batches))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(lambda total, micro: (jax.tree.map(jnp.add, total, step(micro)), None), zeros, micro_batches)[0]


# ----------------------------------------------------------------------------------------------------------
# Validation, reports


def evaluate(
    eval_step: Callable[[TrainState, Any], StepMetrics],
    state: TrainState,
    batches: Iterable[Any],
    put: Callable[[Any], Any],
    describe: Callable[[Any], Mapping[str, Any]],
    max_batches: int,
    stop: Callable[[], bool],
) -> dict[str, float] | None:
    """Metrics of the validation rows, weighted by targets; nothing is fetched before the last batch.

    Args:
        state: only parameters and codebooks are read.
        batches: host-local rows in a fixed order.
        describe: makes metrics of the sums over all batches.
        max_batches: 0 is all of them.
        stop: asked before every batch; where it says so, nothing is returned.
    """
    metrics: list[StepMetrics] = []
    for rows in batches:
        if stop():
            return None
        metrics.append(eval_step(state, put(rows)))
        if len(metrics) == max_batches:
            break
    if not metrics:
        raise TrainingError("validation: expected at least one batch of rows, the validation set gave none")
    return described(describe, metrics_lib.summarize(range(len(metrics)), metrics).sums)


def described(describe: Callable[[Any], Mapping[str, Any]], sums: Any) -> dict[str, float]:
    """Metrics of sums as numbers, without those of which nothing was counted (NaN)."""
    values = {name: float(value) for name, value in jax.device_get(dict(describe(sums))).items()}
    return {name: value for name, value in values.items() if not math.isnan(value)}


class Reporter:
    """Turns the metrics of an interval of steps into lines, and ends a run that has stopped learning."""

    def __init__(
        self, writer: MetricsWriter, config: TrainingConfig, view: View, counters: Mapping[str, float]
    ) -> None:
        self.counters = dict(counters)
        self.waited = 0.0  # seconds the loop waited for data in this interval
        self._writer, self._run, self._view, self._watch = writer, config.run, view, Watch()
        self._tokens_per_step, self._rows = config.tokens_per_step, config.data.rows
        self.bad_in_row = 0  # skipped steps up to the last one reported
        self._mark: float | None = None  # when the interval began; None until the first step is compiled
        self._untimed = 0
        self._seconds = self._steps = 0.0
        self._peak = metrics_lib.peak_flops()

    def start(self) -> None:
        """The first step is done, compilation included: time is measured from here."""
        self._mark, self._untimed, self.waited = time.perf_counter(), 1, 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time in this block (validation, checkpoint) does not count as training."""
        begin = time.perf_counter()
        yield
        if self._mark is not None:
            self._mark += time.perf_counter() - begin

    def report(self, interval: list[tuple[int, StepMetrics]]) -> tuple[int, dict[str, float]] | None:
        """Fetches the metrics of these steps, which waits until the device has done them, and writes them.

        Returns:
            The step after which to go back to a checkpoint, and its scalars; None where there is no need.
        """
        summary = metrics_lib.summarize([s for s, _ in interval], [m for _, m in interval], self._run.patience)
        last, self.bad_in_row = summary.last, summary.bad_in_row
        now = time.perf_counter()
        assert self._mark is not None
        seconds = max(now - self._mark, 1e-9)
        timed = len(interval) - self._untimed
        self._seconds, self._steps = self._seconds + seconds * (timed > 0), self._steps + timed
        for name, value in (summary.counters | {"skipped_steps": len(summary.skipped)}).items():
            self.counters[name] = self.counters.get(name, 0.0) + value
        for step, scalars in summary.skipped:
            self._writer.write(step, "skipped", scalars | {"rows_left_out": self._rows})
            self._writer.say(f"step {step}/{self._run.steps}  SKIPPED: {_cause(scalars)}, {self._rows} rows left out")

        values = {"tokens": last * self._tokens_per_step, "loss": math.nan} | summary.scalars
        if summary.sums is not None:
            values |= described(self._view.describe, summary.sums)
        if timed:
            per_second = timed / len(interval) / seconds
            values["step_seconds"] = seconds / timed
            values[f"{self._view.counter}_per_second"] = summary.counters[self._view.counter] * per_second
            values["data_wait"] = min(self.waited / seconds, 1.0)
            values["flops_per_second"] = self._view.flops(summary.counters) * per_second
            if self._peak is not None:
                values["mfu"], values["mfu_peak"] = values["flops_per_second"] / self._peak, self._peak
        values |= {f"total/{name}": value for name, value in self.counters.items()}
        persistent, new = self._watch.update(self._view.symptoms(values))
        values |= {f"warning/{name}": 1.0 for name in persistent}
        self._writer.write(last, "train", values)
        self._writer.say(self._line(last, values))
        for text in new:
            self._writer.say(f"step {last}/{self._run.steps}  WARNING: {text}")
        self._mark, self._untimed, self.waited = now, 0, 0.0

        if self.bad_in_row < self._run.patience:
            return None
        if not self._run.rollback_after:
            raise TrainingError(
                f"step {last}: loss or gradient was not finite, or a spike, in {self.bad_in_row} steps in a row "
                f"(run.max_bad_steps = {self._run.max_bad_steps}); the parameters are those from before. Lower the "
                "learning rate or look at the data; the steps are listed in metrics.jsonl under the split `skipped`"
            )
        return summary.skipped[-1]

    def went_back(self, step: int, to: int, scalars: Mapping[str, float]) -> None:
        """After so many steps the run has gone back to the state of step `to`."""
        self.bad_in_row = 0
        self.counters["rollbacks"] = self.counters.get("rollbacks", 0.0) + 1
        rows = (step - to) * self._rows
        values = {name: scalars[name] for name in ("loss", "gradient_norm")}
        self._writer.write(step, "rollback", values | {"to_step": to, "rows_left_out": rows})
        end = f"state of step {to}: {_cause(scalars)}, {rows} rows left out"
        self._writer.say(f"step {step}/{self._run.steps}  ROLLBACK to the {end}")

    def _line(self, step: int, values: Mapping[str, float]) -> str:
        view = self._view
        parts = [f"step {step}/{self._run.steps}", f"{_short(values['tokens'])} tokens", f"loss {values['loss']:.4g}"]
        parts += _shown(view, values)
        if "step_seconds" in values:
            parts.append(f"{values[f'{view.counter}_per_second']:,.0f} {view.unit}/s")
            parts.append(f"data wait {values['data_wait']:.0%}")
            if "mfu" in values:
                parts.append(f"MFU {values['mfu']:.1%} of {values['mfu_peak'] / 1e12:,.0f} TFLOP/s")
            else:
                parts.append(f"{values['flops_per_second'] / 1e9:,.0f} GFLOP/s")
            parts.append(f"ETA {clock((self._run.steps - step) * self._seconds / self._steps)}")
        return "  ".join(parts)


def _short(number: float) -> str:
    """`512`, `16.8k`, `2.1M`, `5.0T`."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _cause(scalars: Mapping[str, float]) -> str:
    return f"loss {scalars['loss']:.4g}, gradient norm {scalars['gradient_norm']:.4g}"


def _shown(view: View, values: Mapping[str, float]) -> list[str]:
    return [f"{label} {values[name]:.4g}" for label, name in view.losses.items() if name in values]


# ----------------------------------------------------------------------------------------------------------
# The loop


def train_loop(
    state: TrainState,
    train_step: Callable[[TrainState, Any], tuple[TrainState, StepMetrics]],
    loader: RowLoader,
    validate: Callable[[int, TrainState, Callable[[], bool]], dict[str, float] | None],
    *,
    config: TrainingConfig,
    groups: list[str],
    view: View,
    put: Callable[[Any], Any],
    store: CheckpointStore,
    writer: MetricsWriter,
    counters: Mapping[str, float],
    base: Mapping[str, str] | None = None,
) -> TrainState:
    """Trains from `state.step` to `run.steps`.

    The host runs ahead of the device: it reads the metrics of an interval only after it has started the next step.
    Every `run.checkpoint_every` steps, and at the end, a checkpoint is written in the background. SIGTERM and Ctrl-C
    write one as well (a validation is broken off) and end the process with code 128 + signal (143, 130), so that a
    supervisor can tell a stopped run from a finished one; the same command continues it.

    After `run.rollback_after` skipped steps in a row, parameters and optimiser go back to the newest intact checkpoint.
    Step and data go on after the last of the skipped ones: all steps since that checkpoint count as skipped.

    Args:
        state: new or restored; its buffers are donated.
        loader: positioned at the batch of step `state.step`.
        validate: (step, state, function) -> metrics of the validation set, or None if the function says stop; run
            before the first step, every `run.eval_every` steps and at the end.
        config: settings of the job, for the checkpoints; `run` is its part.
        groups: see `make_meta`.
        counters: totals at `state.step`.
        base: see `make_meta`.

    Raises:
        TrainingError: too many bad steps in a row, or too many rollbacks, or no checkpoint to go back to.
        CheckpointError: a checkpoint could not be written.
        SystemExit: stopped by a signal.
    """
    run, first = config.run, int(state.step)
    if first >= run.steps:
        writer.say(f"step {first}/{run.steps}  nothing to do: this run is finished")
        return state
    reporter = Reporter(writer, config, view, counters)
    interval: list[tuple[int, StepMetrics]] = []
    ready: list[tuple[int, StepMetrics]] = []

    def validate_and_write(step: int) -> float | None:
        """What ranks the checkpoint of this step; None where the validation was broken off, or it is no number."""

        def stopping() -> bool:
            alive()
            return stop.requested()

        with reporter.pause():
            values = validate(step, state, stopping)
            if values is None:
                return None
            loss = values.get("loss", math.nan)
            ranking = values.get(view.ranked_by, math.nan)
            writer.write(step, "validation", {"tokens": step * config.tokens_per_step} | values)
            writer.say("  ".join([f"step {step}/{run.steps}", f"validation: loss {loss:.4g}", *_shown(view, values)]))
            return ranking if math.isfinite(ranking) else None

    def go_back(step: int, scalars: Mapping[str, float]) -> TrainState:
        """The state of the newest checkpoint that was not saved among bad steps, as that of this step."""
        writer.sync()
        store.wait()
        found = store.find(lambda meta: not meta.get("bad_in_row"))
        made = int(reporter.counters.get("rollbacks", 0))
        if found is None or made >= run.max_rollbacks:
            reason = "there is no checkpoint to go back to" if found is None else f"{made} rollbacks were not enough"
            raise TrainingError(
                f"step {step}: {run.rollback_after} steps in a row were not finite, or spikes, and {reason} "
                f"(run.max_rollbacks = {run.max_rollbacks}); see the splits `skipped` and `rollback` of metrics.jsonl"
            )
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        jax.tree.map(lambda x: x.delete(), state)
        back = TrainState.join(*store.restore(found, wanted.variables(), wanted.progress()))
        to = int(back.step)
        numbers = step, int(back.skipped) + step - to, 0
        place = jax.jit(lambda: tuple(jnp.int32(n) for n in numbers), out_shardings=back.step.sharding)
        loader.seek(step)
        reporter.went_back(step, to, scalars)
        return dataclasses.replace(back, **dict(zip(("step", "skipped", "bad_in_row"), place(), strict=True)))

    step = first
    with stop_signal(run.grace_seconds) as stop, watchdog(run.hang_seconds) as alive:
        if first == 0:
            validate_and_write(0)
            if stop.signal is not None:
                writer.say("stopped by a signal before the first step")
                raise SystemExit(128 + stop.signal)
        while step < run.steps:
            step += 1
            alive()
            begin = time.perf_counter()
            rows = next(loader)
            reporter.waited += time.perf_counter() - begin

            state, step_metrics = train_step(state, put(rows))
            interval.append((step, step_metrics))
            if step == first + 1:
                jax.block_until_ready(step_metrics)
                reporter.start()
                seconds = time.perf_counter() - begin
                writer.say(f"step {step}/{run.steps}  first step, with compilation: {seconds:.1f} s")
            bad = reporter.report(ready) if ready else None
            ready = []
            store.check()

            if len(interval) > 1:  # a step ahead of the device is enough, and all that was begun delays a stop
                jax.block_until_ready(interval[-2][1])
            stopping = stop.requested() and bad is None
            evaluating = step % run.eval_every == 0 or step == run.steps
            saving = step % run.checkpoint_every == 0 or step == run.steps or stopping
            if step % run.log_every == 0 or evaluating or saving:
                ready, interval = interval, []
            if (evaluating or saving) and bad is None:
                bad = reporter.report(ready)
                ready = []
            if bad is not None:
                with reporter.pause():
                    state = go_back(*bad)
                step, interval, ready = bad[0], [], []
                if step < run.steps:
                    continue
            validation_loss = None
            if evaluating:
                validation_loss = validate_and_write(step)
                stopping = stop.requested()
                saving |= stopping
            if saving:
                alive()
                with reporter.pause():
                    writer.sync()
                    data = loader.state(), loader.fingerprint
                    found = validation_loss, reporter.bad_in_row
                    meta = make_meta(step, config, *data, groups, reporter.counters, base, *found)
                    store.save(step, state.variables(), state.progress(), meta)
            if stopping:
                break
        stop.settle()
        store.wait()
    if stop.signal is not None and step < run.steps:
        writer.say(f"step {step}/{run.steps}  stopped by a signal; the same command goes on from here")
        raise SystemExit(128 + stop.signal)
    return state

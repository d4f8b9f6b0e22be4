"""Checkpoints: written by Orbax in the background, valid only with our commit marker.

    WORKDIR/checkpoints/STEP/variables   parameters and codebooks: all that inference needs
                            /optimizer   moments and counters
                            /meta        JSON: config, data position and fingerprints, counters, versions
                            /commit.json sizes and SHA-256 of all other files, written last

The variables of a LoRA run are its adapters; `meta` names the checkpoint they stand on, and whoever reads parameters
here gets both merged.

Orbax loads a flipped byte without noticing and does not fall back to an older step. So a step counts only when its
`commit.json` is there, and is used only when its files still have the sums that stand in it; otherwise the next older
step is used. A checkpoint restores onto any mesh and any number of processes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import mimo_jax
from mimo_jax.atomic import atomic_write, sync_folder
from mimo_jax.config import ConfigError, JobConfig
from mimo_jax.config_files import from_config_dict, to_json
from mimo_jax.training import lora
from mimo_jax.training.state import Tree
from mimo_jax.trees import flatten, nest

FORMAT = 2  # 2: codebooks hold their entries
FOLDER = "checkpoints"
MARKER = "commit.json"
_INFERENCE = ("variables", "meta")  # items that using a model reads: not the moments, two thirds of the bytes

# Settings that may differ when a run is continued: length and rhythm, placement on devices, where files lie (their
# content is compared by the loader's fingerprint), and how (not what) is computed.
_MAY_CHANGE = (
    r"run\.(steps|tokens|log_every|eval_.*|checkpoint_every|keep_.*|max_.*|rollback_after|data_threads|.*_seconds)",
    r"mesh\..*",
    r"compute\.(remat|attention)",
    r"init_from",
    r"data\.(manifest|text_tokenizer|validation.*|samples|sources\.[^.]*\.path)",
)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or continued. The message names folder and reason."""


class OtherRunError(CheckpointError, ConfigError):
    """A checkpoint is of other settings or other data than the run that is to go on from it: trying again is no use."""


# ----------------------------------------------------------------------------------------------------------
# Folders and markers


def good_steps(folder: str | os.PathLike[str]) -> list[int]:
    """Steps under a `checkpoints` folder that carry the commit marker, in ascending order."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and (p / MARKER).is_file())


def _files(step_dir: Path) -> list[str]:
    paths = (p for p in step_dir.rglob("*") if p.is_file() and p != step_dir / MARKER)
    return sorted(p.relative_to(step_dir).as_posix() for p in paths)


def _digest(path: Path, sync: bool) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def _digests(step_dir: Path, names: list[str], sync: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        yield from zip(names, pool.map(lambda name: _digest(step_dir / name, sync), names), strict=True)


def write_marker(step_dir: Path) -> None:
    """Puts every file of a step and its name on disk, then writes the marker with their sums."""
    marker = {"format": FORMAT, "files": dict(_digests(step_dir, _files(step_dir), sync=True))}
    for folder in (step_dir.parent, *(p for p in step_dir.rglob("*") if p.is_dir())):
        sync_folder(folder)
    atomic_write(step_dir / MARKER, json.dumps(marker, indent=1).encode())


def verify(step_dir: str | os.PathLike[str], items: Sequence[str] | None = None) -> None:
    """Compares the files of a step, or of some of its items, with its marker.

    Raises:
        CheckpointError: the marker is missing, or a file is missing, unknown, or has another size or content.
    """
    step_dir = Path(step_dir)
    try:
        marker = json.loads((step_dir / MARKER).read_text(encoding="utf-8"))
        expected = dict(marker["files"])
        version = marker["format"]
    except FileNotFoundError:
        raise CheckpointError(f"{step_dir}: {MARKER} is missing: the checkpoint was never completed") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{step_dir / MARKER}: not readable: {error}") from error
    if version != FORMAT:
        raise CheckpointError(f"{step_dir / MARKER}: expected format {FORMAT}, got {version!r}")
    found = _files(step_dir)
    for name in sorted(set(expected) ^ set(found)):
        raise CheckpointError(f"{step_dir / name}: {'missing' if name in expected else 'not part of the checkpoint'}")
    if items is not None:
        found = [name for name in found if name.split("/")[0] in items]
    for name, digest in _digests(step_dir, found):
        if digest != expected[name]:
            raise CheckpointError(f"{step_dir / name}: damaged: size or SHA-256 differs from {MARKER}")


def read_meta(step_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON that was saved with a checkpoint. Raises CheckpointError: it is missing or not readable."""
    path = Path(step_dir) / "meta" / "metadata"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected the JSON of a checkpoint: {error}") from error
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(meta).__name__}")
    return meta


def read_metas(folder: Path) -> dict[int, dict[str, Any]]:
    """The meta of every complete checkpoint of a `checkpoints` folder by step, without those that cannot be read."""
    metas: dict[int, dict[str, Any]] = {}
    for step in good_steps(folder):
        with contextlib.suppress(CheckpointError):
            metas[step] = read_meta(folder / str(step))
    return metas


def find(path: str | os.PathLike[str], step: int | None = None, items: Sequence[str] | None = None) -> Path:
    """Folder of the newest intact checkpoint under `path`.

    Args:
        path: working directory of a run, its `checkpoints` folder, or the folder of one step.
        step: this step and no other.
        items: those that will be read and must be intact; all by default.

    Raises:
        CheckpointError: there is no checkpoint, or none that is intact. Damaged ones are passed over with a warning.
    """
    path = Path(path)
    if (path / MARKER).is_file():
        verify(path, items)
        return path
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    steps = good_steps(folder)
    if step is not None:
        if step not in steps:
            raise CheckpointError(f"{folder}: no complete checkpoint of step {step}; there are {steps}")
        verify(folder / str(step), items)
        return folder / str(step)
    for candidate in reversed(steps):
        try:
            verify(folder / str(candidate), items)
            return folder / str(candidate)
        except CheckpointError as error:
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
    found = f"all of {steps} are damaged" if steps else "there is none"
    raise CheckpointError(f"{path}: expected a complete checkpoint under {folder}, but {found}")


# ----------------------------------------------------------------------------------------------------------
# Meta


def make_meta(
    step: int,
    config: JobConfig,
    data_state: Mapping[str, Any],
    data_fingerprint: Mapping[str, Any],
    trained_groups: list[str],
    counters: Mapping[str, float],
    base: Mapping[str, str] | None = None,
    validation_loss: float | None = None,
    bad_in_row: int = 0,
) -> dict[str, Any]:
    """What is saved beside the arrays.

    Args:
        data_fingerprint: what the data and the text tokenizer are.
        trained_groups: groups that this run or a run before it has trained; the others are as initialised.
        counters: totals since the beginning of the run (positions, audio hours, ...).
        base: `reference` to the checkpoint that the adapters of a LoRA run stand on.
        validation_loss: of these parameters, where they were validated.
        bad_in_row: how many of the latest steps were skipped in a row.
    """
    return {
        "format": FORMAT,
        "step": step,
        "tokens": step * getattr(config, "tokens_per_step", 0),
        "validation_loss": validation_loss,
        "bad_in_row": bad_in_row,
        "job": config.job,
        "config": json.loads(to_json(config)),
        "data_state": dict(data_state),
        "data_fingerprint": json.loads(json.dumps(dict(data_fingerprint))),
        "trained_groups": trained_groups,
        "counters": dict(counters),
        "package_version": mimo_jax.__version__,
        "git_revision": git_revision(),
    } | ({} if base is None else {"base": dict(base)})


@functools.cache
def git_revision() -> str:
    """Commit of the source tree when first asked, `+changes` where files differ; "" outside of a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def check_same_run(
    meta: Mapping[str, Any], config: JobConfig, data_fingerprint: Mapping[str, Any], where: str | os.PathLike[str]
) -> None:
    """Makes sure that a checkpoint belongs to the run that is to be continued.

    Length and rhythm of the run, mesh, remat, attention implementation and file locations may differ, and so may what
    happens to the weights of sources after the tokens that the run has seen.

    Raises:
        OtherRunError: another setting or the data differ; names the first one and both values.
    """
    tokens = meta.get("tokens", 0)
    known, prints = _past(from_config_dict(meta["config"]), meta["data_fingerprint"], tokens)  # newer settings: default
    wanted, new_prints = _past(config, data_fingerprint, tokens)
    for key, old, new in differences(known, wanted):
        if key.endswith(".changes"):
            raise OtherRunError(
                f"{where}: config.{key}, as far as it is past ({tokens:,} tokens), was {old} and is {new} now: "
                "only later changes may be added and edited"
            )
        if not any(re.fullmatch(pattern, key) for pattern in _MAY_CHANGE):
            raise OtherRunError(
                f"{where}: config.{key} was {old!r} and is {new!r} now: "
                "a run can only be continued with the settings it began with; use another working directory"
            )
    for key, old, new in differences(prints, new_prints):
        if key == "packing":
            raise OtherRunError(
                f"{where}: this version of the package packs rows otherwise (packing {old or 1} before, {new} now): go "
                "on with the version that the run began with, or begin a new one with --config.init_from"
            )
        raise OtherRunError(f"{where}: the data changed: {key} was {old!r} and is {new!r} now")


def _past(config: JobConfig, data_fingerprint: Mapping[str, Any], tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and fingerprints as JSON, without what sources do only after so many tokens."""
    settings, prints = json.loads(to_json(config)), json.loads(json.dumps(dict(data_fingerprint)))
    sources = settings.get("data", {}).get("sources", {})
    for name, source in list(sources.items()):
        source["changes"] = [change for change in source["changes"] if change[0] <= tokens]
        if not source["weight"] and not any(weight for _, weight in source["changes"]):
            del sources[name]
            for part in ("sources", "settings"):
                prints.get(part, {}).pop(name, None)
    return settings, prints


def differences(old: Mapping[str, Any], new: Mapping[str, Any], separator: str = ".") -> list[tuple[str, Any, Any]]:
    """(path, old, new) of the leaves that differ, by name; None where there is no such leaf."""
    old, new = flatten(old, separator), flatten(new, separator)
    return [(key, old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def reasons_to_keep(
    metas: Mapping[int, Mapping[str, Any]], newest: int, every_tokens: int = 0, best: int = 0
) -> dict[int, list[str]]:
    """Which rules keep each of the checkpoints that are there; those that none keeps may go.

    Args:
        metas: meta of each complete checkpoint, by step.
    """
    steps = sorted(metas)
    reasons: dict[int, list[str]] = {step: [] for step in steps}
    for step in steps[-newest:]:
        reasons[step].append("newest" if step == steps[-1] else f"last {newest}")
    good = [step for step in steps if not metas[step].get("bad_in_row")]
    if good and not reasons[good[-1]]:  # later ones were saved among bad steps
        reasons[good[-1]].append("to go back to")
    reached = 0
    for step in steps if every_tokens else ():  # what was between two that are kept had reached no further multiple
        multiple = (metas[step].get("tokens") or 0) // every_tokens
        if multiple > reached:
            reasons[step].append(f"every {every_tokens:,} tokens")
            reached = multiple
    losses = {step: loss for step in steps if (loss := metas[step].get("validation_loss")) is not None}
    for rank, step in enumerate(sorted(losses, key=lambda step: losses[step])[:best], 1):
        reasons[step].append(f"best {rank}")
    return reasons


# ----------------------------------------------------------------------------------------------------------
# Writing and reading


class CheckpointStore:
    """The checkpoints of one run. One run at a time writes to a folder."""

    def __init__(
        self, workdir: str | os.PathLike[str], keep: int = 3, keep_every_tokens: int = 0, keep_best: int = 0
    ) -> None:
        """Opens `WORKDIR/checkpoints` and removes what a killed process left unfinished there.

        Args:
            keep, keep_every_tokens, keep_best: see `RunConfig`; others are removed once a newer one is complete.

        Raises:
            OSError: the folder cannot be written.
        """
        import orbax.checkpoint as ocp

        self.folder = Path(workdir).absolute() / FOLDER
        self._keep = keep, keep_every_tokens, keep_best
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        logging.getLogger("absl").addFilter(_not_raised_later)
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                unfinished = path.name.isdecimal() and not (path / MARKER).is_file()
                if path.is_dir() and (unfinished or path.name.endswith(".orbax-checkpoint-tmp")):
                    warnings.warn(f"unfinished checkpoint removed: {path}", stacklevel=2)
                    shutil.rmtree(path)
        _barrier("checkpoints-opened")
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler("variables", "optimizer", "meta"))

    def save(self, step: int, variables: Tree, optimizer: Tree, meta: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint; returns as soon as the arrays are copied to the host.

        Raises:
            CheckpointError: this or the previous checkpoint could not be written. Older ones are untouched.
        """
        import orbax.checkpoint as ocp

        self.wait()
        self._check_space((variables, optimizer))
        items = ocp.args.Composite(
            variables=ocp.args.StandardSave(variables, jax.tree_util.tree_map_with_path(_chunks, variables)),
            optimizer=ocp.args.StandardSave(optimizer),
            meta=ocp.args.JsonSave(dict(meta)),
        )
        try:
            self._orbax.save(self.folder / str(step), items)
        except Exception as error:
            self._error = error
            self.wait()
        self._thread = threading.Thread(target=self._commit, args=(step,), name=f"commit-{step}", daemon=True)
        self._thread.start()

    def _check_space(self, tree: Tree) -> None:
        """Finds a full disk before Orbax does, whose threads print pages of tracebacks then. 80 %: Orbax compresses."""
        if jax.process_count() > 1:
            return  # processes that come to different answers would wait for each other for ever
        needed = sum(x.nbytes for x in jax.tree.leaves(tree) if hasattr(x, "nbytes"))
        disk = shutil.disk_usage(self.folder)
        if disk.total and disk.free < 0.8 * needed:
            raise CheckpointError(
                f"{self.folder}: a checkpoint could not be written: expected about {needed / 1e6:,.0f} MB of free disk "
                f"space, got {disk.free / 1e6:,.0f} MB; complete ones are untouched: steps {good_steps(self.folder)}"
            )

    def _commit(self, step: int) -> None:
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                write_marker(self.folder / str(step))
                for old, reasons in reasons_to_keep(read_metas(self.folder), *self._keep).items():
                    if not reasons:
                        (self.folder / str(old) / MARKER).unlink()
                        shutil.rmtree(self.folder / str(old))
        except Exception as error:  # raised again in the main thread, by `wait`
            self._error = error

    def check(self) -> None:
        """Raises the error of a checkpoint that failed in the background, without waiting for a running one."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Returns when the last checkpoint is complete, marker included.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(
                f"{self.folder}: a checkpoint could not be written: {_reason(error)}; "
                f"complete ones are untouched: steps {good_steps(self.folder)}"
            ) from error

    def find(self, wanted: Callable[[dict[str, Any]], bool] = lambda meta: True) -> Path | None:
        """Folder of the newest intact step, the same on every process; None where nothing was ever completed.

        Damaged newer steps are renamed to `STEP.damaged`, with a warning, so that the run can write them again.

        Args:
            wanted: whether a step of this meta will do.

        Raises:
            CheckpointError: there are checkpoints, but all are damaged.
        """
        step, broken = -1, []
        if jax.process_index() == 0:
            for candidate in reversed(steps := good_steps(self.folder)):
                folder = self.folder / str(candidate)
                try:
                    verify(folder)
                    if wanted(read_meta(folder)):
                        step = candidate
                        break
                except CheckpointError as error:
                    warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
                    broken.append(folder)
            if steps and len(broken) == len(steps):
                step, broken = -2, []
            for folder in broken:
                damaged = folder.with_name(f"{folder.name}.damaged")
                shutil.rmtree(damaged, ignore_errors=True)
                os.replace(folder, damaged)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            step = int(multihost_utils.broadcast_one_to_all(step))
        if step == -2:
            raise CheckpointError(f"{self.folder}: every checkpoint is damaged; restore a copy or remove the folder")
        return None if step == -1 else self.folder / str(step)

    def restore(self, step_dir: Path, variables: Tree, optimizer: Tree) -> tuple[Tree, Tree]:
        """Reads a step that `find` returned.

        Args:
            variables: tree of `jax.ShapeDtypeStruct` with shardings, as the new run wants the arrays.
            optimizer: the same for the second item.

        Raises:
            CheckpointError: the trees do not fit.
        """
        import orbax.checkpoint as ocp

        items = ocp.args.Composite(
            variables=ocp.args.StandardRestore(variables), optimizer=ocp.args.StandardRestore(optimizer)
        )
        try:
            restored = self._orbax.restore(step_dir, items)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{step_dir}: does not fit this run: {_reason(error)}") from error
        return restored["variables"], restored["optimizer"]

    def close(self) -> None:
        """Waits for the last checkpoint and stops Orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()


def _not_raised_later(record: logging.LogRecord) -> bool:
    """Drops the tracebacks that Orbax logs for an error in a thread: the same error reaches `CheckpointStore.wait`."""
    message = str(record.msg)
    return "_SignalingThread.run() raised" not in message and "in background save thread" not in message


def _chunks(path: tuple[Any, ...], _: Any) -> Any:
    """A stack is stored layer by layer, so that `mimo-jax convert` can read it so."""
    import orbax.checkpoint as ocp

    return ocp.SaveArgs(shard_axes=(0,) if jax.tree_util.DictKey("layers") in path else ())


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _reason(error: BaseException) -> str:
    """First line of the deepest cause: Orbax wraps the error of the file system in its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def reference(base: Path, folder: Path) -> dict[str, str]:
    """How an adapter checkpoint in `folder` names the step it stands on: two ways to find it, and its fingerprint."""
    digest = hashlib.sha256((base / MARKER).read_bytes()).hexdigest()[:16]
    return {"path": str(base.absolute()), "relative": os.path.relpath(base, folder), "fingerprint": digest}


def base_of(step_dir: str | os.PathLike[str], elsewhere: str | os.PathLike[str] = "") -> Path | None:
    """Folder of the step that an adapter checkpoint stands on; None for any other checkpoint.

    Args:
        step_dir: the adapter checkpoint.
        elsewhere: a checkpoint, or a run with the step among its own, to look at when the base is not where it was.

    Raises:
        CheckpointError: the step is neither where it was, nor at the same place relative to the adapters, nor
            elsewhere, or is another one.
    """
    base = read_meta(step_dir).get("base")
    if base is None:
        return None
    recorded = Path(base["path"])
    places = [recorded, Path(step_dir).absolute().parent / base["relative"]]
    if elsewhere:
        folders = (Path(elsewhere), Path(elsewhere) / FOLDER)
        places += [folders[0], *(folder / str(step) for folder in folders for step in good_steps(folder))]
    places = [place for place in places if (place / MARKER).is_file()]
    for place in places:
        if reference(place, place)["fingerprint"] == base["fingerprint"]:
            return place
    rotates = recorded.name.isdecimal() and recorded.parent.name == FOLDER
    name = f"step {recorded.name} of the run {recorded.parent.parent}" if rotates else str(recorded)
    found = "another checkpoint is there" if recorded in places else "it is missing"
    kept = good_steps(recorded.parent) if rotates and recorded not in places else []
    raise CheckpointError(
        f"{step_dir}: expected the checkpoint that these adapters stand on, {name} (fingerprint {base['fingerprint']}),"
        f" but {found}{f' (the run has kept steps {kept})' if kept else ''}; adapters are of no use without it: put a "
        "copy back there, and begin adapters from a copy, or from converted weights, that no run removes"
    )


def open_step(path: str | os.PathLike[str], step: int | None = None) -> Path:
    """`find` for inference: variables and meta are intact, and so are those of a base."""
    step_dir = find(path, step, _INFERENCE)
    if (base := base_of(step_dir)) is not None:
        open_step(base)
    return step_dir


def saved_shapes(step_dir: str | os.PathLike[str]) -> Tree:
    """Tree of `jax.ShapeDtypeStruct` of the saved variables (`params` and `codebook`), read without the arrays."""
    base = base_of(step_dir)
    return stored_shapes(step_dir) if base is None else saved_shapes(base)


def stored_shapes(step_dir: str | os.PathLike[str]) -> Tree:
    """The same of what is stored there: the variables, or the adapters alone."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(Path(step_dir).absolute() / "variables").tree
    handler.close()
    return jax.tree.map(lambda m: jax.ShapeDtypeStruct(tuple(m.shape), m.dtype), tree)


def read_variables(step_dir: str | os.PathLike[str], abstract: Tree) -> Tree:
    """Reads a part of the saved variables.

    Args:
        abstract: a part of the tree of `saved_shapes`, as `jax.ShapeDtypeStruct` with shardings.
    """
    base = base_of(step_dir)
    if base is None:
        return _read_stored(step_dir, abstract)
    variables = read_variables(base, abstract)
    wanted = flatten(abstract["params"])
    beside = {p: x for p, x in flatten(stored_shapes(step_dir)["params"]).items() if lora.target(p) in wanted}
    if not beside:
        return variables
    placement = next(iter(wanted.values())).sharding
    if isinstance(placement, jax.sharding.NamedSharding):
        placement = jax.sharding.NamedSharding(placement.mesh, jax.sharding.PartitionSpec())
    shapes = {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement) for p, x in beside.items()}
    learnt = _read_stored(step_dir, {"params": nest(shapes)})["params"]
    config = from_config_dict(read_meta(step_dir)["config"]).lora  # type: ignore[union-attr]
    merged = lora.merge_lora(config, variables["params"], learnt)
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), merged, abstract["params"])
    return variables | {"params": placed}


def _read_stored(step_dir: str | os.PathLike[str], abstract: Tree) -> Tree:
    import orbax.checkpoint as ocp

    how = ocp.checkpoint_utils.construct_restore_args(abstract)
    arguments = ocp.args.PyTreeRestore(item=abstract, restore_args=how, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(Path(step_dir).absolute() / "variables", arguments)


def load_params(path: str | os.PathLike[str], step: int | None = None) -> tuple[JobConfig, Tree, dict[str, Any]]:
    """Loads a trained model for inference, onto the first local device; the optimiser's state is not read.

    Args:
        path: working directory of a run, its `checkpoints` folder, or the folder of one step.
        step: step to load, the newest intact one by default.

    Returns:
        The config of the job, `{"params": ..., "codebook": ...}` and the saved meta.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    step_dir = open_step(path, step)
    meta = read_meta(step_dir)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = saved_shapes(step_dir)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    return from_config_dict(meta["config"]), read_variables(step_dir, abstract), meta


def transfer(
    path: str | os.PathLike[str],
    wanted: Tree,
    data_fingerprint: Mapping[str, Any] | None = None,
    *,
    verified: bool = False,
) -> Tree:
    """Loads the parameter groups that another run has trained.

    Args:
        path: working directory or checkpoint of the other run.
        wanted: parameters of this run as `jax.ShapeDtypeStruct` with shardings.
        data_fingerprint: of this run; where both runs name a text or audio tokenizer, it must be the same one.
        verified: `path` is what `open_step` has just returned; its files are not hashed again.

    Returns:
        The groups of `wanted` that were trained there: a text checkpoint gives `llm`, a joint one all.

    Raises:
        CheckpointError: there is no checkpoint, nothing matches, a parameter is missing or has another shape, or the
            other run learnt the ids of another tokenizer.
    """
    step_dir = Path(path) if verified else open_step(path)
    saved, meta = saved_shapes(step_dir)["params"], read_meta(step_dir)
    groups = [group for group in wanted if group in meta["trained_groups"]]
    if not groups:
        raise CheckpointError(f"{step_dir}: no trained group among {sorted(wanted)}; it has {meta['trained_groups']}")
    for name in ("text_tokenizer", "audio_tokenizer"):
        old, new = (fingerprint.get(name) for fingerprint in (meta["data_fingerprint"], data_fingerprint or {}))
        if old and new and old != new:
            known = f"{name.replace('_', ' ')} {old}"
            raise CheckpointError(f"{step_dir}: was trained with {known}, the data of this run are of {new}")
    old, new = (jax.tree.map(lambda x: x.shape, {group: tree[group] for group in groups}) for tree in (saved, wanted))
    for name, *shapes in differences(old, new, "/"):
        found, expected = ("no such parameter" if shape is None else shape for shape in shapes)
        raise CheckpointError(f"{step_dir}: parameter {name}: expected {expected}, the checkpoint has {found}")
    return read_variables(step_dir, {"params": {group: wanted[group] for group in groups}})["params"]

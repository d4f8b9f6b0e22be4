"""What is in the checkpoints of a run, for `mimo-jax checkpoint inspect`. Arrays are not read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from mimo_jax.training import checkpoint
from mimo_jax.training.checkpoint import FOLDER, MARKER, CheckpointError
from mimo_jax.trees import flatten


def inspect(path: str | os.PathLike[str], step: int | None = None, verify: bool = False) -> dict[str, Any]:
    """All checkpoints of a run (`{"folder", "checkpoints": [...]}`), or what is in one of them.

    Args:
        path: working directory of a run, its `checkpoints` folder, or the folder of one step.
        step: only this one, in full.
        verify: compare the files with their checksums.

    Raises:
        CheckpointError: there is no such checkpoint, or its description cannot be read.
    """
    path = Path(path)
    if (path / MARKER).is_file():
        # The folder of a run's checkpoint is called by its step, that of converted weights by the user.
        name = path.resolve().name
        if step not in (None, int(name) if name.isdecimal() else checkpoint.read_meta(path).get("step")):
            raise CheckpointError(f"{path}: this is the folder of one checkpoint, which is not step {step}")
        return _one(path, verify)
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    if step is not None:
        if not (folder / str(step)).is_dir():
            raise CheckpointError(f"{folder}: no checkpoint of step {step}; there are {checkpoint.good_steps(folder)}")
        return _one(folder / str(step), verify)
    # Orbax writes to STEP.orbax-checkpoint-tmp, a damaged step is set aside as STEP.damaged.
    names = [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    names = sorted((name for name in names if name.split(".")[0].isdecimal()), key=lambda n: int(n.split(".")[0]))
    if not names:
        raise CheckpointError(f"{path}: expected the folder of a run with checkpoints under {folder}, found none")
    metas = checkpoint.read_metas(folder)
    run = (metas[max(metas)].get("config") or {}).get("run", {}) if metas else {}
    rules = run.get("keep_checkpoints", len(metas)), run.get("keep_every_tokens", 0), run.get("keep_best", 0)
    reasons = checkpoint.reasons_to_keep(metas, *rules) if metas else {}
    rows = []
    for name in names:
        number = int(name.split(".")[0])
        mine = name.isdecimal()
        meta = metas.get(number, {}) if mine else {}
        rows.append(
            {
                "step": number,
                "name": name,
                "state": _state(folder / name, verify),
                "bytes": _size(folder / name),
                "tokens": meta.get("tokens"),
                "validation_loss": meta.get("validation_loss"),
                "kept": reasons.get(number, []) if mine else [],
            }
        )
    return {"folder": str(folder), "checkpoints": rows}


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _state(step_dir: Path, verify: bool) -> str:
    if step_dir.name.endswith(".damaged"):
        return "damaged, set aside"
    if not (step_dir / MARKER).is_file():
        return "incomplete"
    if not verify:
        return "complete"
    try:
        checkpoint.verify(step_dir)
    except CheckpointError as error:
        return f"damaged ({str(error).removeprefix(f'{step_dir}/')})"
    return "intact"


def _one(step_dir: Path, verify: bool) -> dict[str, Any]:
    state = _state(step_dir, verify)
    damaged = state.startswith("damaged (")  # which is then the answer, whatever else cannot be read
    try:
        meta = checkpoint.read_meta(step_dir)
    except CheckpointError:
        if not damaged:
            raise
        meta = {}
    keys = ("job", "step", "tokens", "validation_loss", "counters", "data_state", "data_fingerprint", "trained_groups")
    found = {"folder": str(step_dir), "state": state, "bytes": _size(step_dir)}
    found |= {key: meta.get(key) for key in (*keys, "package_version", "git_revision", "base")}
    try:
        variables = checkpoint.stored_shapes(step_dir)
    except Exception as error:  # Orbax raises whatever the first broken file leads to
        if not damaged:
            raise CheckpointError(f"{step_dir / 'variables'}: its description cannot be read: {error}") from error
        variables = {}
    groups: dict[str, dict[str, Any]] = {}
    for collection, tree in variables.items():
        for name, group in tree.items():
            leaves = jax.tree.leaves(group)
            groups[name if collection == "params" else f"{collection}/{name}"] = {
                "arrays": len(leaves),
                "parameters": sum(math.prod(x.shape) for x in leaves),
                "dtype": "+".join(sorted({str(x.dtype) for x in leaves})),
                "bytes": sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves),
            }
    return found | {"groups": groups, "settings": meta.get("config")}


def render(found: Mapping[str, Any]) -> str:
    """What `inspect` returned, to read."""
    if "checkpoints" in found:
        rows = [("step", "state", "size", "tokens", "validation loss", "kept as")]
        for row in found["checkpoints"]:
            tokens, loss = row["tokens"], row["validation_loss"]
            rows.append(
                (
                    row["name"],
                    row["state"],
                    f"{row['bytes'] / 1e6:,.1f} MB",
                    "-" if tokens is None else f"{tokens:,}",
                    "-" if loss is None else f"{loss:.5g}",
                    ", ".join(row["kept"]) or "-",
                )
            )
        return "\n".join([found["folder"], *_table(rows)])
    lines = []
    for key in ("folder", "state", "job", "step", "tokens", "validation_loss", "package_version", "git_revision"):
        if found[key] not in (None, ""):
            value = found[key]
            lines.append((key.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)))
    lines.append(("size", f"{found['bytes'] / 1e6:,.1f} MB"))
    lines.append(("trained groups", ", ".join(found["trained_groups"] or ()) or "-"))
    for key in ("base", "counters", "data_state", "data_fingerprint"):
        for name, value in flatten(found[key] or {}, ".").items():
            shown = f"{value:,.6g}" if isinstance(value, float) else str(value)
            lines.append((f"{key.replace('_', ' ')}: {name}", shown))
    groups = [("group", "arrays", "parameters", "dtype", "size")]
    groups += [
        (name, f"{g['arrays']:,}", f"{g['parameters']:,}", g["dtype"], f"{g['bytes'] / 1e6:,.1f} MB")
        for name, g in found["groups"].items()
    ]
    return "\n".join([*_table(lines), "", *_table(groups)])


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

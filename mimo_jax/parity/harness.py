"""Runs the cases of a folder of reference arrays and says of every array whether we compute the same.

`manifest.json` of such a folder lists every array of every `.npz` file with its tolerance. A file of inputs is checked
for presence, shapes and dtypes; every other file belongs to a case, a function that computes its arrays from the
inputs. An array that no case computes is a failure, so nothing is passed over.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np

from mimo_jax.kernels.dispatch import Implementation, default_implementation

Entry = Mapping[str, Any]

EQUAL, TIE, INPUT, SKIPPED, FAILED = "equal", "tie", "input", "skipped", "failed"
_KINDS = {"f": "floats", "i": "integers", "u": "integers", "b": "booleans"}


class ParityError(ValueError):
    """The folder or a file of it cannot be used; the message names it and what was expected."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    array: str  # file/array
    # `equal` (within the tolerance), `tie` (different only behind a decision whose margin is below the tolerance),
    # `input` (fed in, not computed), `skipped` or `failed`.
    verdict: str
    difference: float | None = None  # largest absolute difference; None where nothing could be compared
    tolerance: float | None = None  # largest difference allowed, 0 = exact
    note: str = ""  # why it is skipped, failed or a tie


class Case:
    """One file of expected arrays while its case runs.

    Attributes:
        root: the folder of all cases.
        folder: where the file lies.
        entries: what the manifest says about its arrays.
        expected: its arrays.
        rows: what has been compared so far.
    """

    def __init__(self, root: Path, file: str, entries: Mapping[str, Entry], expected: Mapping[str, np.ndarray]) -> None:
        self.root, self.file, self.folder = root, file, (root / file).parent
        self.entries, self.expected = entries, expected
        self.rows: dict[str, Row] = {}

    def inputs(self, file: str) -> dict[str, np.ndarray]:
        """All arrays of a file beside the expected one."""
        return load_arrays(self.folder / file)

    def names(self, prefix: str) -> list[str]:
        """Expected arrays not yet compared whose name begins with `prefix`, without it."""
        return [n.removeprefix(prefix) for n in self.entries if n.startswith(prefix) and n not in self.rows]

    def atol(self, name: str) -> float:
        """Tolerance of an expected array; 0 for one that is exact or not there."""
        return float(self.entries.get(name, {}).get("suggested_atol", 0.0))

    def check(self, name: str, actual: Any, decided: Any = True) -> None:
        """Compares one array; nothing happens if the folder does not hold it. Arguments as in `compare`."""
        if name in self.entries:
            self._add(name, *compare(self.expected[name], np.asarray(actual), self.atol(name), decided))

    def check_value(self, name: str, expected: Any, actual: Any, decided: bool = True) -> None:
        """Compares a value that stands in a JSON file, exactly."""
        verdict = EQUAL if expected == actual else FAILED if decided else TIE
        note = "" if verdict == EQUAL else f"expected {str(expected)[:80]!r}, got {str(actual)[:80]!r}"
        self._add(name, verdict, None, 0.0, note)

    def use(self, name: str) -> np.ndarray:
        """An array among the expected ones that says what was asked, such as which positions were recorded."""
        self._add(name, INPUT, None, None, "says what was asked")
        return self.expected[name]

    def _add(self, name: str, *result: Any) -> None:
        self.rows[name] = Row(f"{self.file}/{name}", *result)


def compare(
    expected: np.ndarray, actual: np.ndarray, atol: float, decided: Any = True
) -> tuple[str, float | None, float, str]:
    """Verdict, largest absolute difference, tolerance and note.

    Args:
        atol: largest difference allowed.
        decided: bool, broadcast to the arrays: where a difference cannot be excused by a near-tie.
    """
    kinds = [_KINDS.get(x.dtype.kind, str(x.dtype)) for x in (expected, actual)]
    if actual.shape != expected.shape or kinds[0] != kinds[1]:
        found = f"expected {kinds[0]} {[*expected.shape]}, got {kinds[1]} {[*actual.shape]}"
        return (FAILED if np.any(decided) else TIE), None, atol, found
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - b))
    difference = np.where(np.isnan(difference), np.inf, difference)
    wrong = difference > atol
    result = float(difference.max(initial=0.0)), atol
    if not wrong.any():
        return EQUAL, *result, ""
    count = f"{int(wrong.sum())} of {wrong.size} differ"
    fatal = wrong & decided
    if not fatal.any():
        return TIE, *result, f"{count}, all behind a margin below the tolerance"
    at = [*map(int, np.argwhere(fatal)[0])]
    return FAILED, *result, f"{count}, first at {at}: expected {a[*at]:g}, got {b[*at]:g}"


# ----------------------------------------------------------------------------------------------------------
# Folders


def _cases() -> dict[str, Callable[[Case], None]]:
    """Pattern of a file -> the function that computes its arrays."""
    from mimo_jax.parity import audio, generation, language_model, loss, pipeline, rvq, tokenizer

    return {
        "audio/resample_expected.npz": audio.resampling,
        "rvq_train/expected.npz": rvq.training,
        "tokenizer/*/single_expected.npz": tokenizer.single,
        "tokenizer/*/batch_expected.npz": tokenizer.batch,
        "tokenizer/*/streaming_expected.npz": tokenizer.streaming,
        "tokenizer/*/long_expected.npz": tokenizer.long,
        "lm/*/expected.npz": language_model.whole,
        "lm/*/train_loss/expected.npz": loss.training,
        "sampler/expected.npz": generation.sampler,
        "prompts/*/input_ids.npz": generation.prompts,
        "pipeline/expected.npz": pipeline.whole_calls,
    }


def run(folder: str | Path, only: Sequence[str] = (), kernels: Implementation = "auto") -> Iterator[Row]:
    """Compares the files of a folder in the manifest's order.

    Args:
        only: beginnings of file names, such as `tokenizer/tok_a`; all files by default.
        kernels: implementation of the kernels.

    Raises:
        ParityError: the folder cannot be used, or `only` names nothing in it.
    """
    root = Path(folder)
    manifest = read_json(root / "manifest.json")
    files = list(manifest.values()) if isinstance(manifest, dict) else []
    arrays = [entry for file in files if isinstance(file, dict) for entry in file.values()]
    if not arrays or not all(isinstance(entry, dict) and {"shape", "dtype"} <= entry.keys() for entry in arrays):
        raise ParityError(f'{root / "manifest.json"}: expected {{file: {{array: {{"shape": ..., "dtype": ...}}}}}}')
    for start in only:
        if not any(file.startswith(start) for file in manifest):
            raise ParityError(f"--only={start}: no file of {root / 'manifest.json'} begins like this")

    def one(file: str) -> list[Row]:
        if only and not file.startswith(tuple(only)):
            return [Row(file, SKIPPED, note=f"{len(manifest[file])} arrays, not asked for")]
        with jax.default_matmul_precision("highest"), default_implementation(kernels):
            return _run_file(root, file, manifest[file])

    # Most of the time goes into compiling, which leaves a core idle if files come one by one.
    with ThreadPoolExecutor(max_workers=2) as pool:
        for rows in pool.map(one, manifest):
            yield from rows


def _run_file(root: Path, file: str, entries: Mapping[str, Entry]) -> list[Row]:
    try:
        arrays = load_arrays(root / file)
    except ParityError as error:
        return [Row(f"{file}/{name}", FAILED, note=str(error)) for name in entries]
    faults = {name: "not in the manifest" for name in arrays if name not in entries}
    for name, entry in entries.items():
        if name not in arrays:
            faults[name] = "in the manifest, but not in the file"
        elif (found := (arrays[name].dtype, [*arrays[name].shape])) != (np.dtype(entry["dtype"]), entry["shape"]):
            faults[name] = f"expected {entry['dtype']} {entry['shape']} as in the manifest, got {found[0]} {found[1]}"
    rows = [Row(f"{file}/{name}", FAILED, note=fault) for name, fault in faults.items()]
    if file.endswith(("inputs.npz", "/audio_codes.npz")):
        return rows or [Row(file, INPUT, note=f"{len(arrays)} arrays, as in the manifest")]
    good = {name: entry for name, entry in entries.items() if name not in faults}
    case = Case(root, file, good, arrays)
    reason = "no case computes it"
    for pattern, function in _cases().items():
        if good and PurePosixPath(file).match(pattern):
            try:
                function(case)
            except Exception as error:  # one broken case must not hide the others
                reason = f"its case broke off: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    rows += case.rows.values()
    for name in good.keys() - case.rows.keys():
        if arrays[name].dtype.kind == "U" and name.split("/")[-1] == "meta":
            rows.append(Row(f"{file}/{name}", SKIPPED, note="says where the arrays come from"))
        else:
            rows.append(Row(f"{file}/{name}", FAILED, note=reason))
    return rows


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file. Raises ParityError: it is missing or broken."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise ParityError(f"{path}: no such file") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ParityError(f"{path}: expected an intact .npz file ({error})") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises ParityError: it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParityError(f"{path}: no such file; expected a folder of reference arrays") from None
    except (OSError, ValueError) as error:
        raise ParityError(f"{path}: expected a readable JSON file ({error})") from None


# ----------------------------------------------------------------------------------------------------------
# Table


def line(row: Row) -> str:
    """One line of the table: array, largest difference, tolerance, verdict."""
    difference = "-" if row.difference is None else f"{row.difference:.2e}"
    tolerance = "-" if row.tolerance is None else "exact" if row.tolerance == 0 else f"{row.tolerance:.1e}"
    return f"{row.array:<86} {difference:>9} {tolerance:>9}  {row.verdict}{': ' * bool(row.note)}{row.note}"


def summary(rows: Sequence[Row]) -> str:
    """How many arrays were compared, skipped and failed."""
    count = Counter(row.verdict for row in rows)
    compared = f"compared {count[EQUAL] + count[TIE] + count[FAILED]}"
    ties = f" ({count[TIE]} of them equal up to a near-tie)" if count[TIE] else ""
    return f"{compared}{ties}, fed in {count[INPUT]}, skipped {count[SKIPPED]}, failed {count[FAILED]}"


def report(rows: Sequence[Row], seconds: float) -> str:
    """All rows as JSON."""
    values = {"summary": summary(rows), "seconds": round(seconds, 1), "arrays": [asdict(row) for row in rows]}
    return json.dumps(values, indent=1) + "\n"

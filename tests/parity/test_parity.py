"""Equal to the reference implementation: on the arrays of the repository, and on all that MIMO_JAX_PARITY names."""

import os
from pathlib import Path

import pytest

from mimo_jax.parity import harness

COMPACT = Path(__file__).parents[1] / "data" / "parity"


def cases():
    """(folder, file) of every file of expected arrays; those of the repository unless MIMO_JAX_PARITY has them too."""
    found = {}
    for folder in map(Path, filter(None, (COMPACT, os.environ.get("MIMO_JAX_PARITY")))):
        if (folder / "manifest.json").is_file():
            found |= {file: folder for file in harness.read_json(folder / "manifest.json") if "inputs" not in file}
    return [pytest.param(folder, file, id=f"{folder.parent.name}:{file}") for file, folder in found.items()]


@pytest.mark.parametrize(("folder", "file"), cases())
def test_every_array_equals_the_reference(folder, file):
    rows = [row for row in harness.run(folder, [file]) if row.array.startswith(file)]
    assert rows and [harness.line(row) for row in rows if row.verdict == harness.FAILED] == []


def test_the_arrays_of_the_repository_are_few_and_cover_every_model():
    files = [path for path in COMPACT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5_000_000
    assert {"lm", "prompts", "rvq_train", "sampler", "tokenizer"} <= {path.name for path in COMPACT.iterdir()}

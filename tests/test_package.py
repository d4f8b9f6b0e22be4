"""The house: what is installed, what is locked, and which way imports go."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mimo_jax"

# A module may import from its own layer and from those below it.
LAYERS = (
    ("cli",),
    ("parser",),
    ("verbs",),
    ("quickstart", "quickstart_report"),
    ("parity",),
    ("report", "loading", "convert", "codec_files", "launching"),
    ("planning", "scaling"),
    ("training",),
    ("evals",),
    ("generation",),
    ("corpora",),
    ("data",),
    ("interop",),
    ("models",),
    ("kernels",),
    ("sharding",),
    ("audio", "text"),
    ("presets",),
    ("config_files",),
    ("chips",),
    ("atomic", "config", "rows", "trees", "progress", "supervisor", "xla_flags"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def _sources():
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "mimo_jax":
                yield from (f"mimo_jax.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", _sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in RANK, f"mimo_jax.{own} has no place in the layers"
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "mimo_jax" and len(parts) > 1 and not parts[1].startswith("__"):
            assert RANK[own] <= RANK[parts[1]], f"{own} may not import {name}"


@pytest.mark.parametrize("path", _sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_models_import_flax(path):
    if path.relative_to(PACKAGE).parts[0] != "models":
        assert not [name for name in _imports(path) if name.split(".")[0] == "flax"]


def test_every_data_file_of_the_package_is_installed():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["mimo_jax"]
    files = {p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert files - {p for pattern in patterns for p in PACKAGE.glob(pattern)} == set()


def test_kernels_are_installed_inside_the_package_only(tmp_path):
    try:
        importlib.metadata.version("mimo-jax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mimo-jax is not installed in this environment")
    script = "import importlib.util as u, mimo_jax.kernels; assert u.find_spec('kernels') is None"
    subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, check=True)


def test_the_lock_pins_every_dependency_with_hashes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(d for e in ("dev", "synth") for d in project["optional-dependencies"][e])]
    entries = re.split(r"\n(?=[a-z])", (ROOT / "requirements.lock").read_text())
    locked = {}
    for entry in filter(None, (e.strip() for e in entries)):
        match = re.match(r"([a-z0-9.-]+)==[\w.+!-]+ \\\n\s+--hash=sha256:[0-9a-f]{64}", entry)
        assert match, f"expected name==version and hashes, got {entry[:80]!r}"
        locked[match[1]] = entry
    for requirement in wanted:
        name = re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")
        assert name in locked, f"{name} is not in requirements.lock: run `make lock`"


def test_the_lock_names_no_host_and_no_path():
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if not line.startswith("#"):
            assert not re.search(r"[/@]|index-url|find-links|trusted-host", line), line

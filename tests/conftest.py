"""Settings that every test needs, made before JAX is imported, and fixtures that several packages share."""

from __future__ import annotations

import os
from pathlib import Path

_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "jax"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # Four virtual devices, so that meshes can be tested on any machine.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()
# XLA has as many threads as devices, and a device that waits for another in a collective keeps its own: with none to
# spare, they may all wait until XLA ends the process.
os.environ.setdefault("NPROC", "8")
# Ahead-of-time compilation for TPU: no metadata server here, and parallel tests must not fight over a lock file.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Compiled programs are kept between runs. Environment variables, so that child processes of the tests share them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import pytest  # noqa: E402  (the environment comes first)


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Folder of the parity goldens, named by the variable MIMO_JAX_PARITY; skips the test where there is none."""
    folder = os.environ.get("MIMO_JAX_PARITY")
    if not folder:
        pytest.skip("MIMO_JAX_PARITY is not set: parity goldens are not available")
    path = Path(folder)
    if not (path / "manifest.json").is_file():
        pytest.skip(f"MIMO_JAX_PARITY={folder}: expected a folder with manifest.json")
    return path


@pytest.fixture(scope="session")
def librivox_dir() -> Path:
    """Five recorded public-domain sentences (16 kHz) with `manifest.jsonl`."""
    return Path(__file__).resolve().parent / "data" / "librivox"

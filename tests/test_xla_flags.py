"""Compiler flags: which are set, and that the compilers here know them (one that does not ends the process)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mimo_jax import xla_flags

EVERYTHING = {
    "LIBTPU_INIT_ARGS": xla_flags.TPU | xla_flags.TPU_TENSOR,
    "XLA_FLAGS": xla_flags.GPU | xla_flags.GPU_TENSOR,
}


def flags(environment: dict[str, str], variable: str) -> dict[str, str]:
    return dict(word.removeprefix("--").partition("=")[::2] for word in environment[variable].split())


@pytest.fixture
def installed(monkeypatch):
    """Makes these packages the ones that are installed."""

    def make(*names: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in names else None)

    return make


def test_accelerators_that_are_installed_get_their_flags(installed):
    installed("libtpu", "jax_cuda13_plugin")
    environment: dict[str, str] = {}
    xla_flags.set_flags(environment, tensor=True)
    assert {name: flags(environment, name) for name in environment} == EVERYTHING
    environment = {}
    xla_flags.set_flags(environment, tensor=False)
    assert flags(environment, "XLA_FLAGS") == xla_flags.GPU and flags(environment, "LIBTPU_INIT_ARGS") == xla_flags.TPU


def test_what_the_user_has_set_stays(installed):
    installed("jax_cuda12_plugin")
    name = "xla_gpu_enable_latency_hiding_scheduler"
    environment = {"XLA_FLAGS": f"--xla_dump_to=/x --{name}=false"}
    xla_flags.set_flags(environment, tensor=False)
    assert flags(environment, "XLA_FLAGS") == {**xla_flags.GPU, "xla_dump_to": "/x", name: "false"}
    assert environment["XLA_FLAGS"].count(name) == 1 and "LIBTPU_INIT_ARGS" not in environment


@pytest.mark.parametrize(("platforms", "packages"), [("", ()), ("cpu", ("libtpu", "jax_cuda13_plugin"))])
def test_a_cpu_gets_none(installed, platforms, packages):
    installed(*packages)
    environment = {"JAX_PLATFORMS": platforms}
    xla_flags.set_flags(environment, tensor=True)
    assert environment == {"JAX_PLATFORMS": platforms}


TPU_PROGRAM = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
mesh = topologies.make_mesh(topology, (4,), ("x",))
cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
a = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=cut)
jax.jit(lambda a, b: a @ b, out_shardings=cut).lower(a, a).compile()
"""


@pytest.mark.parametrize(
    ("variable", "program"),
    [
        ("XLA_FLAGS", "import jax; jax.block_until_ready(jax.numpy.zeros(1) + 1)"),
        pytest.param("LIBTPU_INIT_ARGS", TPU_PROGRAM, marks=pytest.mark.slow),
    ],
)
def test_the_compilers_know_the_flags(variable, program):
    if variable == "LIBTPU_INIT_ARGS":
        pytest.importorskip("libtpu")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for extra, known in (("", True), (" --xla_no_such_flag=true", False)):
        environment[variable] = " ".join(f"--{k}={v}" for k, v in EVERYTHING[variable].items()) + extra
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) == known, done.stderr

"""The cache of compiled plans: what is kept, what finds it, and what becomes of a damaged entry."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mimo_jax.chips import parse_topology
from mimo_jax.config import MeshConfig
from mimo_jax.config_files import load_config
from mimo_jax.planning.compiled import Compiled, Compiler, compile_step, default_cache, tpu_devices
from mimo_jax.sharding import make_mesh
from mimo_jax.xla_flags import TPU, TPU_TENSOR, tpu_flags

V5E = parse_topology("v5e:2x2")


class Program:
    """A lowered program that counts how often it is compiled."""

    def __init__(self, width: int) -> None:
        self.compiled = 0
        self._lowered = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((width, width), jnp.float32))
        self.as_text = self._lowered.as_text

    def compile(self, compiler_options=None):
        self.compiled += 1
        return self._lowered.compile(compiler_options)


def test_an_answer_is_kept_and_says_so(tmp_path):
    program = Program(64)
    first = Compiler(tmp_path / "plans")(program, V5E)
    again = Compiler(tmp_path / "plans")(program, V5E)
    assert program.compiled == 1 and not first.cached and again.cached
    assert first.argument_bytes == 64 * 64 * 4 and again.seconds == first.seconds > 0
    assert again.to_json() == first.to_json()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b'{"collectives": [{}]}', b"\xff", "seconds"])
def test_a_damaged_entry_is_made_anew(content, tmp_path):
    program = Program(8)
    compiler = Compiler(tmp_path)
    right = compiler(program, V5E)
    (entry,) = tmp_path.glob("*.json")
    entry.write_bytes(right.to_json().replace(b'"seconds"', b'"second"') if isinstance(content, str) else content)
    assert not compiler(program, V5E).cached and program.compiled == 2
    assert compiler(program, V5E).cached


def test_another_program_topology_or_flag_is_another_entry(tmp_path, monkeypatch):
    compiler = Compiler(tmp_path)
    for program, topology in ((Program(8), V5E), (Program(16), V5E), (Program(8), parse_topology("v5e:2x2", 2))):
        assert not compiler(program, topology).cached
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_enable_latency_hiding_scheduler=true")
    assert not compiler(Program(8), V5E).cached
    flags = {"xla_backend_optimization_level": "1"}
    assert not compiler(Program(8), V5E, flags).cached and compiler(Program(8), V5E, flags).cached
    assert len(list(tmp_path.iterdir())) == 5


def test_a_flag_that_the_compiler_does_not_know_is_named_and_left_out(tmp_path, capsys):
    program = Program(8)
    flags = {"xla_backend_optimization_level": "1", "xla_no_such_flag": "true"}
    assert Compiler(tmp_path)(program, V5E, flags).argument_bytes == 256 and program.compiled == 2
    assert "no flag xla_no_such_flag: compiled without it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compilers_for_tpus_take_the_flags_of_training(name, monkeypatch, capsys):
    """And heed them: a value that is none is refused."""
    pytest.importorskip("libtpu")
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    topology = parse_topology(name)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1, tensor=2), tpu_devices(topology))
    fsdp = mesh.shape["fsdp"]
    cut = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    program = jax.jit(lambda a, b: a @ b).lower(cut, cut)
    flags = tpu_flags(tensor=True)
    assert Compiler()(program, topology, flags).argument_bytes == 2 * 512 * 512 * 2 // (2 * fsdp)
    assert "compiled without it" not in capsys.readouterr().err
    for flag in flags:
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"'maybe' .*{flag}"):
            Compiler()(program, topology, {flag: "maybe"})


def test_a_step_is_compiled_with_the_flags_that_training_sets(monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_enable_async_all_gather=false")
    overrides = [f"--config.{s}" for s in ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2", "compute.attention=chunked")]
    config = load_config(f"{Path(__file__).parents[2] / 'configs' / 'text.py'}:tiny", overrides)
    seen, _ = compile_step(config, V5E, lambda program, topology, flags: flags)
    assert seen == {k: v for k, v in (TPU | TPU_TENSOR).items() if k != "xla_enable_async_all_gather"}


def test_text_is_written_of_what_is_compiled_now(tmp_path):
    program = Program(8)
    Compiler(tmp_path)(program, V5E)
    assert not Compiler(tmp_path, str(tmp_path / "hlo"))(program, V5E).cached
    assert (tmp_path / "hlo").read_text().startswith("HloModule")


def test_without_a_cache_nothing_is_read_or_written(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = Program(8)
    assert default_cache() == tmp_path / "mimo-jax" / "plans"
    assert [Compiler()(program, V5E).cached for _ in range(2)] == [False, False]
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_costs_the_plan_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    found = Compiler(tmp_path / "file")(Program(8), V5E)
    assert isinstance(found, Compiled) and "cannot be written" in capsys.readouterr().err

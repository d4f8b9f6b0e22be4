"""The cache of compiled plans: what is kept, what finds it, and what becomes of a damaged entry."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from mimo_jax.chips import parse_topology
from mimo_jax.planning.compiled import Compiled, Compiler, default_cache

V5E = parse_topology("v5e:2x2")


class Program:
    """A lowered program that counts how often it is compiled."""

    def __init__(self, width: int) -> None:
        self.compiled = 0
        self._lowered = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((width, width), jnp.float32))
        self.as_text = self._lowered.as_text

    def compile(self):
        self.compiled += 1
        return self._lowered.compile()


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
    assert len(list(tmp_path.iterdir())) == 4


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

"""Collectives are read from real programs: kinds, sizes, loops, and every way of writing a group."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from mimo_jax.config import MeshConfig
from mimo_jax.planning.hlo import Collective, _group, collectives
from mimo_jax.sharding import make_mesh


def test_collectives_of_a_program_with_nested_loops():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])

    def layer(x, w):
        whole = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)  # [8, 8]
        return jnp.tanh(x @ whole), None

    def body(x, w):
        x = jax.lax.scan(lambda x, _: jax.lax.scan(layer, x, w), x, None, length=5)[0]
        return jax.lax.psum(x, "data"), jax.lax.psum_scatter(x, ("data", "fsdp"), scatter_dimension=1, tiled=True)

    rows = PartitionSpec(("data", "fsdp"))
    step = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(rows, PartitionSpec(None, "fsdp")),
        out_specs=(PartitionSpec("fsdp"), PartitionSpec(None, ("data", "fsdp"))),
        check_vma=False,
    )
    x, w = jax.ShapeDtypeStruct((16, 8), jnp.float32), jax.ShapeDtypeStruct((3, 8, 8), jnp.float32)
    found = collectives(jax.jit(step).lower(x, w).compile().as_text())
    assert {(c.kind, c.size, c.count, len(c.group)) for c in found} == {
        ("all-gather", 8 * 8 * 4, 5 * 3, 2),
        ("all-reduce", 4 * 8 * 4, 1, 2),
        ("reduce-scatter", 4 * 8 * 4, 1, 4),
    }
    groups = {c.kind: c.group for c in found}
    assert groups["all-gather"] == (0, 1) and groups["all-reduce"] == (0, 2)


@pytest.mark.parametrize(
    ("kind", "n", "wire"),
    [("all-gather", 4, 75.0), ("reduce-scatter", 4, 75.0), ("all-reduce", 4, 150.0), ("collective-permute", 2, 100.0)],
)
def test_bytes_on_the_wire_are_those_of_rings(kind, n, wire):
    assert Collective(kind, 50, 2, tuple(range(n))).wire_bytes == wire


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, x", (0, 2)),
        ("replica_groups=[2,2]<=[4]", (0, 1)),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", (0, 2)),
        ("replica_groups=mesh['data'=2,'fsdp'=3] {'data'}, x", (0, 3)),
        ("replica_groups=mesh['data'=2,'fsdp'=3] {'data','fsdp'}", (0, 1, 2, 3, 4, 5)),
        ("source_target_pairs={{1,2},{2,1}}", (1, 2)),
    ],
)
def test_every_way_of_writing_a_group(text, group):
    assert _group(text) == group


def test_asynchronous_and_fused_collectives_count_once():
    text = """HloModule step

%start (p: bf16[1,8]) -> (bf16[1,8], bf16[4,8]) {
  %g.1 = bf16[4,8]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

%fused_computation.2 (p: bf16[1,8]) -> bf16[4,8] {
  %g.2 = bf16[4,8]{1,0} all-gather(%p), channel_id=8, replica_groups={{0,1,2,3}}, dimensions={0}
}

%async_collective_fusion.3 (p: bf16[1,8]) -> bf16[4,8] {
  %g.3 = bf16[4,8]{1,0} all-gather(%p), channel_id=8, replica_groups={{0,1,2,3}}, dimensions={0}
}

%all-reduce-scatter.4 (p: f32[4,8]) -> f32[1,8] {
  %r = f32[4,8]{1,0} all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main (a: bf16[1,8]) -> bf16[4,8] {
  %c = bf16[4,8] fusion(%a), kind=kCustom, calls=%fused_computation.2, metadata={}
  %d = bf16[4,8] fusion(%a), kind=kOutput, calls=%async_collective_fusion.3
  %e = f32[1,8] fusion(%a), kind=kCustom, calls=%all-reduce-scatter.4
  %n = (bf16[4,8]{1,0}, u32[], token[]) send(%c), is_host_transfer=true, attributes={"megascale"}
  %s = (bf16[1,8], bf16[4,8]) all-gather-start(%a), channel_id=10, replica_groups={{0,1,2,3}}, dimensions={0}
}
"""
    found = sorted((c.kind, c.size, c.count) for c in collectives(text))
    assert found == [("all-gather", 64, 1), ("all-gather", 64, 1), ("reduce-scatter", 128, 1), ("slices", 64, 1)]


def test_a_collective_that_runs_on_beside_a_loop_counts_where_it_starts():
    text = """%async_collective_fusion.3 (p: bf16[1,8]) -> bf16[4,8] {
  %g.3 = bf16[4,8]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

%fused_computation.1 (p: bf16[1,8]) -> bf16[4,8] {
  %g.2 = bf16[4,8]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

%eight (p: u32[]) -> pred[] {
  %c = u32[]{:T(128)} constant(8)
}

%inner (a: bf16[1,8]) -> bf16[4,8] {
  %d = bf16[4,8] fusion(%a), kind=kOutput, calls=%async_collective_fusion.3
}

%outer (a: bf16[1,8]) -> bf16[4,8] {
  %b = bf16[4,8] fusion(%a), kind=kCustom, calls=%fused_computation.1
  %w = bf16[4,8] while(%a), condition=%eight, body=%inner
}

ENTRY %main (a: bf16[1,8]) -> bf16[4,8] {
  %w = bf16[4,8] while(%a), condition=%three, body=%outer
}

%three (p: s32[]) -> pred[] {
  %c = s32[] constant(3)
}
"""
    assert [(c.kind, c.size, c.count) for c in collectives(text)] == [("all-gather", 64, 3)]


def test_a_loop_that_counts_by_twos_runs_half_as_often():
    text = """%cond (p: (f32[4], u32[])) -> pred[] {
  %p = (f32[4], u32[]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=1
  %c = u32[]{:T(128)} constant(7)
  ROOT %l = pred[] compare(%i, %c), direction=LT
}

%body (p: (f32[4], u32[])) -> (f32[4], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %p = (f32[4], u32[]) parameter(0)
  %x = f32[4] get-tuple-element(%p), index=0
  %i = u32[] get-tuple-element(%p), index=1
  %next = u32[]{:T(128)} add(%i, %two)
  %moved = f32[4] collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  ROOT %t = (f32[4], u32[]) tuple(%moved, /*index=1*/%next)
}

ENTRY %main (a: (f32[4], u32[])) -> (f32[4], u32[]) {
  %w = (f32[4], u32[]) while(%a), condition=%cond, body=%body
}
"""
    assert [(c.kind, c.size, c.count) for c in collectives(text)] == [("collective-permute", 16, 4)]
    by_one = text.replace("constant(2)", "constant(1)")
    assert [c.count for c in collectives(by_one)] == [7]


def test_a_loop_without_a_bound_is_refused():
    text = """%cond (p: s32[]) -> pred[] {
  %p = s32[] parameter(0)
}

ENTRY %main (a: s32[]) -> s32[] {
  %r = f32[2] all-reduce(%a), replica_groups={{0,1}}, to_apply=%cond
  %w = s32[] while(%a), condition=%cond, body=%cond
}
"""
    with pytest.raises(ValueError, match="bound"):
        collectives(text)

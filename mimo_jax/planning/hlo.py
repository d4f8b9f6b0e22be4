"""Reads the collectives of a compiled program from its HLO text.

XLA's own cost analysis counts the body of a loop once and knows no interconnect. Here every computation is weighted by
how often it runs: a loop by the bound that its condition compares with and the step that its body counts on by.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf" = (?P<type>.+?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(")
_BETWEEN_SLICES = re.compile(r" send\(.*is_host_transfer=true.*megascale")
_HEADER = re.compile(r"(?:ENTRY )?%(?P<name>\S+) \(.*\{$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLS = re.compile(
    r"\b(?:calls|to_apply|branch_computations|true_computation|false_computation)=(?:\{([^}]*)\}|([^\s,}]+))"
)
_LOOP = re.compile(r" while\(.*\bcondition=%(?P<condition>[^\s,]+), body=%(?P<body>[^\s,]+)")
_TRIPS = re.compile(r'known_trip_count[":{\sn]+(\d+)')
_BOUND = re.compile(r" = [su]32\[\]\S* constant\((\d+)\)")


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all`, `ragged-all-to-all`, `collective-permute`; or
            `slices`, what a TPU hands to the network between slices to be reduced there.
        size: bytes of the whole array on one device: the result of a gather, the operand of a reduction.
        count: how often a step runs it.
        group: numbers of the devices that take part together, of the first group; a device's number is its place in
            `mesh.devices.flat`. Empty for `slices`.
    """

    kind: str
    size: int
    count: int
    group: tuple[int, ...]

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in a step, with ring algorithms."""
        n = len(self.group)
        if self.kind in ("collective-permute", "slices"):
            return float(self.size * self.count)
        return self.size * self.count * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)


class _Program(NamedTuple):
    entry: str
    lines: dict[str, list[str]]  # of each computation


def collectives(hlo: str) -> list[Collective]:
    """The collectives of a program that run among more than one device.

    Args:
        hlo: `compiled.as_text()`, optimised and partitioned.

    Raises:
        ValueError: a loop has no constant bound, or the groups of a collective cannot be read.
    """
    if not any(kind in hlo for kind in (*_KINDS, "megascale")):
        return []  # such a program may have loops without a constant bound
    program = _computations(hlo)
    pending: list[tuple[str, int, tuple[str, ...]]] = [(program.entry, 1, ())]
    # An asynchronous collective stands in the fusions that start it, carry it on beside other work (in loops inside of
    # the computation that starts it, too) and end it: by what identifies it, under each computation that has one.
    fused: dict[tuple[str, ...], dict[tuple[str, ...], Collective]] = defaultdict(dict)
    found = []
    while pending:
        name, times, callers = pending.pop()
        for line in program.lines.get(name, ()):
            pending += [(called, times * n, (*callers, name)) for called, n in _called(program, line)]
            match = _COLLECTIVE.search(line)
            if match is None:
                if _BETWEEN_SLICES.search(line):
                    found.append(Collective("slices", _size(_SHAPE.findall(line)[:1]), times, ()))
                continue
            group = _group(line)
            if len(group) < 2:
                continue
            collective = _collective(match, group, times, scattered="all-reduce-scatter" in name)
            if "fus" in name:
                channel = re.search(r"channel_id=(\d+)", line)
                key = (channel[1] if channel else line, match["kind"], *_SHAPE.findall(match["type"])[0])
                fused[key][callers] = collective
            else:
                found.append(collective)
    for places in fused.values():
        found += [c for at, c in places.items() if not any(at[:n] in places for n in range(len(at)))]
    return found


def _computations(hlo: str) -> _Program:
    lines: dict[str, list[str]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        header = _HEADER.match(line)
        if header:
            current = lines.setdefault(header["name"], [])
            entry = header["name"] if line.startswith("ENTRY") else entry
        elif line == "}":
            current = None
        elif current is not None:
            current.append(line)
    if not entry:
        raise ValueError("HLO: expected an ENTRY computation")
    return _Program(entry, lines)


def _called(program: _Program, line: str) -> Iterator[tuple[str, int]]:
    """Computations that an instruction runs, and how often."""
    loop = _LOOP.search(line)
    if loop:
        known = _TRIPS.search(line)
        bounds = [int(n) for x in program.lines[loop["condition"]] for n in _BOUND.findall(x)]
        if not known and len(bounds) != 1:
            raise ValueError(f"HLO: expected one bound in the condition {loop['condition']}, got {bounds}")
        yield loop["body"], int(known[1]) if known else -(-bounds[0] // _step(program, loop["condition"], loop["body"]))
        return
    for several, one in _CALLS.findall(line):
        for name in (several or one).split(","):
            yield name.strip().lstrip("%"), 1


def _step(program: _Program, condition: str, body: str) -> int:
    """By how much a loop counts on. Scans do by 1; products that are computed while their operand goes round, by 2."""
    counters = [re.search(r" get-tuple-element\(.*, index=(\d+)", x) for x in program.lines[condition]]
    indices = [int(match[1]) for match in counters if match]
    root = next((x for x in program.lines[body] if x.startswith("  ROOT")), "")
    elements = re.findall(r"%([^\s,)]+)", root.partition(" tuple(")[2])
    values = {x.split(" = ")[0].strip(" %"): x for x in program.lines[body] if " = " in x}
    if len(indices) == 1 and indices[0] < len(elements):
        added = re.search(r" add\(%[^\s,]+, %([^\s,)]+)\)", values.get(elements[indices[0]], ""))
        constant = _BOUND.search(values.get(added[1], "")) if added else None
        if constant:
            return int(constant[1])
    return 1


def _collective(match: re.Match[str], group: Sequence[int], times: int, scattered: bool) -> Collective:
    kind = match["kind"]
    shapes = _SHAPE.findall(match["type"])
    if match["start"] and kind != "all-reduce":
        # The type of an asynchronous start holds the operands, the results, and sometimes two counters.
        shapes = [s for s in shapes if s[1]]
        shapes = shapes[len(shapes) // 2 :]
    size = _size(shapes)
    if kind == "reduce-scatter":
        size *= len(group)
    elif kind == "all-reduce" and scattered:  # TPU programs write a reduce-scatter as a fusion around an all-reduce
        kind = "reduce-scatter"
    return Collective(kind, size, times, tuple(group))


def _size(shapes: Sequence[tuple[str, str]]) -> int:
    """Bytes of arrays, given as (dtype, lengths)."""
    return int(sum(_width(dtype) * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in shapes))


def _width(dtype: str) -> float:
    """Bytes of an element."""
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return int(bits[1]) / 8 if bits else 1  # pred


def _group(line: str) -> tuple[int, ...]:
    """The first group of a collective, in any of the forms that HLO writes."""
    pairs = re.search(r"source_target_pairs=\{\{([\d,]+)\}", line)
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if pairs or listed:
        numbers = (pairs or listed)[1]  # type: ignore[index]
        return tuple(int(n) for n in numbers.split(",") if n)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        shape, dims, order = (tuple(map(int, x.split(","))) if x else None for x in iota.groups())
        ids = np.arange(math.prod(dims or ())).reshape(dims)
        return tuple((ids.transpose(order) if order else ids).reshape(shape)[0].tolist())
    mesh = re.search(r"replica_groups=mesh\[([^\]]+)\] \{([^}]*)\}", line)
    if mesh:
        axes = [axis.split("=") for axis in mesh[1].split(",")]
        chosen = set(mesh[2].split(","))
        ids = np.arange(math.prod(int(n) for _, n in axes)).reshape([int(n) for _, n in axes])
        return tuple(ids[tuple(slice(None) if name in chosen else 0 for name, _ in axes)].flatten().tolist())
    raise ValueError(f"HLO: cannot read the groups of {line.strip()[:200]}")

"""Which documents stand in which row: a pure function of the seed, so that row i can be asked for at any time.

Documents of all sources are mixed by a fixed schedule, cut into blocks of `block_documents`, and each block is packed
into rows that are then shuffled inside the block. A source goes through its records once per epoch in an order keyed by
(seed, source, epoch). Nothing here depends on the number of processes, and only lengths are read.

The place of row i is found by counting the rows of the blocks before it; `RowPlan.locate` does that once per block and
a checkpoint saves where its block begins, so a restart does not count again. Where the weights of sources change, a new
phase begins; its first block is found by the same counting and saved as well.
"""

from __future__ import annotations

import bisect
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mimo_jax.data.hashing import Permutation, hash_arrays, hash_ints, hash_text
from mimo_jax.data.packing import pack
from mimo_jax.data.records import DataError

_CACHED_BLOCKS = 4
_RATE_BITS = 40


class DocumentRef(NamedTuple):
    """Where a document of a row comes from."""

    source: int  # number of the source in the plan
    record: int  # and of the record in it
    epoch: int
    task: int  # the layout
    key: int  # random key of the document
    piece: int  # which of the pieces of a cut document


class Documents(NamedTuple):
    """Documents that a source makes of some records; a record may become several (pieces) or none."""

    owner: np.ndarray  # int [n], which of the asked records each document belongs to
    task: np.ndarray  # int [n]
    piece: np.ndarray  # int [n]
    lengths: np.ndarray  # int [n, budgets]


class PlanSource(Protocol):
    """What the plan needs to know of a source."""

    name: str
    weight: float  # share of the first budget (positions) among the sources
    changes: tuple[tuple[float, float], ...]  # (positions, weight from there on), ascending
    records: np.ndarray  # int64: numbers of the records that can become documents
    mean_length: float  # of what a record becomes, in the first budget

    def documents(self, records: np.ndarray, keys: np.ndarray) -> Documents:
        """Layouts and lengths of records under their random keys (uint64)."""


class Block(NamedTuple):
    """A packed block: its documents (columns source, record, epoch, task, piece), their keys, the rows over them."""

    columns: np.ndarray  # int64 [documents, 5]
    keys: np.ndarray  # uint64 [documents]
    rows: list[list[int]]


class RowPlan:
    """Rows of packed documents by number: `plan.row(i)`.

    Args:
        sources: at least one with a weight, each with records.
        capacities: both budgets of a row, the first being positions.
        block_documents: records that are mixed and packed together.
        one_pass: every record of every source once (validation) instead of for ever; weights then do not matter.

    Raises:
        DataError: there is nothing to plan.
    """

    def __init__(
        self,
        sources: Sequence[PlanSource],
        capacities: tuple[int, int],
        block_documents: int,
        seed: int,
        one_pass: bool = False,
    ):
        self.sources = [s for s in sources if one_pass or s.weight > 0 or any(w > 0 for _, w in s.changes)]
        if not self.sources:
            raise DataError("data.sources: expected at least one source with a positive weight")
        self.capacities, self._seed = capacities, seed
        counts = [len(s.records) for s in self.sources]
        for source, count in zip(self.sources, counts, strict=True):
            if not count:
                raise DataError(f"data source {source.name!r}: none of its records can become a document")
        self._block, self._counts = block_documents, counts
        changes = () if one_pass else sorted({at for s in self.sources for at, _ in s.changes})
        self._thresholds = [math.ceil(at / capacities[0]) for at in changes]  # row that each phase but the first needs
        self._rates = [self._rates_at(at, one_pass) for at in (0, *changes)]
        pairs = zip(counts, self._rates[0], strict=True)
        self.num_blocks = (
            max(math.ceil((n << _RATE_BITS) / (block_documents * rate)) for n, rate in pairs) if one_pass else None
        )
        self._keys = [hash_ints(seed, hash_text(s.name)) for s in self.sources]
        self._restart(0, 0, ())
        self._cache: OrderedDict[int, Block] = OrderedDict()
        self._lock = threading.RLock()

    def _rates_at(self, at: float, one_pass: bool) -> list[int]:
        """Records of each source per block (times 2^40), from so many positions on: in proportion to what is left of
        the pass, or to weight / mean length."""
        shares = []
        for source, count in zip(self.sources, self._counts, strict=True):
            weight = [source.weight, *(w for begin, w in source.changes if begin <= at)][-1]
            shares.append(float(count) if one_pass else weight / source.mean_length)
        if not sum(shares):
            expected = f"at least one source with a positive weight from {at:,.0f} tokens on"
            raise DataError(f"data.sources: expected {expected}")
        return [max(1, round(share / sum(shares) * (1 << _RATE_BITS))) if share else 0 for share in shares]

    def _restart(self, block: int, row: int, phases: Sequence[int]) -> None:
        """Counts on from a block and its first row; `phases` are the first blocks of those that have begun."""
        self._starts, self._first_block = [row], block  # first row of blocks first_block, first_block + 1, ...
        self._phases, self._taken = [0], [[0] * len(self.sources)]  # of each phase: first block, records taken before
        for first in phases:
            self._begin_phase(first)

    def _begin_phase(self, block: int) -> None:
        taken = [self.taken(i, block) for i in range(len(self.sources))]
        self._phases.append(block)
        self._taken.append(taken)

    def taken(self, source: int, block: int) -> int:
        """Records of a source that the blocks before `block` have used."""
        phase = bisect.bisect_right(self._phases, block) - 1
        blocks = block - self._phases[phase]
        n = self._taken[phase][source] + ((blocks * self._block * self._rates[phase][source]) >> _RATE_BITS)
        if self.num_blocks is not None:
            n = self._counts[source] if block >= self.num_blocks else min(n, self._counts[source])
        return n

    def block(self, number: int) -> Block:
        """Packs a block (the latest few are kept)."""
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number]
            block = self._pack(number)
            self._cache[number] = block
            if len(self._cache) > _CACHED_BLOCKS:
                self._cache.popitem(last=False)
            return block

    def _pack(self, number: int) -> Block:
        columns, keys, lengths = [], [], []
        for i, source in enumerate(self.sources):
            start, stop = self.taken(i, number), self.taken(i, number + 1)
            if start == stop:
                continue
            records, epochs = self._records(i, start, stop)
            draws = hash_arrays(self._keys[i], epochs, records)
            made = source.documents(records, draws)
            owner = made.owner
            columns.append(np.stack([np.full_like(owner, i), records[owner], epochs[owner], made.task, made.piece], 1))
            keys.append(draws[owner])
            lengths.append(made.lengths)
        if not columns:
            return Block(np.zeros((0, 5), np.int64), np.zeros(0, np.uint64), [])
        # Documents of a row stand in random order, not grouped by source or size.
        count = sum(map(len, keys))
        order = Permutation(count, hash_ints(self._seed, number, 1))(np.arange(count))
        packed = pack(np.concatenate(lengths)[order], self.capacities)
        shuffled = Permutation(len(packed), hash_ints(self._seed, number, 2))(np.arange(len(packed)))
        rows = [packed[j] for j in shuffled.tolist()]
        return Block(np.concatenate(columns)[order].astype(np.int64), np.concatenate(keys)[order], rows)

    def _records(self, source: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Record numbers and epochs of places start..stop in the endless sequence of a source."""
        eligible = self.sources[source].records
        places = np.arange(start, stop, dtype=np.int64)
        epochs, within = np.divmod(places, len(eligible))
        records = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            permutation = Permutation(len(eligible), hash_ints(self._keys[source], epoch))
            records[here] = eligible[permutation(within[here])]
        return records, epochs

    def locate(self, row: int) -> tuple[int, int]:
        """The block that holds a row, and the first row of that block; raises IndexError beyond the end of a pass."""
        with self._lock:
            if row < self._starts[0]:
                self._restart(0, 0, ())
            while self._starts[-1] <= row:
                number = self._first_block + len(self._starts) - 1
                if self.num_blocks is not None and number >= self.num_blocks:
                    raise IndexError(f"row {row} of {self._starts[-1]}")
                self._starts.append(self._starts[-1] + len(self.block(number).rows))
                while self._reached(self._starts[-1]) >= len(self._phases):
                    self._begin_phase(number + 1)
            i = bisect.bisect_right(self._starts, row) - 1
            return self._first_block + i, self._starts[i]

    def _reached(self, row: int) -> int:
        """Changes of weights that blocks from this row on know of."""
        return bisect.bisect_right(self._thresholds, row)

    def phases(self, block: int) -> list[int] | None:
        """First blocks of the phases but the first that have begun by `block`; None where weights never change."""
        with self._lock:
            return [first for first in self._phases[1:] if first <= block] if self._thresholds else None

    def start_from(self, block: int, row: int, phases: Sequence[int] = ()) -> None:
        """Tells the plan that `row` is the first row of `block` (as `locate` answered before), so it need not count.

        Raises:
            DataError: they do not fit the changes of weights.
        """
        ascending = list(phases) == sorted(phases) and all(0 < first <= block for first in phases)
        if len(phases) != self._reached(row) or not ascending:
            raise DataError(
                f"data position: expected the first blocks of {self._reached(row)} changes of weights up to block "
                f"{block}, got {list(phases)}"
            )
        with self._lock:
            self._restart(block, row, phases)

    def row(self, number: int) -> list[DocumentRef]:
        """The documents of a row, in order."""
        with self._lock:
            block_number, first = self.locate(number)
            block = self.block(block_number)
        items = block.rows[number - first]
        return [
            DocumentRef(c[0], c[1], c[2], c[3], int(block.keys[i]), c[4])
            for i, c in zip(items, block.columns[items].tolist(), strict=True)
        ]

    def num_rows(self) -> int:
        """Rows of a plan of one pass."""
        if self.num_blocks is None:
            raise ValueError("an endless plan has no number of rows")
        with self._lock:
            self._restart(0, 0, ())
            for number in range(self.num_blocks):
                self._starts.append(self._starts[-1] + len(self.block(number).rows))
            return self._starts[-1]

"""Which documents stand in which row: a pure function of the seed, so that row i can be asked for at any time.

Documents of all sources are mixed by a fixed schedule, cut into blocks of `block_documents`, and each block is packed
into rows that are then shuffled inside the block. A source goes through its records once per epoch in an order keyed by
(seed, source, epoch). Nothing here depends on the number of processes, and only lengths are read.

The place of row i is found by counting the rows of the blocks before it; `RowPlan.locate` does that once per block and
a checkpoint saves where its block begins, so a restart does not count again.
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
        sources: at least one, each with records and a positive weight.
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
        self.sources = [s for s in sources if one_pass or s.weight > 0]
        if not self.sources:
            raise DataError("data.sources: expected at least one source with a positive weight")
        self.capacities, self._seed = capacities, seed
        counts = [len(s.records) for s in self.sources]
        for source, count in zip(self.sources, counts, strict=True):
            if not count:
                raise DataError(f"data source {source.name!r}: none of its records can become a document")
        # Records of each source per block: in proportion to what is left of the pass, or to weight / mean length.
        shares = [float(n) for n in counts] if one_pass else [s.weight / s.mean_length for s in self.sources]
        self._block, self._counts = block_documents, counts
        self._rates = [max(1, round(share / sum(shares) * (1 << _RATE_BITS))) for share in shares]
        pairs = zip(counts, self._rates, strict=True)
        needed = max(math.ceil((n << _RATE_BITS) / (block_documents * rate)) for n, rate in pairs)
        self.num_blocks = needed if one_pass else None
        self._keys = [hash_ints(seed, hash_text(s.name)) for s in self.sources]
        self._starts, self._first_block = [0], 0  # first row of blocks first_block, first_block + 1, ...
        self._cache: OrderedDict[int, Block] = OrderedDict()
        self._lock = threading.RLock()

    def taken(self, source: int, block: int) -> int:
        """Records of a source that the blocks before `block` have used."""
        n = (block * self._block * self._rates[source]) >> _RATE_BITS
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
                self._starts, self._first_block = [0], 0
            while self._starts[-1] <= row:
                number = self._first_block + len(self._starts) - 1
                if self.num_blocks is not None and number >= self.num_blocks:
                    raise IndexError(f"row {row} of {self._starts[-1]}")
                self._starts.append(self._starts[-1] + len(self.block(number).rows))
            i = bisect.bisect_right(self._starts, row) - 1
            return self._first_block + i, self._starts[i]

    def start_from(self, block: int, row: int) -> None:
        """Tells the plan that `row` is the first row of `block` (as `locate` answered before), so it need not count."""
        with self._lock:
            self._starts, self._first_block = [row], block

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
            self._starts, self._first_block = [0], 0
            for number in range(self.num_blocks):
                self._starts.append(self._starts[-1] + len(self.block(number).rows))
            return self._starts[-1]

"""The row loader that training reads from: Grain reads and prefetches the rows that a plan numbers.

Global step t reads rows t * B .. (t + 1) * B of the plan; process p of P gets the p-th P-th of them, in order. So the
position in the data is the step, and every process count deals the same global batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from mimo_jax.data.plan import DocumentRef, RowPlan
from mimo_jax.data.records import DataError

_ENDLESS = 1 << 48


class RowLoader:
    """Iterator over the host-local part of global batches of packed rows (a NamedTuple of arrays, leading axis rows).

    A loader over one pass starts anew with every `iter(loader)`; its last batch is filled up with empty rows.
    `step` counts the batches read so far, which is the position in the data.

    Args:
        plan: numbers the rows.
        make_row: assembles one row, arrays without the batch axis, from its documents; called from several threads.
        fingerprint: what determines the stream: a run continues only where it is the same.
        process_count: number of parts, a divisor of `rows`; JAX's processes by default.
        threads: threads that read; 0 reads when asked.
        one_pass: end after every row of the plan was read.

    Raises:
        DataError: the rows cannot be dealt to the processes.
    """

    def __init__(
        self,
        plan: RowPlan,
        make_row: Callable[[list[DocumentRef]], Any],
        empty: Any,
        rows: int,
        fingerprint: Mapping[str, Any],
        process_index: int | None = None,
        process_count: int | None = None,
        threads: int = 2,
        one_pass: bool = False,
    ):
        if process_index is None or process_count is None:
            import jax

            process_index, process_count = jax.process_index(), jax.process_count()
        if rows % process_count or not 0 <= process_index < process_count:
            raise DataError(f"data.rows: expected a multiple of the number of processes ({process_count}), got {rows}")
        self.plan, self.fingerprint = plan, dict(fingerprint)
        self._make_row, self._empty, self._rows, self._threads = make_row, empty, rows, threads
        self._local = rows // process_count
        self._offset = process_index * self._local
        self._stop = -(-plan.num_rows() // rows) if one_pass else _ENDLESS // rows
        self.one_pass = one_pass
        self.step = 0
        self._iterator: Any = None

    def __iter__(self) -> Iterator[Any]:
        if self.one_pass and self.step:
            self.seek(0)
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = self._open()
        batch = next(self._iterator)
        self.step += 1
        return batch

    def _open(self) -> Any:
        import grain

        def read(number: int) -> Any:
            step, place = divmod(number, self._local)
            try:
                documents = self.plan.row(step * self._rows + self._offset + place)
            except IndexError:  # behind the end of a pass: the last batch is filled up
                return self._empty
            return self._make_row(documents)

        buffer = max(2 * self._local, 2 * self._threads) if self._threads else 0
        reading = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=buffer)
        numbers = grain.MapDataset.range(self.step * self._local, self._stop * self._local)
        return iter(numbers.map(read).to_iter_dataset(reading).batch(self._local, batch_fn=_stack))

    def seek(self, step: int) -> None:
        """Goes on with the batch after this step."""
        self.close()
        self.step = step

    def state(self) -> dict[str, Any]:
        """What `restore` needs: the step, and where its block of the plan begins. The same on every process."""
        try:
            block, first = self.plan.locate(self.step * self._rows)
        except IndexError:
            block = first = 0
        phases = self.plan.phases(block)
        known = {} if phases is None else {"phases": phases}
        return {"step": self.step, "block": block, "block_row": first, **known}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state` returned; raises DataError if it is no position of this stream."""
        try:
            step, block, row = (int(state[k]) for k in ("step", "block", "block_row"))
            phases = [int(first) for first in state.get("phases", ())]
        except (KeyError, TypeError, ValueError):
            raise DataError(f"data position: expected step, block and block_row, got {dict(state)!r}") from None
        if min(step, block, row) < 0 or row > step * self._rows:
            raise DataError(f"data position: expected a position of this stream, got {dict(state)!r}")
        self.seek(step)
        self.plan.start_from(block, row, phases)

    def close(self) -> None:
        """Stops the reading threads. The loader goes on where it was when it is asked for another batch."""
        if self._iterator is not None and hasattr(self._iterator, "close"):
            self._iterator.close()
        self._iterator = None

    def __enter__(self) -> RowLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stack(rows: list[Any]) -> Any:
    row_type = type(rows[0])  # LMRows or TokenizerRows
    return row_type(*(np.stack(column) for column in zip(*rows, strict=True)))

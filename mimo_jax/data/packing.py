"""Packing documents into rows under two budgets at once (positions and patches; RVQ frames and text tokens)."""

from __future__ import annotations

import numpy as np

# Part of a stream's fingerprint: another algorithm makes other rows.
VERSION = 2
_ENOUGH = 1.02  # rows beside the smallest possible number with which best fit is good enough


def pack(lengths: np.ndarray, capacities: tuple[int, int]) -> list[list[int]]:
    """Packs by best fit, or by alignment where that takes fewer rows; always the largest document first.

    Best fit takes the fullest row that has room. Where both budgets bind, it fills rows with documents that need one
    budget only and strands what is left of the other; alignment takes the row of which most is left of what the
    document needs (dot product of both; Panigrahy et al. 2011, "Heuristics for vector bin packing"). The result depends
    on nothing but the arguments: all is integers.

    Args:
        lengths: int [n, 2], what each document takes of each budget; raises ValueError if one exceeds a row.
        capacities: what a row has of each budget.

    Returns:
        For each row the numbers of its documents, ascending.
    """
    lengths = np.asarray(lengths, np.int64).reshape(-1, 2)
    over = lengths > np.asarray(capacities)
    if over.any():
        worst = int(np.argmax(over.any(axis=1)))
        got = tuple(lengths[worst].tolist())
        raise ValueError(f"document {worst}: expected lengths of at most {capacities}, got {got}")
    if not len(lengths):
        return []
    capacity = np.maximum(np.asarray(capacities, np.float64), 1)
    needed = lengths.sum(axis=0) / capacity  # rows, by each budget alone
    order = np.argsort(-(lengths / capacity).max(axis=1), kind="stable")
    fewest = max(1, int(np.ceil(needed.max())))
    fit = np.broadcast_to(_integers(needed / capacity, 30), lengths.shape)
    rows = _place(lengths, order, capacities, fewest, fit)
    if len(rows) > _ENOUGH * fewest and needed.min() > 0:
        aligned = _place(lengths, order, capacities, fewest, -lengths * _integers(needed / capacity**2, 20))
        rows = min(rows, aligned, key=len)
    return rows


def _integers(weights: np.ndarray, bits: int) -> np.ndarray:
    return np.round(weights / weights.max() * 2**bits).astype(np.int64)


def _place(
    lengths: np.ndarray, order: np.ndarray, capacities: tuple[int, int], count: int, weights: np.ndarray
) -> list[list[int]]:
    """Puts each document, in this order, into the row with room where `weights` [n, 2] x what is left is smallest.

    `count` rows are there from the beginning; another one is begun when none has room.
    """
    left, right = (np.full(len(lengths) + count, capacity, np.int64) for capacity in capacities)
    rows: list[list[int]] = [[] for _ in range(count)]
    never = np.iinfo(np.int64).max
    for item, (first, second), (a, b) in zip(
        order.tolist(), lengths[order].tolist(), weights[order].tolist(), strict=True
    ):
        x, y = left[: len(rows)], right[: len(rows)]
        row = int(np.argmin(np.where((x >= first) & (y >= second), x * a + y * b, never)))
        if left[row] < first or right[row] < second:
            row = len(rows)
            rows.append([])
        rows[row].append(item)
        left[row] -= first
        right[row] -= second
    return [sorted(row) for row in rows if row]

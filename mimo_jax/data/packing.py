"""Packing documents into rows under several budgets at once (positions and patches; RVQ frames and text tokens)."""

from __future__ import annotations

import numpy as np

_TRIES = 16  # rows looked at for one document before a new row is begun


def pack(lengths: np.ndarray, capacities: tuple[int, ...]) -> list[list[int]]:
    """Best-fit decreasing: the largest document first, each into the fullest row that still has room for it.

    Size is the largest share of any budget. Of the rows with room, the one with the least of the first budget left is
    taken (of several, the one that came to that point first). The result depends on nothing but the arguments.

    Args:
        lengths: int [n, budgets], what each document takes of each budget; raises ValueError if one exceeds a row.
        capacities: what a row has of each budget.

    Returns:
        For each row the numbers of its documents, ascending.
    """
    lengths = np.asarray(lengths, np.int64).reshape(-1, len(capacities))
    over = lengths > np.asarray(capacities)
    if over.any():
        worst = int(np.argmax(over.any(axis=1)))
        raise ValueError(
            f"document {worst}: expected lengths of at most {capacities}, got {tuple(lengths[worst].tolist())}"
        )
    size = (lengths / np.maximum(np.asarray(capacities), 1)).max(axis=1)
    order = np.argsort(-size, kind="stable").tolist()
    items = lengths.tolist()
    rows: list[list[int]] = []
    left: list[list[int]] = []
    # Rows by what they have left of the first budget: `level[k]` holds those with k; bit k of `filled`: there are any.
    level: list[list[int]] = [[] for _ in range(capacities[0] + 1)]
    filled = 0
    for item in order:
        need = items[item]
        row, tries = -1, 0
        levels = filled >> need[0]
        k = need[0]
        while levels and row < 0 and tries < _TRIES:
            step = (levels & -levels).bit_length() - 1
            k += step
            levels >>= step + 1
            for candidate in level[k]:
                tries += 1
                if all(n <= have for n, have in zip(need, left[candidate], strict=True)):
                    row = candidate
                    break
                if tries >= _TRIES:
                    break
            k += 1
        if row < 0:
            row = len(rows)
            rows.append([])
            left.append(list(capacities))
        else:
            k -= 1
            level[k].remove(row)
            if not level[k]:
                filled &= ~(1 << k)
        rows[row].append(item)
        left[row] = [have - n for n, have in zip(need, left[row], strict=True)]
        k = left[row][0]
        level[k].append(row)
        filled |= 1 << k
    return [sorted(row) for row in rows]

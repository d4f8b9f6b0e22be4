"""Packing and its place in the plan: budgets, determinism, fill, mixing, random access."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from mimo_jax.data.hashing import Permutation, hash_arrays, hash_ints
from mimo_jax.data.packing import pack
from mimo_jax.data.plan import Documents, RowPlan
from mimo_jax.data.records import DataError


def source(
    name: str, count: int, weight: float = 1.0, low: int = 20, high: int = 200, changes: tuple = ()
) -> SimpleNamespace:
    lengths = np.random.default_rng(len(name)).integers(low, high, count)

    def documents(records: np.ndarray, keys: np.ndarray) -> Documents:
        zeros = np.zeros(len(records), np.int64)
        return Documents(np.arange(len(records)), zeros, zeros, np.stack([lengths[records], lengths[records] // 2], 1))

    return SimpleNamespace(
        name=name,
        weight=weight,
        changes=changes,
        records=np.arange(count),
        mean_length=float(lengths.mean()),
        documents=documents,
    )


def test_packing_never_exceeds_a_budget_and_loses_no_document() -> None:
    rng = np.random.default_rng(0)
    for capacities in ((100, 100), (100, 30), (100, 0), (37, 200)):
        lengths = np.stack([rng.integers(1, capacities[0] + 1, 400), rng.integers(0, capacities[1] + 1, 400)], axis=1)
        rows = pack(lengths, capacities)
        assert sorted(i for row in rows for i in row) == list(range(400))
        assert all((lengths[row].sum(axis=0) <= capacities).all() for row in rows)


def test_packing_is_deterministic_and_refuses_what_cannot_fit() -> None:
    lengths = np.random.default_rng(1).integers(1, 50, (300, 2))
    assert pack(lengths, (64, 64)) == pack(lengths.copy(), (64, 64))
    with pytest.raises(ValueError, match="document 2"):
        pack(np.asarray([[1, 1], [64, 64], [65, 1]]), (64, 64))


def test_rows_of_realistic_documents_are_filled_to_97_percent() -> None:
    rng = np.random.default_rng(2)
    patches = np.clip(rng.lognormal(3.9, 0.6, 4096), 6, 1500).astype(int)  # clips of a few seconds to minutes
    text = (patches * rng.uniform(0.4, 0.7, 4096)).astype(int)
    speech = rng.random(4096) < 0.8
    lengths = np.stack([np.where(speech, patches + text + 12, text * 6 + 1), np.where(speech, patches, 0)], axis=1)
    rows = pack(lengths, (2048, 1536))
    fill = lengths[:, 0].sum() / (2048 * len(rows))
    assert fill > 0.97


@pytest.mark.parametrize("row_patches", [6144, 3584, 3072, 2048, 1024])
def test_rows_are_filled_whichever_budget_binds(row_patches: int) -> None:
    # A third of the positions in short clips, the rest in long texts that need no patches.
    rng = np.random.default_rng(3)
    clips = rng.integers(20, 180, 3600)
    texts = rng.integers(200, 2600, 500)
    lengths = np.concatenate([np.stack([clips + clips // 3, clips], 1), np.stack([texts, np.zeros_like(texts)], 1)])
    capacities = (8192, row_patches)
    needed = (lengths.sum(axis=0) / capacities).max()
    assert len(pack(lengths, capacities)) <= 1.02 * needed + 1


@pytest.mark.parametrize("size", [1, 2, 3, 17, 256, 1000, 4097])
def test_permutation_is_a_bijection_that_its_key_decides(size: int) -> None:
    a, b = (Permutation(size, key)(np.arange(size)) for key in (1, 2))
    assert sorted(a.tolist()) == list(range(size))
    assert size < 17 or (a != b).any()


def test_array_and_scalar_hashes_agree() -> None:
    numbers = [0, 1, 2**40, -5, 2**63 - 1]
    assert hash_arrays(7, np.asarray(numbers), 9).tolist() == [hash_ints(7, n, 9) for n in numbers]


def test_mixing_follows_the_weights_in_positions() -> None:
    plan = RowPlan([source("a", 500, 0.75, 20, 60), source("bb", 300, 0.25, 100, 300)], (512, 512), 64, seed=0)
    positions = np.zeros(2)
    for number in range(60):
        block = plan.block(number)
        for s in range(2):
            here = block.columns[:, 0] == s
            positions[s] += plan.sources[s].documents(block.columns[here, 1], block.keys[here]).lengths[:, 0].sum()
    np.testing.assert_allclose(positions / positions.sum(), [0.75, 0.25], atol=0.02)


def test_every_record_comes_once_per_epoch_in_a_new_order() -> None:
    plan = RowPlan([source("a", 100)], (512, 512), 37, seed=0)
    seen: list[int] = []
    number = 0
    while len(seen) < 200:
        columns = plan.block(number).columns
        order = np.lexsort((columns[:, 1], columns[:, 2]))
        seen += columns[order][:, 1].tolist()
        number += 1
    by_epoch: dict[int, list[int]] = {}
    for n in range(6):
        for c in plan.block(n).columns.tolist():
            by_epoch.setdefault(c[2], []).append(c[1])
    assert sorted(by_epoch[0]) == list(range(100)) and sorted(by_epoch[1]) == list(range(100))
    records, epochs = plan._records(0, 0, 200)
    assert epochs.tolist() == [0] * 100 + [1] * 100
    assert (records[:100] != records[100:]).any()


def test_any_row_can_be_asked_for_and_a_hint_gives_the_same_rows() -> None:
    def make() -> RowPlan:
        return RowPlan([source("a", 300, 0.6), source("bb", 200, 0.4)], (512, 256), 50, seed=4)

    forward = make()
    rows = [forward.row(i) for i in range(90)]
    backward = make()
    assert [backward.row(i) for i in reversed(range(90))] == rows[::-1]
    block, first = forward.locate(80)
    assert block > 1
    hinted = make()
    hinted.start_from(block, first)
    assert [hinted.row(i) for i in range(80, 90)] == rows[80:]
    assert hinted.row(0) == rows[0], "a row before the hint"
    assert RowPlan([source("a", 300), source("bb", 200)], (512, 256), 50, seed=5).row(0) != rows[0]


def test_weights_change_at_the_first_block_beyond_so_many_positions() -> None:
    def make() -> RowPlan:
        a = source("a", 500, 0.75, 20, 60, ((100_000, 0.25), (150_000.5, 0.0)))
        return RowPlan([a, source("bb", 300, 0.25, 100, 300, ((100_000, 0.75),))], (512, 512), 64, seed=0)

    plan = make()
    rows = [plan.row(i) for i in range(700)]
    block, first = plan.locate(699)
    phases = plan.phases(block)
    assert phases is not None and len(phases) == 2
    for at, begin in zip((100_000, 150_000.5), phases, strict=True):
        starts = [plan.locate(i)[1] for i in range(700) if plan.locate(i)[0] == begin]
        assert starts[0] * 512 >= at > (plan.locate(starts[0] - 1)[1]) * 512, "the block before begins too early"
    positions: list[np.ndarray] = [np.zeros(2) for _ in range(3)]
    seen: dict[int, list[int]] = {0: [], 1: []}
    for number in range(block):
        packed = plan.block(number)
        for s in range(2):
            here = packed.columns[:, 0] == s
            seen[s] += sorted((packed.columns[here, 2] * 10_000 + packed.columns[here, 1]).tolist())
            made = plan.sources[s].documents(packed.columns[here, 1], packed.keys[here])
            positions[sum(number >= p for p in phases)][s] += made.lengths[:, 0].sum()
    for found, wanted in zip(positions, ([0.75, 0.25], [0.25, 0.75], [0.0, 1.0]), strict=True):
        np.testing.assert_allclose(found / found.sum(), wanted, atol=0.04)
    assert all(len(set(s)) == len(s) for s in seen.values()), "no record twice in an epoch"
    hinted = make()
    hinted.start_from(block, first, phases)
    assert [hinted.row(i) for i in range(690, 700)] == rows[690:]
    assert hinted.row(0) == rows[0] and hinted.row(699) == rows[699]
    with pytest.raises(DataError, match="first blocks of 2 changes of weights"):
        make().start_from(block, first)


def test_a_source_may_begin_later_and_does_not_move_the_others_before() -> None:
    late = RowPlan([source("a", 300), source("bb", 50, 0.0, changes=((30_000, 1.0),))], (512, 256), 50, seed=4)
    alone = RowPlan([source("a", 300)], (512, 256), 50, seed=4)
    assert [late.row(i) for i in range(50)] == [alone.row(i) for i in range(50)]
    assert late.phases(0) == [] and alone.phases(0) is None
    assert {d.source for i in range(100, 120) for d in late.row(i)} == {0, 1}
    with pytest.raises(DataError, match="positive weight from 30,000 tokens on"):
        RowPlan([source("a", 300, changes=((30_000, 0.0),))], (512, 256), 50, seed=4)


def test_one_pass_takes_every_record_exactly_once() -> None:
    plan = RowPlan([source("a", 101), source("bb", 7)], (512, 512), 16, seed=0, one_pass=True)
    documents = [(d.source, d.record) for i in range(plan.num_rows()) for d in plan.row(i)]
    assert sorted(documents) == [(0, i) for i in range(101)] + [(1, i) for i in range(7)]
    with pytest.raises(IndexError):
        plan.row(plan.num_rows())


def test_sources_without_records_or_weight_are_refused_by_name() -> None:
    empty = SimpleNamespace(name="empty", weight=1.0, changes=(), records=np.zeros(0, int), mean_length=1.0)
    with pytest.raises(DataError, match="'empty'"):
        RowPlan([source("a", 5), empty], (512, 512), 16, seed=0)
    with pytest.raises(DataError, match="positive weight"):
        RowPlan([source("a", 5, weight=0.0)], (512, 512), 16, seed=0)

"""Merging sorted inputs: the same rows as sorting everything, with little of it in memory."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_protocol_rft.data.rollouts._format import FormatError
from eval_protocol_rft.data.store._merge import Keys, SortedInput, latest, merge_sorted, row_keys

SAMPLES = 4
"""Of each data row: key k is data row k // 4, sample k % 4."""


def table(keys: list[int], source: int) -> pa.Table:
    return pa.table(
        {
            "data_idx": pa.array([key // SAMPLES for key in keys], pa.int64()),
            "sample_idx": pa.array([key % SAMPLES for key in keys], pa.int32()),
            "source": pa.array([source] * len(keys), pa.int64()),
        }
    )


def keys_of(found: pa.Table) -> Keys:
    return row_keys(found, None)


def as_input(tables: list[list[int]], source: int) -> SortedInput:
    made = [table(keys, source) for keys in tables]
    return SortedInput(int(keys_of(made[0])[0]), lambda: iter(made))


def rows_of(found: Iterator[pa.Table]) -> list[tuple[int, int]]:
    """(key, source) of each row, in order."""
    rows = []
    for piece in found:
        assert len(piece)
        values = piece.to_pylist()
        rows += [(r["data_idx"] * SAMPLES + r["sample_idx"], r["source"]) for r in values]
    return rows


@st.composite
def inputs(draw: st.DrawFn) -> list[list[list[int]]]:
    """Inputs as lists of tables as lists of keys."""
    found = []
    for keys in draw(st.lists(st.sets(st.integers(0, 40), min_size=1, max_size=20), max_size=6)):
        ordered = sorted(keys)
        cuts = sorted(draw(st.sets(st.integers(1, len(ordered)))) - {len(ordered)})
        ends = zip([0, *cuts], [*cuts, len(ordered)], strict=True)
        found.append([ordered[start:stop] for start, stop in ends])
    return found


@given(inputs())
def test_every_key_comes_out_once_in_order_from_the_last_input_that_has_it(
    tables: list[list[list[int]]],
):
    expected = {key: i for i, each in enumerate(tables) for keys in each for key in keys}
    found = merge_sorted([as_input(each, i) for i, each in enumerate(tables)], keys_of)
    assert rows_of(found) == sorted(expected.items())


@given(inputs())
def test_at_most_one_table_is_held_of_each_input_that_overlaps(tables: list[list[list[int]]]):
    apart = [
        [[key * 8 + i for key in keys] for keys in each] for i, each in enumerate(tables)
    ]  # no key in two inputs
    spans = [(each[0][0], each[-1][-1]) for each in apart]
    overlap = max((sum(first <= at <= last for first, last in spans) for at, _ in spans), default=0)
    most = max((len(keys) for each in apart for keys in each), default=0)
    read = written = held = 0

    def counted(each: list[list[int]], source: int) -> SortedInput:
        def pieces() -> Iterator[pa.Table]:
            nonlocal read, held
            for keys in each:
                read += len(keys)
                held = max(held, read - written)
                yield table(keys, source)

        return SortedInput(each[0][0] // SAMPLES << 31 | each[0][0] % SAMPLES, pieces)

    for piece in merge_sorted([counted(each, i) for i, each in enumerate(apart)], keys_of):
        written += len(piece)
    assert read == written
    assert held <= overlap * most


def test_inputs_that_follow_each_other_are_open_one_at_a_time():
    opened = closed = most = 0

    def part(i: int) -> SortedInput:
        def pieces() -> Iterator[pa.Table]:
            nonlocal opened, closed, most
            opened += 1
            most = max(most, opened - closed)
            yield table([4 * i, 4 * i + 1], i)
            yield table([4 * i + 2, 4 * i + 3], i)
            closed += 1

        return SortedInput(i << 31, pieces)

    order = random.Random(0).sample(range(100), 100)
    found = rows_of(merge_sorted([part(i) for i in order], keys_of))
    assert [key for key, _ in found] == list(range(400))
    assert most == 1


@pytest.mark.parametrize("tables", [[[5], [4]], [[5, 4]], [[5, 5]], [[4, 5], [5]]])
def test_an_input_that_is_not_sorted_is_an_error_that_names_the_row(tables: list[list[int]]):
    with pytest.raises(FormatError, match=f"data_idx 1 and sample_idx {tables[-1][-1] - 4} stands"):
        list(merge_sorted([as_input(tables, 0)], keys_of))


@given(st.lists(st.integers(0, 9)))
def test_latest_takes_the_last_row_of_every_key(keys: list[int]):
    expected = {key: place for place, key in enumerate(keys)}
    found = latest(np.array(keys, np.int64))
    assert found.tolist() == [expected[key] for key in sorted(expected)]


@given(
    st.lists(
        st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1)), min_size=2, max_size=20
    )
)
def test_keys_order_rows_as_pairs_do(pairs: list[tuple[int, int]]):
    columns = [pa.array([pair[i] for pair in pairs], (pa.int64(), pa.int32())[i]) for i in (0, 1)]
    keys = row_keys(pa.table(columns, ["data_idx", "sample_idx"]), None).tolist()
    assert (keys[0] < keys[1]) == (pairs[0] < pairs[1])
    assert len(set(keys)) == len(set(pairs))


def test_keys_follow_the_place_of_a_data_row_in_a_shuffled_run():
    position = np.array([2, 0, 1])
    keys = row_keys(table([0, 1, 4, 8], 0), position)
    assert np.argsort(keys).tolist() == [2, 3, 0, 1]

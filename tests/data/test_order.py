import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from improved_ldm.data.order import BatchPlan

# one to three sources, each with the groups of its rows; some groups are rare
sources = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=60), min_size=1, max_size=3)


def drawn(batches):
    """How often each row of each source was given."""
    return Counter(
        (source, row)
        for batch in batches
        for source, row in zip(batch.sources.tolist(), batch.rows.tolist(), strict=True)
    )


def as_lists(batch):
    return [batch.group, *(part.tolist() for part in batch[1:])]


@given(groups=sources.filter(lambda groups: len(groups) == 1), batch_size=st.integers(1, 9), passes=st.integers(1, 6))
def test_after_k_passes_each_row_was_given_k_times_or_once_less(groups, batch_size, passes):
    groups = [np.array(rows) for rows in groups]
    plan, counts = BatchPlan(groups, batch_size, seed=0), Counter()
    batches = iter(plan)
    while plan.drawn[0] < passes * len(groups[0]):
        batch = next(batches)
        assert set(groups[0][batch.rows]) == {batch.group}
        members = np.flatnonzero(groups[0] == batch.group).tolist()
        for row in batch.rows.tolist():
            assert counts[row] == min(counts[member] for member in members)  # all others of its bucket come before
            counts[row] += 1
    begun = -(-plan.drawn[0] // len(groups[0]))  # passes
    finished = plan.drawn[0] // len(groups[0])
    assert all(finished - 1 <= counts[row] <= begun for row in range(len(groups[0])))


@given(groups=sources, batch_size=st.integers(1, 9), number=st.integers(0, 40))
def test_a_plan_resumes_after_any_batch(groups, batch_size, number):
    groups = [np.array(rows) for rows in groups]
    weights = [1.0 + number for number in range(len(groups))]
    straight = BatchPlan(groups, batch_size, 3, weights)
    batches = iter(straight)
    list(islice(batches, number))
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = BatchPlan(groups, batch_size, 3, weights)
    resumed.load_state_dict(state)
    assert list(map(as_lists, islice(batches, 25))) == list(map(as_lists, islice(resumed, 25)))
    assert straight.state_dict() == resumed.state_dict()


@given(weights=st.lists(st.floats(0.1, 10), min_size=2, max_size=4), batch_size=st.integers(1, 8))
def test_sources_are_drawn_by_weight(weights, batch_size):
    plan = BatchPlan([np.zeros(7 + number, dtype=int) for number in range(len(weights))], batch_size, 0, weights)
    counts = drawn(islice(plan, 100))
    total = 100 * batch_size
    for source, weight in enumerate(weights):
        given = sum(count for (of, _), count in counts.items() if of == source)
        assert abs(given - total * weight / sum(weights)) <= len(weights)
        each = [counts[source, row] for row in range(7 + source)]
        assert max(each) - min(each) <= 1  # within a source all rows are given equally often


def test_every_pass_has_another_order_and_no_order_is_kept_without_shuffling():
    rows = [np.zeros(50, dtype=int)]
    first, second = (
        np.concatenate([batch.rows for batch in batches]).tolist()
        for plan in [BatchPlan(rows, 5, 1)]
        for batches in [list(islice(plan, 10)), list(islice(plan, 10))]
    )
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second != list(range(50))
    in_order = BatchPlan(rows, 20, 1, shuffle=False)
    assert np.concatenate([batch.rows for batch in islice(in_order, 5)]).tolist() == [*range(50), *range(50)]


def test_a_rare_group_makes_small_batches_once_a_pass():
    groups = [np.array([0] * 40 + [1] * 3 + [2])]
    plan = BatchPlan(groups, 8, 0)
    batches = list(islice(plan, 70))
    rare = {group: [batch for batch in batches if batch.group == group] for group in (1, 2)}
    assert {len(batch.rows) for batch in rare[1]} == {3} and {len(batch.rows) for batch in rare[2]} == {1}
    assert all(sorted(batch.rows.tolist()) == [40, 41, 42] for batch in rare[1])
    assert [batch.epochs[0] for batch in rare[2]] == list(range(len(rare[2])))


def test_a_source_without_rows_is_refused():
    with pytest.raises(ValueError, match="source 2 of 2 has no rows"):
        BatchPlan([np.zeros(3, dtype=int), np.zeros(0, dtype=int)], 2, 0)


@given(before=sources, after=sources, number=st.integers(0, 40))
def test_a_plan_resumes_with_sets_that_have_changed(before, after, number):
    before, after = ([np.array(rows) for rows in groups] for groups in (before, after))
    count = min(len(before), len(after))
    plan, changed = BatchPlan(before[:count], 4, 0), BatchPlan(after[:count], 4, 0)
    list(islice(plan, number))
    changed.load_state_dict(plan.state_dict())
    for batch in islice(changed, 20):
        assert all(after[source][row] == batch.group for source, row in zip(batch.sources, batch.rows, strict=True))

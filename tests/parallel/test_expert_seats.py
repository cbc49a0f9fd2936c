"""Experts stand where all processes have equally much to do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintet.errors import InputError
from quintet.parallel.expert_seats import balanced, seat_experts, unevenness
from quintet.parallel.placement import Place, place, seated
from quintet.sharding import Cut, Section, Sharding


@given(
    each=st.integers(1, 5),
    processes=st.integers(1, 6),
    redundant=st.integers(0, 12),
    data=st.data(),
)
def test_every_expert_is_seated_and_none_twice_in_a_process(
    each: int, processes: int, redundant: int, data: st.DataObject
) -> None:
    count = each * processes
    redundant = min(redundant // processes * processes, count * processes - count)
    loads = data.draw(st.lists(st.floats(0, 1e6), min_size=count, max_size=count))
    order = seat_experts(loads, processes, redundant=redundant)
    assert len(order) == count + redundant
    assert set(order) == set(range(count))
    own = len(order) // processes
    for start in range(0, len(order), own):
        assert len(set(order[start : start + own])) == own
    assert order == seat_experts(loads, processes, redundant=redundant)


def test_seats_are_as_even_as_the_heaviest_allow() -> None:
    loads = [100.0, 1, 1, 1, 1, 1, 1, 2]
    plain = tuple(range(8))
    assert unevenness(loads, plain, 4) > 2.7
    assert unevenness(loads, seat_experts(loads, 4, redundant=4), 4) < 0.35
    # Without more seats, what can be had is the best partner for the heaviest.
    assert unevenness(loads, seat_experts(loads, 4), 4) <= unevenness(loads, plain, 4)


def test_a_group_stays_on_one_node() -> None:
    loads = [9.0, 8, 7, 6, 1, 1, 1, 1, 5, 5, 5, 5, 2, 2, 2, 2]
    order = seat_experts(loads, 4, redundant=4, groups=4, nodes=2)
    for node in (order[:10], order[10:]):
        assert len({expert // 4 for expert in node}) == 2
    assert set(order) == set(range(16))


def test_where_nodes_do_not_divide_groups_all_are_seated_at_once() -> None:
    loads = [float(i) for i in range(12)]
    assert seat_experts(loads, 4, groups=3, nodes=2) == seat_experts(loads, 4)


def test_seats_are_named_by_stacks_of_experts() -> None:
    found = balanced({"model.layers.1.mlp.gate": [1.0, 2.0]}, 2)
    assert list(found) == ["model.layers.1.mlp.experts"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"processes": 3}, "8 seats, which 3 processes"),
        ({"processes": 2, "redundant": 16}, "12 seats, and there are 8 experts"),
        ({"processes": 4, "nodes": 3}, "nodes=3 has to divide"),
        ({"processes": 4, "groups": 3}, "groups=3"),
    ],
)
def test_what_cannot_be_divided_is_refused(options: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        seat_experts([1.0] * 8, **options)


STACK = Sharding({"mlp.experts.down": (Cut(0, (Section(4, 1, "num_experts"),), "ep"),)})


def test_processes_have_the_experts_of_their_seats() -> None:
    table = seated(STACK, {"mlp.experts": (3, 0, 1, 3, 2, 0)}, 2)
    found = [place({"mlp.experts.down": (4, 2)}, table, Place(ep=(i, 2))) for i in range(2)]
    assert [shard["mlp.experts.down"].ranges[0] for shard in found] == [
        ((3, 4), (0, 1), (1, 2)),
        ((3, 4), (2, 3), (0, 1)),
    ]


def test_all_experts_in_another_order_are_not_the_stack() -> None:
    table = seated(STACK, {"mlp.experts": (0, 1, 2, 3, 1, 0, 2, 3)}, 2)
    shards = [place({"mlp.experts.down": (4, 2)}, table, Place(ep=(i, 2))) for i in range(2)]
    assert [shard["mlp.experts.down"].whole for shard in shards] == [True, False]


@pytest.mark.parametrize(
    ("path", "order", "said"),
    [
        ("mlp.experts", (0, 1, 2), "each of its 4 experts"),
        ("mlp.experts", (0, 1, 2, 3, 0), "cannot be given to 2 processes"),
        ("mlp.experts", (0, 0, 1, 1, 2, 3), "have an expert twice"),
        ("mlp.gate", (0, 1, 2, 3), "no such stack"),
    ],
)
def test_seats_that_are_no_plan_are_refused(path: str, order: tuple[int, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        seated(STACK, {path: order}, 2)

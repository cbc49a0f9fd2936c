"""What all processes have of a model is the model, each number once: seen without processes."""

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conformance.families import Family, each_head, each_variant
from quintet.auto import family
from quintet.errors import InputError
from quintet.modeling.init_on_meta import init_on_meta
from quintet.parallel.placement import Place, Shard, check_cut, place, shard_of, table_of
from quintet.parallel.world import Degrees
from quintet.sharding import Cut, Section, Sharding
from released import RELEASED, released

MOST = 16
Shapes = dict[str, tuple[int, ...]]


def shapes_of(model: nn.Module) -> Shapes:
    held = (*model.named_parameters(), *model.named_buffers())
    saved = set(model.state_dict(keep_vars=True))
    return {name: tuple(tensor.shape) for name, tensor in held if name in saved}


@cache
def plan_of(name: str) -> tuple[Shapes, Sharding]:
    config = released(name)
    model: Any = init_on_meta(family(config.model_type).find("ForCausalLM"), config)
    return shapes_of(model), table_of(model)


def kinds(shapes: Shapes, table: Sharding) -> Shapes:
    """Of tensors that are cut alike one each, which says as much and takes a thousandth."""
    special = {*table.first_only, *table.partial}
    found = {
        (shape, table.parameters[name], name in special): name for name, shape in shapes.items()
    }
    return {name: shapes[name] for name in found.values()}


def degrees(most: int = MOST) -> Iterator[Degrees]:
    for t in range(1, most + 1):
        for p in range(1, most + 1):
            if t % p == 0:
                yield Degrees(tp=t, ep=p)
            elif p % t == 0:
                yield Degrees(tp=t, fsdp=p // t, ep=p)


def places(at: Degrees) -> list[Place]:
    return [at.place(rank) for rank in range(at.size)]


def check_complete(shards: list[Shard], name: str) -> None:
    """Check that parts of a tensor are the tensor: each number once, or in several for all."""
    shape = shards[0].shape
    own = [shard for shard in shards if not shard.zero]
    for dim, size in enumerate(shape):
        found = {r for shard in own for r in shard.ranges.get(dim, ((0, size),))}
        at = 0
        for start, end in sorted(r for r in found if r[0] < r[1]):
            assert start == at, f"{name} {dim}: {sorted(found)}"
            at = end
        assert at == size, f"{name} {dim}: ends at {at} of {size}"
    # What is disjoint in each dimension adds up only if each combination is there.
    blocks = {
        block
        for shard in own
        for block in product(*(shard.ranges.get(dim, ((0, n),)) for dim, n in enumerate(shape)))
    }
    assert sum(prod(end - start for start, end in block) for block in blocks) == prod(shape), name


@pytest.mark.parametrize("name", RELEASED)
def test_parts_of_released_models_are_the_model(name: str) -> None:
    shapes, table = plan_of(name)
    assert set(shapes) <= set(table.parameters)
    few, allowed = kinds(shapes, table), 0
    for at in degrees():
        try:
            found = [place(few, table, one) for one in places(at)]
        except InputError:
            continue
        allowed += 1
        for tensor in found[0]:
            check_complete([shards[tensor] for shards in found], tensor)
    assert allowed >= 2
    check_cut(place(shapes, table, Degrees(tp=2).place(0)))


REFUSED = [
    ("Qwen2-0.5B", {"tp": 4}, "num_attention_heads=14"),
    ("Qwen2.5-14B", {"tp": 16}, "num_attention_heads=40"),
    ("DeepSeek-V2-Lite", {"tp": 3}, "num_attention_heads=16"),
    ("Zamba2-7B", {"tp": 3}, "n_mamba_heads=112"),
    ("Qwen1.5-MoE-A2.7B", {"tp": 8, "ep": 8}, "num_experts=60"),
]


@pytest.mark.parametrize(("name", "at", "key"), REFUSED)
def test_what_cannot_be_given_out_evenly_is_refused_by_its_key(
    name: str, at: Mapping[str, int], key: str
) -> None:
    with pytest.raises(InputError, match=f"{key} cannot be given to"):
        place(*plan_of(name), Degrees(**at).place(0))


def test_refusals_say_what_is_possible() -> None:
    with pytest.raises(InputError, match=r"tp may be 1, 2, 7$"):
        place(*plan_of("Qwen2-0.5B"), Degrees(tp=4).place(0))


ALLOWED = [
    ("Qwen2-7B", 4), ("Qwen2-72B", 16), ("Qwen2-57B-A14B", 4), ("DeepSeek-V2", 16),
    ("DeepSeek-V3", 16), ("Moonlight-16B-A3B", 16), ("Zamba2-1.2B", 16), ("Zamba2-7B", 16),
]  # fmt: skip


@pytest.mark.parametrize(("name", "tp"), ALLOWED)
def test_released_models_are_cut_among_as_many(name: str, tp: int) -> None:
    place(*plan_of(name), Degrees(tp=tp).place(tp - 1))


@each_head
def test_tables_speak_of_every_tensor(family: Family, head: str) -> None:
    model = init_on_meta(family.cls(head), family.config())
    assert set(shapes_of(model)) <= set(table_of(model).parameters)


@each_variant()
def test_variants_are_cut_or_refused(family: Family, variant: str) -> None:
    model = init_on_meta(family.cls("ForCausalLM"), family.config(**family.variants[variant]))
    shapes, table = shapes_of(model), table_of(model)
    done = 0
    for at in degrees(4):
        try:
            found = [place(shapes, table, one) for one in places(at)]
        except InputError:
            continue
        done += 1
        for tensor in shapes:
            check_complete([shards[tensor] for shards in found], tensor)
    assert done >= 2


@each_variant()
def test_modules_that_tables_name_are_there(family: Family, variant: str) -> None:
    model = init_on_meta(family.cls("ForCausalLM"), family.config(**family.variants[variant]))
    table = table_of(model)
    for name in (*table.copies, *table.copies_output, *table.reduces, *table.spread):
        model.get_submodule(name)
    assert set(table.partial) <= set(shapes_of(model))


@given(
    units=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    width=st.integers(1, 3),
    count=st.integers(1, 8),
    other=st.integers(1, 3),
    uneven=st.booleans(),
    shared=st.booleans(),
)
def test_parts_of_any_sections_join_to_the_whole(
    units: list[int], width: int, count: int, other: int, uneven: bool, shared: bool
) -> None:
    shared = shared and not uneven
    sections = tuple(Section(n, width, "key", uneven=uneven, shared=shared) for n in units)
    shape = (other, sum(units) * width)
    whole = torch.arange(prod(shape)).view(shape)
    try:
        shards = [
            shard_of("x", shape, (Cut(1, sections),), Place(tp=(index, count)))
            for index in range(count)
        ]
    except InputError:
        even = all(n % count == 0 or (shared and count % n == 0) for n in units)
        assert not uneven
        assert not even
        return
    check_complete(shards, "x")
    joined = torch.full_like(whole, -1)
    for shard in shards:
        part = shard.of(whole)
        assert part.shape == shard.local_shape
        shard.put(joined, part)
        for common in shard.common:
            start, end = common.range
            assert end - start == width
    assert torch.equal(joined, whole)


def test_stacks_of_experts_are_cut_in_two_ways_at_once() -> None:
    whole = torch.arange(4 * 6 * 2).view(4, 6, 2)
    inner = Section(3, 1, "inner")
    cuts = (Cut(0, (Section(4, 1, "experts"),), "ep"), Cut(1, (inner, inner), "etp"))
    joined = torch.full_like(whole, -1)
    for rank in range(6):
        shard = shard_of(
            "x", (4, 6, 2), cuts, Place(tp=(rank, 6), ep=(rank // 3, 2), etp=(rank % 3, 3))
        )
        assert shard.local_shape == (2, 2, 2)
        shard.put(joined, shard.of(whole))
    assert torch.equal(joined, whole)


def test_a_plan_that_leaves_a_tenth_whole_is_refused() -> None:
    shapes, table = plan_of("Qwen2-0.5B")
    left = {**table.parameters}
    for name in left:
        if "gate_proj" in name:
            left[name] = ()
    with pytest.raises(InputError, match=r"of the model's \d+ numbers .* whole .*gate_proj"):
        check_cut(place(shapes, Sharding(left), Degrees(tp=2).place(0)))


def test_a_tensor_that_no_table_speaks_of_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"no module says how 0\.weight is cut"):
        place(shapes_of(model), table_of(model), Degrees(tp=2).place(0))

"""Which splits there are of a world, what each device has of a model, and what is refused."""

import itertools
import time
from contextlib import suppress
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.errors import DoesNotFitError, InputError
from quintet.planning.devices import device
from quintet.planning.inference import Workload, footprint
from quintet.planning.plans import described, plan_inference, plan_training
from quintet.planning.shares import PlannedModel
from quintet.planning.training import Training, training_footprint
from quintet.planning.world import Split, SplitLimits, World, splits
from released import RELEASED, released

H100 = device("h100")


@cache
def model_of(name: str, quantize: str | None = "none") -> PlannedModel:
    return described(released(name), H100, quantize=quantize)[0]


@given(st.integers(1, 6), st.integers(1, 8), st.booleans(), st.booleans())
@settings(deadline=None)
def test_splits_use_all_devices_once(nodes: int, each: int, experts: bool, train: bool) -> None:
    world = World(nodes, each)
    found = list(splits(world, SplitLimits(), experts=experts, train=train))
    assert len(set(found)) == len(found)
    assert Split(dp=world.size) in found
    for split in found:
        assert split.tp * split.pp * split.dp * split.fsdp == world.size
        assert split.fault is None
        assert experts or split.ep == 1
        assert train or split.fsdp == 1
        assert split.expert_tp * split.ep % split.tp == 0


def test_every_released_model_is_planned_in_seconds() -> None:
    started = time.process_time()
    limits = SplitLimits(most=(("pp", 2),))
    for name in RELEASED:
        work = Workload(4096, rows=16)
        plan = plan_inference(released(name), World(2, 8), H100, work, limits=limits)
        assert plan.best is not None, name
        assert plan.best.pace.tokens_per_second <= plan.best.pace.at_most
        for choice in plan.choices:
            assert choice.memory.total <= choice.room
    assert time.process_time() - started < 60


@pytest.mark.parametrize("name", RELEASED)
def test_no_split_leaves_much_of_a_model_on_every_device(name: str) -> None:
    model = model_of(name)
    whole = footprint(model, Split(), Workload(16)).weights
    for tp in (2, 4, 8, 16):
        for ep in (1, tp) if model.experts else (1,):
            with suppress(InputError):  # heads or experts that cannot be given out evenly
                part = footprint(model, Split(tp=tp, ep=ep), Workload(16)).weights
                assert part < whole / tp + 0.1 * whole


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Qwen2-57B-A14B", "Zamba2-7B"])
def test_stages_have_every_weight(name: str) -> None:
    model = model_of(name)
    whole = model.stages(Split())[0].share
    for pp in (2, 3, 4):
        stages = model.stages(Split(pp=pp))
        assert [one.layers.stop for one in stages[:-1]] == [one.layers.start for one in stages[1:]]
        held = sum(sum(one.share.counts.values()) for one in stages)
        # What layers of several stages share is on each of them.
        assert held >= sum(whole.counts.values())
        products = sum(sum(one.share.products.values()) for one in stages)
        assert products == pytest.approx(sum(whole.products.values()))


def test_blocks_with_one_scale_are_not_cut() -> None:
    # 1536 inner channels of an expert are 12 blocks of 128.
    model = model_of("DeepSeek-V2", "fp8")
    assert footprint(model, Split(tp=4), Workload(16)).weights
    assert footprint(model, Split(tp=8, ep=8), Workload(16)).weights
    with pytest.raises(InputError, match="held in fp8, whose blocks"):
        footprint(model, Split(tp=8), Workload(16))
    whole = model_of("DeepSeek-V3", None)
    for tp in (2, 4, 8, 16):
        assert footprint(whole, Split(tp=tp, ep=tp), Workload(16)).weights
    with pytest.raises(InputError, match="held in fp8, whose blocks"):
        footprint(whole, Split(tp=32, ep=32), Workload(16))


def test_redundant_experts_are_further_ones_of_each_layer() -> None:
    config = released("DeepSeek-V3")  # with a prediction layer, which has experts too
    alone = model_of("DeepSeek-V3", None)
    more, _ = described(config, H100, redundant=32)
    split = Split(ep=16, dp=16)
    counts = [m.stages(split)[0].share.counts["routed experts"] for m in (alone, more)]
    assert counts[1] / counts[0] == (256 + 32) / 256
    assert footprint(more, Split(ep=144, dp=144), Workload(16)).weights
    with pytest.raises(InputError, match="256"):
        footprint(alone, Split(ep=144, dp=144), Workload(16))


def test_caches_shrink_with_heads_and_latents_do_not() -> None:
    for name, shrinks in (("Qwen2-72B", True), ("DeepSeek-V2", False), ("Zamba2-7B", True)):
        model = model_of(name)
        one, eight = (footprint(model, Split(tp=tp), Workload(1024)) for tp in (1, 8))
        assert (eight.token == one.token / 8) is shrinks, name
        assert eight.token == one.token or shrinks
        assert (eight.row < one.row / 4) is (one.row > 0)


@pytest.mark.parametrize("name", ["Qwen2-7B", "Qwen1.5-MoE-A2.7B"])
def test_training_states_are_shared_among_groups(name: str) -> None:
    model = model_of(name)
    work = Training(2048, rows=64)
    for tp, fsdp in itertools.product((1, 2), (1, 2, 4)):
        split = Split(tp=tp, fsdp=fsdp)
        memory = training_footprint(model, split, work)
        states = memory.weights + memory.gradients + memory.optimizer
        share = model.stages(split)[0].share
        assert states == pytest.approx(16 * sum(share.counts.values()) / fsdp)
    less = training_footprint(model, Split(), Training(2048, 64, recompute=True))
    assert less.activations < 0.2 * training_footprint(model, Split(), work).activations


def test_more_parts_make_the_wait_of_stages_less() -> None:
    waits = []
    for rows in (8, 64):
        limits = SplitLimits((("pp", 4), ("tp", 1), ("fsdp", 1), ("dp", 2)))
        plan = plan_training(
            released("Qwen2-0.5B"), World(1, 8), H100, Training(2048, rows), limits=limits
        )
        pace = plan.require().pace
        waits.append(pace.expected["bubble"] / pace.seconds)
        parts = rows // 2
        assert waits[-1] == pytest.approx(3 / (parts + 3), rel=0.1)
    assert waits[1] < waits[0] / 3


@pytest.mark.parametrize(
    ("split", "said"),
    [
        (Split(fsdp=2), "let tp be more"),
        (Split(tp=2, ep=4, fsdp=2), "ep=4 sends them to others"),
        (Split(tp=2, pp=2), "in pp=2 stages"),
    ],
    ids=str,
)
def test_slices_of_tokens_are_planned_where_they_are_trained(split: Split, said: str) -> None:
    model = model_of("Qwen1.5-MoE-A2.7B")
    work = Training(2048, 64, recompute=True, sequence_parallel=True)
    with pytest.raises(InputError, match=said):
        training_footprint(model, split, work)


def test_what_no_world_holds_is_said_with_what_would() -> None:
    plan = plan_training(released("Qwen2-72B"), World(1, 2), H100, Training(4096, 2))
    with pytest.raises(DoesNotFitError, match=r"no split fits: .* it would with .*--world"):
        plan.require()


def test_an_h100_of_other_numbers() -> None:
    given = "h100,memory=96GB,bandwidth=4TB/s,fp8=none,network=25GB/s,network-latency=8us,usable=.8"
    other = device(given)
    assert (other.memory, other.bandwidth, other.fp8) == (96 * 10**9, 4e12, None)
    assert (other.network.bandwidth, other.network.latency) == (25e9, 8e-6)
    assert other.room == int(0.8 * 96 * 10**9)
    assert other.flops == H100.flops


def test_more_devices_do_not_need_more_memory_each() -> None:
    model = model_of("Qwen2-72B")
    needs = [footprint(model, Split(tp=tp), Workload(2048)).total for tp in (1, 2, 4, 8)]
    assert needs == sorted(needs, reverse=True)

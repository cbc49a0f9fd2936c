"""What is planned of DeepSeek-V3, against what was published of it and worked out by hand.

Sources: DeepSeek's overview of its inference system (2025-03-01), V3's report (arXiv:2412.19437),
and sums over the released shapes.
"""

from functools import cache

from quintet.planning.devices import device
from quintet.planning.inference import DecodePace, Workload
from quintet.planning.plans import Plan, SplitChoice, plan_inference
from quintet.planning.world import SplitLimits, World
from released import released

CONTEXT = 4989


@cache
def planned(
    world: str,
    kind: str,
    work: Workload,
    redundant: int = 0,
    quantize: str | None = None,
    **fixed: int,
) -> Plan[SplitChoice]:
    # The figures leave the prediction layer out.
    config = released("DeepSeek-V3", num_nextn_predict_layers=0)
    return plan_inference(
        config,
        World.parse(world),
        device(kind),
        work,
        quantize=quantize,
        limits=SplitLimits(tuple(fixed.items())),
        redundant=redundant,
    )


def close(value: float, to: float, by: float = 0.02) -> bool:
    return abs(value / to - 1) <= by


def best(plan: Plan[SplitChoice]) -> SplitChoice:
    assert plan.best is not None
    return plan.best


def in_bytes(plan: Plan[SplitChoice]) -> float:
    """Return the numbers of a device at a byte each, and two for embedding and head.

    We hold kv_b, which absorbed attention cuts up, and routers in 16 bits: a byte more each.
    """
    share = plan.model.stages(plan.nearest.split)[0].share
    return sum(n * (2 if kind == "embedding and head" else 1) for kind, n in share.counts.items())


def test_two_nodes_of_eight_hold_it_in_fp8() -> None:
    plan = planned("2x8", "h100", Workload(4096), tp=16, ep=16)
    memory = best(plan).memory
    assert close(memory.weights, 42.9e9)
    assert close(in_bytes(plan), 42.9e9)
    assert memory.token == 61 * 576 * 2, "latents are whole on each"
    assert close(memory.tokens_in(30e9), 427_000)


def test_attention_on_rows_of_each_device_needs_all_but_the_experts_there() -> None:
    plan = planned("2x8", "h100", Workload(4096, rows=16), tp=1, ep=16)
    assert close(in_bytes(plan), 59.7e9)
    assert close(best(plan).memory.weights, 59.7e9, by=0.03)
    # Sixteen caches of about 12 GB.
    assert close(16 * best(plan).memory.tokens_in(12e9), 2.7e6)


def test_sixteen_bits_are_refused_and_what_would_fit_is_said() -> None:
    plan = planned("2x8", "h100", Workload(4096), quantize="none", tp=16, ep=16)
    assert plan.best is None
    # All numbers in two bytes over 16 are 83.9; what every device has comes on top.
    assert close(plan.nearest.memory.weights, 83.9e9, by=0.025)
    assert plan.remedies == ["--quantize fp8", "--world 4x8"]


def test_the_published_units_hold_what_they_held() -> None:
    decoding = planned("18x8", "h800", Workload(CONTEXT, 88 * 144), 32, tp=1, ep=144)
    reading = planned("4x8", "h800", Workload(CONTEXT, 32, 16384), 32, tp=1, ep=32)
    assert close(in_bytes(decoding), 24.0e9)
    assert close(in_bytes(reading), 41.9e9)
    # With kv_b and the routers in 16 bits.
    assert close(best(decoding).memory.weights, 24.0e9 + 1.02e9 + 0.1e9)
    share = decoding.model.stages(best(decoding).split)[0].share
    assert share.counts["routed experts"] == 2 * 58 * 3 * 7168 * 2048, "two of 288 a layer"


def test_a_step_of_the_decoding_unit() -> None:
    kind = "h800,network-latency=0us"
    choice = best(planned("18x8", kind, Workload(CONTEXT, 88 * 144), 32, tp=1, ep=144))
    assert close(choice.memory.cache, 30.9e9)
    assert close(choice.decode.expected["cache"], 9.2e-3)
    assert close(choice.decode.expected["weights"], 7.2e-3, by=0.04)
    assert close(choice.decode.expected["exchange"], 19.5e-3)
    assert choice.decode.bound == "exchange"


def test_the_published_day_lies_between_what_is_expected_and_what_can_be() -> None:
    decoding = best(planned("18x8", "h800", Workload(CONTEXT, 88 * 144), 32, tp=1, ep=144)).decode
    reading = best(planned("4x8", "h800", Workload(CONTEXT, 32, 16384), 32, tp=1, ep=32)).prefill
    # 14.8 and, 56.3 % of it cached, 73.7 thousand tokens a second and node of eight.
    assert decoding.tokens_per_second / 144 < 14.8e3 / 8 < decoding.at_most / 144
    fresh = (1 - 0.563) * 73.7e3 / 8
    assert reading.tokens_per_second / 32 < fresh < reading.at_most / 32


def test_of_eighteen_nodes_the_published_split_is_the_fastest() -> None:
    plan = plan_inference(
        released("DeepSeek-V3"),
        World(18, 8),
        device("h800"),
        Workload(CONTEXT, 88 * 144),
        limits=SplitLimits(most=(("pp", 1),)),
        redundant=32,
    )
    assert (best(plan).split.tp, best(plan).split.ep) == (1, 144)


def test_the_published_nodes() -> None:
    day, node = 24 * 3600, World(1, 8)
    decoding, reading = (DecodePace(rate, {"all": 1.0}, {"all": 1.0}) for rate in (14.8e3, 73.7e3))
    nodes = decoding.nodes(168e9 / day, node) + reading.nodes(608e9 / day, node)
    assert close(nodes, 226.75)


def test_operations_of_a_token() -> None:
    model = planned("4x8", "h800", Workload(CONTEXT, 32, 16384), 32, tp=1, ep=32).model
    fresh = (1 - 0.563) * 73.7e3 / 8
    assert close(2 * model.products * fresh, 0.30e15)
    # 180 thousand hours of an H800 for 10^12 tokens.
    assert close(6 * model.products * 1e12 / (180e3 * 3600), 343e12)

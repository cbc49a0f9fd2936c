"""`quintet plan --world 2x8 --device h100`: what a model needs there, and how to split it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quintet.cli.output import Fact, size_of
from quintet.cli.plan_facts import other_facts, pace_fact, world_facts
from quintet.cli.plan_options import WorldOptions, world_and_device

if TYPE_CHECKING:
    from quintet.checkpoint import TensorInfo
    from quintet.configuration import PreTrainedConfig
    from quintet.planning.inference import Workload
    from quintet.planning.plans import Plan, SplitChoice

_BETWEEN = ("sums", "exchange", "stages")


def plan_in_world(
    config: "PreTrainedConfig",
    options: WorldOptions,
    *,
    dtype: str,
    quantize: str | None,
    context: int,
    batch: int,
    tensors: "Mapping[str, TensorInfo] | None",
    predicts: bool = False,
) -> tuple[dict[str, Any], str | None]:
    """Return the facts, and the reason if no split fits.

    Raises:
        InputError: a world, device or split that is none.
    """
    import torch

    from quintet.errors import DoesNotFitError
    from quintet.modeling.placement import named_dtype
    from quintet.planning.inference import Workload
    from quintet.planning.plans import plan_inference

    world, device = world_and_device(options)
    computed = config.torch_dtype or torch.bfloat16 if dtype == "auto" else named_dtype(dtype)
    work = Workload(
        context=context,
        rows=batch,
        step_tokens=options.step_tokens or 2048,
        itemsize=computed.itemsize,
        cache_dtype=options.cache_dtype or str(computed).removeprefix("torch."),
        predicts=predicts,
    )
    plan = plan_inference(
        config,
        world,
        device,
        work,
        dtype=computed,
        quantize=quantize,
        tensors=tensors,
        limits=options.limits(world.size),
        redundant=options.redundant,
    )
    facts = _facts(plan, work, str(computed).removeprefix("torch."), options.splits)
    try:
        plan.require()
    except DoesNotFitError as error:
        return facts, str(error)
    return facts, None


def _facts(plan: "Plan[SplitChoice]", work: "Workload", dtype: str, splits: int) -> dict[str, Any]:
    choice = plan.best or plan.nearest
    memory, groups = choice.memory, choice.split.groups
    kind = dtype if plan.quantized is None else f"{plan.model.form} and {dtype}"
    rows = work.rows_of(choice.split)
    facts: dict[str, Any] = {
        **world_facts(plan),
        "held as": Fact(kind, kind),
        "weights": {
            "a device": Fact(size_of(memory.weights), memory.weights),
            **{name: Fact(size_of(n), n) for name, n in memory.kinds.items()},
        },
        "cache": Fact(
            f"{size_of(memory.cache)} a device for {rows} x {work.context:,} tokens, "
            f"{memory.token:,.0f} bytes a token"
            + (f" and {memory.row:,} a row" if memory.row else "")
            + (f", in each of {groups} groups" if groups > 1 else ""),
            {"bytes": memory.cache, "per_token": memory.token, "per_row": memory.row},
        ),
        "working": Fact(f"{size_of(memory.working)}, about", memory.working),
        "needed": Fact(f"{size_of(memory.total)} a device", memory.total),
        "room": Fact(_room(choice, work.context), {"tokens": choice.tokens, "rows": choice.rows}),
        **_communication(plan, choice, work),
        "prefill": pace_fact(choice.prefill),
        "decode": pace_fact(choice.decode, rows=work.rows),
    }
    if choice.full is not None:
        facts["when full"] = pace_fact(choice.full, rows=choice.rows)
    return {**facts, **other_facts(plan, splits)}


def _room(choice: "SplitChoice", context: int) -> str:
    if choice.memory.total > choice.room:
        return "none"
    text = f"{choice.rows:,} rows of {context:,} tokens in all"
    if choice.memory.token:
        text = f"{choice.tokens:,} tokens of cache a group, {text}"
    return text


def _communication(
    plan: "Plan[SplitChoice]", choice: "SplitChoice", work: "Workload"
) -> dict[str, Fact]:
    from quintet.planning.inference import moved

    if choice.split.size == choice.split.dp and not choice.split.exchanges:
        return {}
    nbytes = moved(plan.model, choice.split, work)
    waited = {k: v for k, v in choice.decode.expected.items() if k in _BETWEEN and v}
    layers = plan.model.config.num_hidden_layers
    waits = ", ".join(f"{1e3 * v:.2f} ms of {name}" for name, v in waited.items())
    return {
        "communication": Fact(
            f"{nbytes / 1e3:,.1f} kB a layer for each token; a step of decode waits for {waits}",
            {
                "bytes_per_layer_and_token": nbytes,
                "decode_seconds": waited,
                "decode_seconds_per_layer": sum(waited.values()) / layers,
            },
        )
    }

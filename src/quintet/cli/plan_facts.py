"""The output of `quintet plan` common to inference and training: devices, split, speed."""

from typing import TYPE_CHECKING, Any

from quintet.cli.output import Fact, size_of

if TYPE_CHECKING:
    from quintet.planning.inference import DecodePace
    from quintet.planning.plans import Plan, SplitChoice, TrainingChoice
    from quintet.planning.world import Split

    AnyPlan = Plan[SplitChoice] | Plan[TrainingChoice]


def world_facts(plan: "AnyPlan") -> dict[str, Any]:
    """Describe the devices and the split."""
    choice, device = plan.best or plan.nearest, plan.device
    return {
        "family": plan.model.config.model_type,
        "parameters": plan.model.parameters,
        "world": Fact(
            f"{plan.world} {device.name}, {size_of(device.room)} of {size_of(device.memory)} each "
            "to plan with",
            {
                "nodes": plan.world.nodes,
                "per_node": plan.world.per_node,
                "device": device.name,
                "memory": device.memory,
                "room": device.room,
            },
        ),
        "fits": plan.best is not None,
        "split": Fact(str(choice.split), split_of(choice.split)),
    }


def other_facts(plan: "AnyPlan", splits: int) -> dict[str, Any]:
    """Return other splits that fit, invalid splits, and remedies if none fits."""
    facts: dict[str, Any] = {}
    others = plan.choices[1 : 1 + splits]
    if others:
        facts["other splits"] = Fact(
            "; ".join(f"{one.split}: {count(one.pace.tokens_per_second)}/s" for one in others),
            [
                {
                    **split_of(one.split),
                    "needed": one.memory.total,
                    "tokens_per_second": one.pace.tokens_per_second,
                }
                for one in others
            ],
        )
    if plan.misfits:
        facts["not possible"] = Fact("; ".join(list(plan.misfits)[:3]), list(plan.misfits))
    if plan.best is None:
        facts["instead"] = Fact(" or ".join(plan.remedies) or None, list(plan.remedies))
    return facts


def split_of(split: "Split") -> dict[str, int]:
    """Return the numbers of a split."""
    return {
        "tp": split.tp,
        "ep": split.ep,
        "expert_tp": split.expert_tp,
        "pp": split.pp,
        "dp": split.dp,
        "fsdp": split.fsdp,
    }


def pace_fact(pace: "DecodePace", rows: int | None = None) -> Fact:
    """Describe a speed and its bottleneck."""
    text = (
        f"{count(pace.tokens_per_second)} tokens/s, at most {count(pace.at_most)}, "
        f"bound by {pace.bound}"
    )
    if rows is not None and rows > 1:
        text += f"; {rows:,} rows, {1e3 * pace.seconds:,.1f} ms a token of each"
    return Fact(
        text,
        {
            "tokens_per_second": pace.tokens_per_second,
            "at_most": pace.at_most,
            "bound": pace.bound,
            "rows": rows,
            "seconds": dict(pace.expected),
        },
    )


def count(number: float) -> str:
    """Write a number for people."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"

"""`quintet plan --train --world 2x8 --device h100`: what a training needs there."""

from typing import TYPE_CHECKING, Any

from quintet.cli.output import Fact, size_of
from quintet.cli.plan_facts import other_facts, pace_fact, world_facts
from quintet.cli.plan_options import WorldOptions, world_and_device
from quintet.errors import DoesNotFitError, InputError

if TYPE_CHECKING:
    from quintet.configuration import PreTrainedConfig
    from quintet.planning.plans import Plan, TrainingChoice
    from quintet.planning.training import Training


def plan_training_in_world(
    config: "PreTrainedConfig",
    options: WorldOptions,
    *,
    dtype: str,
    quantize: str | None,
    context: int,
    batch: int,
) -> tuple[dict[str, Any], str | None]:
    """Return the facts, and the reason if no split fits.

    Raises:
        InputError: a world, device or split that is none, or weights in few bits.
    """
    from quintet.planning.plans import plan_training
    from quintet.planning.training import Training

    if quantize is not None:
        raise InputError(
            f"--quantize {quantize}: weights in few bits do not learn; leave it out with --train"
        )
    if dtype == "float16":
        raise InputError("--dtype float16: a training multiplies in bfloat16 or float32")
    world, device = world_and_device(options)
    on_cpu = device.name.startswith(("cpu", "here"))
    work = Training(
        context=context,
        rows=batch,
        part_rows=options.part_rows or 1,
        itemsize=4 if dtype == "float32" or (dtype == "auto" and on_cpu) else 2,
        gradient=2 if options.gradients == "bfloat16" else 4,
        optimizer="muon" if options.optimizer == "muon" else "adamw",
        recompute=options.recompute,
        sequence_parallel=options.sequence_parallel,
        kernels=on_cpu,
    )
    plan = plan_training(config, world, device, work, limits=options.limits(world.size))
    facts = _facts(plan, work, options.splits)
    try:
        plan.require()
    except DoesNotFitError as error:
        return facts, str(error)
    return facts, None


def _facts(plan: "Plan[TrainingChoice]", work: "Training", splits: int) -> dict[str, Any]:
    choice = plan.best or plan.nearest
    memory, split = choice.memory, choice.split
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimiser": memory.optimizer,
        "copies": memory.copies,
        "activations": memory.activations,
        "logits": memory.logits,
    }
    return {
        **world_facts(plan),
        "step": Fact(
            f"{work.rows} rows of {work.context:,} tokens: {split.groups} group(s) of "
            f"{work.parts(split)} part(s)",
            {"rows": work.rows, "groups": split.groups, "parts": work.parts(split)},
        ),
        **{name: Fact(size_of(n), n) for name, n in parts.items()},
        "needed": Fact(f"{size_of(memory.total)} a device", memory.total),
        "a step": Fact(
            f"{choice.pace.seconds:,.3g} s: "
            + ", ".join(f"{v:,.3g} of {k}" for k, v in choice.pace.expected.items() if v),
            choice.pace.seconds,
        ),
        "learns": pace_fact(choice.pace),
        **other_facts(plan, splits),
    }

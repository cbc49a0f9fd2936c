"""The banner of `quintet train`: model, data, steps, memory, machine."""

from typing import TYPE_CHECKING

from quintet.cli.output import size_of

if TYPE_CHECKING:
    from quintet.training.config import TrainingConfig
    from quintet.training.memory import Memory
    from quintet.training.records import Beginning


def banner(beginning: "Beginning", config: "TrainingConfig") -> list[str]:
    """Return the lines."""
    return [f"{name:8} {text}" for name, text in _facts(beginning, config).items()]


def _facts(beginning: "Beginning", config: "TrainingConfig") -> dict[str, str]:
    return {
        "model": _model(beginning),
        "data": _data(beginning),
        "steps": _steps(beginning),
        "memory": _memory(needed(beginning, config)),
        "machine": _machine(config),
        "run": _run(beginning, config),
    }


def needed(beginning: "Beginning", config: "TrainingConfig") -> "Memory":
    """Return the memory that a training needs."""
    import torch

    from quintet.training.memory import memory

    whole = config.optimizer.precision == "float32"
    return memory(
        beginning.model,
        -(-beginning.step_tokens // max(1, beginning.parts)),
        beginning.optimizer_bytes,
        dtype=beginning.model.dtype if whole else torch.bfloat16,
        recompute=int(config.train.recompute),
    )


def _model(beginning: "Beginning") -> str:
    from quintet.modeling.sizes import measure

    model = beginning.model
    size = measure(model, model.dtype)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = f"{model.config.model_type}, {_count(size.parameters)} parameters"
    if size.active < size.parameters:
        text += f", {_count(size.active)} of them active"
    if model.stage is not None:
        text += f", {_count(model.num_parameters())} of them in this process"
    elif learned < size.parameters:
        text += f", {_count(learned)} trained ({learned / size.parameters:.2%})"
    return f"{text}; {str(model.dtype).removeprefix('torch.')} on {model.device}"


def _data(beginning: "Beginning") -> str:
    if beginning.documents is None:
        return "as it comes"
    text = f"{beginning.documents:,} documents"
    return text if beginning.data_tokens is None else f"{text}, {beginning.data_tokens:,} tokens"


def _steps(beginning: "Beginning") -> str:
    size = f"{beginning.step_tokens:,} tokens each"
    if beginning.parts > 1:
        size += f" in {beginning.parts} parts"
    if beginning.steps is not None:
        whole = beginning.steps * beginning.step_tokens
        text = f"{beginning.steps:,} of {size}, {_count(whole)} in all"
    elif beginning.tokens is not None:
        whole = beginning.tokens
        text = f"of {size}, until {_count(whole)} are read"
    else:
        return f"of {size}, for {beginning.minutes:g} minutes of the processor"
    if beginning.data_tokens:
        text += f": the data {whole / beginning.data_tokens:.2g} times"
    return text + (f"; going on from step {beginning.step:,}" if beginning.step else "")


def _memory(needs: "Memory") -> str:
    parts = {
        "weights": needs.weights,
        "gradients": needs.gradients,
        "optimiser": needs.optimizer,
        "activations": needs.activations,
    }
    parts_text = " + ".join(f"{size_of(value)} {name}" for name, value in parts.items())
    return f"about {size_of(needs.total)}: {parts_text}"


def _machine(config: "TrainingConfig") -> str:
    import torch

    from quintet.kernels.native import native

    kernels = native()
    text = f"{torch.get_num_threads()} thread(s), kernels: "
    text += kernels.level or f"PyTorch alone, as {kernels.reason}"
    peak = config.report.peak_flops
    return text if peak is None else f"{text}; products at {peak / 1e9:,.0f} GFLOP/s"


def _run(beginning: "Beginning", config: "TrainingConfig") -> str:
    settings = config.checkpoint
    often = f"every {settings.minutes:g} minutes"
    if settings.every is not None:
        often = f"every {settings.every:,} steps"
    return f"{beginning.folder}, saved {often}; Ctrl-C saves and ends, --resume goes on"


def _count(number: float) -> str:
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{round(number):,}"

"""The model of a training as an ordinary checkpoint, whether one process has it or several."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from quintet.adapters.dividing import adapted_names
from quintet.modeling.heads import CausalLMHead
from quintet.modeling.init_on_meta import init_on_meta
from quintet.tokenization import PreTrainedTokenizer
from quintet.training.crew import Crew
from quintet.training.optimizers.layout import Layout

__all__ = ["writing"]


def writing(
    model: CausalLMHead, tokenizer: PreTrainedTokenizer, crew: Crew, layout: Layout
) -> Callable[[Path], None]:
    """Return what writes a model and its tokenizer into a folder, in the first process.

    All take part in making the weights whole; the first keeps them, in its own memory.
    """
    if crew.size == 1:
        return lambda folder: _write(folder, model, tokenizer, None)
    if model.adapters is not None:
        wholes = whole_adapters(model, layout, keep=crew.first)

        def write_adapter(folder: Path) -> None:
            with _holding(wholes):
                model.save_adapter(folder)
            tokenizer.save_pretrained(folder)

        return write_adapter
    state = whole_state(model, layout, keep=crew.first)

    def write(folder: Path) -> None:
        shell = init_on_meta(type(model), model.config)
        shell.generation_config = model.generation_config
        dtype = torch.bfloat16 if layout.rounds else model.dtype
        _write(folder, shell.to(dtype), tokenizer, state)

    return write


def whole_state(model: CausalLMHead, layout: Layout, *, keep: bool) -> dict[str, Tensor]:
    """Return the whole weights of a model, in the host's memory; none where they are not kept."""
    found: dict[str, Tensor] = {}
    # Weights under several names are made whole once, and stay one.
    made: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in made:
            whole = layout.whole(name, layout.held(tensor.detach()))
            rounded = layout.rounds and isinstance(tensor, nn.Parameter)
            own = torch.bfloat16 if rounded else whole.dtype
            made[id(tensor)] = whole.detach().to("cpu", own) if keep else whole[:0]
        if keep:
            found[name] = made[id(tensor)]
    return found


def whole_adapters(
    model: CausalLMHead, layout: Layout, *, keep: bool
) -> dict[nn.Parameter, Tensor]:
    """Return the whole of each parameter of adapters; none where they are not kept."""
    names = adapted_names(model)
    found = {}
    for name, parameter in model.named_parameters():
        if name in names:
            whole = layout.whole(name, layout.held(parameter.detach()))
            if keep:
                found[parameter] = whole
    return found


@contextmanager
def _holding(wholes: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Let parameters have other numbers, of which they are parts."""
    parts = {parameter: parameter.data for parameter in wholes}
    try:
        for parameter, whole in wholes.items():
            parameter.data = whole
        yield
    finally:
        for parameter, part in parts.items():
            parameter.data = part


def _write(
    folder: Path,
    model: CausalLMHead,
    tokenizer: PreTrainedTokenizer,
    state: dict[str, Tensor] | None,
) -> None:
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)

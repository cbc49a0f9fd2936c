"""The model of a training as an ordinary checkpoint, whether one process has it or several."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from quintet.adapters.dividing import adapted_names
from quintet.modeling.heads import CausalLMHead
from quintet.modeling.init_on_meta import init_on_meta
from quintet.tokenization import PreTrainedTokenizer
from quintet.training.adapting import whole_of
from quintet.training.optimizers.layout import Layout
from quintet.training.ranks import Ranks


def writing(
    model: CausalLMHead, tokenizer: PreTrainedTokenizer, ranks: Ranks, layout: Layout
) -> Callable[[Path], None]:
    """Return a function with which the first process writes a model and its tokenizer.

    All take part in making the weights whole; the first keeps them, in its own memory.
    """
    if ranks.size == 1:
        return lambda folder: _write(folder, model, tokenizer, None)
    if model.adapters is not None:
        tensors = whole_adapters(model, layout, keep=ranks.first)

        def write_adapter(folder: Path) -> None:
            known = layout.whole_model
            shell = whole_of(known if isinstance(known, CausalLMHead) else model)
            for name, tensor in tensors.items():
                path, _, leaf = name.rpartition(".")
                parameter = nn.Parameter(tensor, requires_grad=False)
                shell.get_submodule(path)._parameters[leaf] = parameter
            shell.save_adapter(folder)
            tokenizer.save_pretrained(folder)

        return write_adapter
    state = whole_state(model, layout, keep=ranks.first)

    def write(folder: Path) -> None:
        shell = init_on_meta(type(model), model.config)
        shell.generation_config = model.generation_config
        dtype = torch.bfloat16 if layout.rounds else model.dtype
        _write(folder, shell.to(dtype), tokenizer, state)

    return write


def whole_state(model: CausalLMHead, layout: Layout, *, keep: bool) -> dict[str, Tensor]:
    """Return the whole weights of a model, in the host's memory; none where they are not kept."""
    # Weights under several names are made whole once, and stay one.
    state = model.state_dict(keep_vars=True)
    first = _first_names(state)

    def own() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in state.items():
            if first[name] == name and layout.counts(name):
                whole = layout.whole(name, layout.local(tensor.detach()))
                rounded = layout.rounds and isinstance(tensor, nn.Parameter)
                yield name, whole.detach().to(torch.bfloat16 if rounded else whole.dtype)

    tensors = {}
    for name, whole in layout.collected(own()):
        if keep:
            tensors[name] = whole.to("cpu")
    if model.stage is not None:
        # Which names there are for what other layers have.
        first = _first_names(init_on_meta(type(model), model.config).state_dict(keep_vars=True))
    return {name: tensors[source] for name, source in first.items() if source in tensors}


def _first_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the first name of the tensor of each name."""
    names: dict[int, str] = {}
    return {name: names.setdefault(id(tensor), name) for name, tensor in state.items()}


def whole_adapters(model: CausalLMHead, layout: Layout, *, keep: bool) -> dict[str, Tensor]:
    """Return the whole of each parameter of adapters, by name; none where they are not kept."""
    names = adapted_names(model)

    def own() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            if name in names and layout.counts(name):
                yield name, layout.whole(name, layout.local(parameter.detach()))

    return {name: whole for name, whole in layout.collected(own()) if keep}


def _write(
    folder: Path,
    model: CausalLMHead,
    tokenizer: PreTrainedTokenizer,
    state: dict[str, Tensor] | None,
) -> None:
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)

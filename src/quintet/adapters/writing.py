"""Writes an adapter in PEFT's layout."""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from quintet.adapters.adaptation import EXPERT_STACKS, Adaptation
from quintet.adapters.config import LoraConfig
from quintet.adapters.files import STEM
from quintet.adapters.layout import ModuleLayout
from quintet.adapters.names import DELTA, PREFIX, name_of
from quintet.checkpoint import save
from quintet.folder import ADAPTER_CONFIG_NAME


def adapter_state(
    layout: ModuleLayout, parts: Mapping[tuple[nn.Module, str], Adaptation]
) -> dict[str, Tensor]:
    """Return an adapter's tensors by their names in files."""
    state: dict[str, Tensor] = {}
    written: set[tuple[nn.Module, str]] = set()
    for spot in layout:
        key = spot.module, spot.use
        if key not in parts or key in written:
            continue
        written.add(key)
        adaptation, path = parts[key], layout.named(spot.path)
        # Of two stacks of experts, PEFT's wrapper of the first is within that of the second.
        stacks = [name for name in EXPERT_STACKS if name in adaptation.added]
        for name in adaptation.added:
            addition = adaptation.addition(name)
            assert addition is not None
            depth = len(stacks) - 1 - stacks.index(name) if name in stacks else 0
            for leaf, tensor in addition.tensors().items():
                state[name_of(path, leaf, depth)] = tensor
        for name in adaptation.experts:
            expert, _, part = name.partition("/")
            lora = adaptation.of_expert(int(expert), part)
            assert lora is not None
            for leaf, tensor in lora.tensors().items():
                state[name_of(f"{path}.{expert}.{part}", leaf)] = tensor
        # Where PEFT wraps a module, what it is put around is a part of it.
        depth = 1 if adaptation.added else 0
        for name, tensor in adaptation.instead.items():
            state[name_of(path, name, depth)] = tensor
        tied = layout.tied is not None and spot.path == layout.tied[0]
        if adaptation.rows is not None and not tied:
            state[name_of(path, DELTA)] = adaptation.rows.rows
    return {name: tensor.detach() for name, tensor in state.items()}


def save_adapter(
    directory: str | os.PathLike[str], config: LoraConfig, state: Mapping[str, Tensor]
) -> list[Path]:
    """Write an adapter atomically.

    Raises:
        SaveError: writing failed.
    """
    assert all(name.startswith(PREFIX) for name in state)
    texts = {ADAPTER_CONFIG_NAME: config.to_json_string()}
    return save(directory, state, text_files=texts, stem=STEM)

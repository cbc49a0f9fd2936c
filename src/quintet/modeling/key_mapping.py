"""Maps tensors of a checkpoint to tensors of a model, by name and shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quintet.checkpoint import (
    Difference,
    Mismatch,
    StackPiece,
    TensorInfo,
    compare,
    count_pieces,
    pieces,
)
from quintet.errors import InputError, listed
from quintet.modeling.core import ModelCore
from quintet.quantization import QuantizationConfig, Stored, WeightFormat, stored

Shape = tuple[int, ...]
# A head that a class does not have is no loss.
HEADS = ("lm_head.", "score.", "qa_outputs.")


@dataclass(frozen=True, slots=True)
class KeyMapping:
    """The mapping from a checkpoint's tensors to a model's.

    Attributes:
        wanted: the tensors to read, by their name in the checkpoint: whose they are in the
            model, and which part of it.
        stored: how the checkpoint holds each of them, quantised ones as several tensors.
        absent: parameters of a new head, which begin with random weights.
        reshaped: parameters that begin with random weights as the checkpoint has other shapes.
        difference: what keeps the model from being complete.
        mismatched: tensors of another shape that the caller chose to do without.
        aliases: second names under which the checkpoint holds a tensor again, and the first.
        optional: prefixes of what the model does without.
        unused: what the checkpoint holds and the model has no place for.
    """

    wanted: Mapping[str, tuple[str, StackPiece]]
    stored: Mapping[str, Stored]
    absent: tuple[str, ...]
    reshaped: tuple[str, ...]
    difference: Difference
    mismatched: tuple[Mismatch, ...]
    aliases: Mapping[str, str]
    optional: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def fresh(self) -> tuple[str, ...]:
        """All names that start from random weights."""
        return (*self.absent, *self.reshaped)

    @property
    def formats(self) -> dict[str, WeightFormat]:
        """The quantisation format that each matrix of the model has in the files.

        Without those of plain numbers, and those of which parts are in different formats.
        """
        found: dict[str, set[WeightFormat | None]] = {}
        for in_file, (name, _) in self.wanted.items():
            one = self.stored[in_file].format
            found.setdefault(name, set()).add(None if one is None else one.model_format)
        return {name: one for name, (one, *more) in found.items() if one is not None and not more}

    @property
    def lost(self) -> list[str]:
        """Unused names, except those of another class's head."""
        return [name for name in self.unused if not name.startswith(HEADS)]

    def report(self) -> dict[str, Any]:
        """Return `output_loading_info` with Transformers' keys."""
        return {
            "missing_keys": set(self.absent),
            "unexpected_keys": set(self.lost),
            "mismatched_keys": {(m.name, m.found, m.expected) for m in self.mismatched},
            "error_msgs": [],
        }


def map_keys(
    model: ModelCore,
    tensors: Mapping[str, TensorInfo],
    *,
    stored_as: QuantizationConfig | None = None,
    ignore_mismatched_sizes: bool = False,
) -> KeyMapping:
    """Map the tensors of a checkpoint to those of a model, by name and shape.

    The checkpoint may be with or without a head, and may hold experts stacked already.
    `stored_as` says how its matrices are quantised, and `ignore_mismatched_sizes` lets tensors
    begin fresh whose shape is another.
    """
    tied, optional = model.tied_names(), model.optional_names(tensors)
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name not in tied and not name.startswith(optional)
    }
    own = f"{model.base_model_prefix}." if model.base_model is not model else ""
    inner = [name.removeprefix(own) for name in expected if name.startswith(own)]
    prefixes = dict.fromkeys((own, "", "model.", "transformer."))
    prefix = max(prefixes, key=lambda p: sum(p + name in tensors for name in inner))

    def on_disk(name: str) -> str:
        return prefix + name.removeprefix(own) if name.startswith(own) else name

    plan: dict[str, list[StackPiece]] = {}
    # A config may ask for more experts than anything could list: what takes more pieces than the
    # files have tensors is not all there, and is asked for as it is in the model.
    remaining = len(tensors)
    for name, shape in expected.items():
        named = on_disk(name)
        count = count_pieces(named, shape, model.expert_stacks)
        stacked = count > 1 and stored_as is not None and stored_as.stored(named, shape, tensors)
        whole = named in tensors or bool(stacked) or count > max(remaining, 1)
        remaining -= 0 if whole else count
        plan[name] = (
            [StackPiece(named, shape)] if whole else pieces(named, shape, model.expert_stacks)
        )
    aliases: dict[str, str] = {}
    for alias, name in tied.items():
        second, first = on_disk(alias), plan[name][0].name
        if second not in tensors:
            continue
        if first in tensors:
            aliases[second] = first
        else:
            # A file may hold a tied tensor under others of its names alone.
            plan[name] = [StackPiece(second, expected[name])]

    absent = tuple(
        name
        for name in expected
        if name.startswith(model.new_head) and plan[name][0].name not in tensors
    )
    for name in absent:
        del plan[name]
    stored = _stored(plan, tensors, stored_as)
    difference = _compare(stored, tensors)
    reshaped: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    used = _files(stored)
    if ignore_mismatched_sizes:
        mismatched = tuple(difference.mismatched)
        other = {item.name for item in mismatched}
        reshaped = tuple(
            name
            for name, parts in plan.items()
            if any(other & set(_files({part.name: stored[part.name]})) for part in parts)
        )
        for name in reshaped:
            for part in plan.pop(name):
                del stored[part.name]
        difference = _compare(stored, tensors)
    return KeyMapping(
        wanted={part.name: (name, part) for name, parts in plan.items() for part in parts},
        stored=stored,
        absent=absent,
        reshaped=reshaped,
        difference=difference,
        mismatched=mismatched,
        aliases={second: first for second, first in aliases.items() if first in stored},
        optional=optional,
        unused=tuple(
            name
            for name in sorted(set(tensors) - set(used) - set(aliases))
            if stored_as is None or not stored_as.idle(name)
        ),
    )


def check_tied(tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    """Refuse tied tensors that differ: only one of them would be saved.

    Raises:
        InputError: one is not the other.
    """
    for alias, name in tied.items():
        if alias not in tensors or name not in tensors:
            continue
        one, other = tensors[alias], tensors[name]
        if one.data_ptr() != other.data_ptr() and not torch.equal(one, other):
            raise InputError(
                f"{alias} differs from {name}, and config.tie_word_embeddings says that they are "
                "one; set it to False to keep both, or call tie_weights() to keep the latter"
            )


def stack_experts(model: ModelCore, state: dict[str, Tensor], prefix: str) -> list[str]:
    """Stack the experts of a state dict in place, as the model holds them.

    Returns what is wrong, where only some of a stack are there or their shapes do not fit.
    """
    errors = []
    for name, stack in model.named_parameters():
        named = prefix + name
        if named in state or count_pieces(named, tuple(stack.shape), model.expert_stacks) == 1:
            continue
        parts = pieces(named, tuple(stack.shape), model.expert_stacks)
        present = [part for part in parts if part.name in state]
        if not present:
            continue
        wrong = [part.name for part in present if tuple(state[part.name].shape) != part.shape]
        if wrong or len(present) < len(parts):
            lacking = [part.name for part in parts if part.name not in state]
            fault = "have other shapes" if wrong else "are missing"
            errors.append(f"{named} is made of {len(parts)} tensors, of which some {fault}:")
            errors.append(listed(wrong or lacking))
            continue
        first = state[parts[0].name]
        whole = first.new_empty(stack.shape)
        for part in parts:
            part.of(whole).copy_(state.pop(part.name))
        state[named] = whole
    return errors


def _stored(
    plan: Mapping[str, list[StackPiece]],
    tensors: Mapping[str, TensorInfo],
    stored_as: QuantizationConfig | None,
) -> dict[str, Stored]:
    needed = {part.name: part.shape for parts in plan.values() for part in parts}
    return stored(needed, tensors, stored_as)


def _files(stored: Mapping[str, Stored]) -> dict[str, Shape]:
    return dict(file for one in stored.values() for file in one.files.values())


def _compare(stored: Mapping[str, Stored], tensors: Mapping[str, TensorInfo]) -> Difference:
    files = _files(stored)
    return compare(files, {name: tensors[name] for name in files if name in tensors})

"""The prompt of `generate()`: ids or embeddings, checked and left-padded."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quintet.cache import Cache
from quintet.errors import InputError
from quintet.ops.ragged import check_ones_and_zeros
from quintet.ops.token_ids import check_token_ids


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt as given and as run.

    Attributes:
        given: (B, T) ids as the caller gave them; (B, 0) where there are embeddings alone.
        ids: the same with padding on the left.
        inputs: what the model runs over: the ids, or (B, W, C) embeddings.
        padding: (B,) how many leading columns of `inputs` are no text; None for none.
        before: how many tokens a cache holds that come before these rows, rather than being the
            beginning of them.
        positions: (B, W) what the rotary embedding turns into angles; None for the slots.
    """

    given: Tensor
    ids: Tensor
    inputs: Tensor
    padding: Tensor | None
    before: int = 0
    positions: Tensor | None = None

    @property
    def width(self) -> int:
        """The number of columns to run."""
        return self.inputs.shape[1]

    @property
    def length(self) -> int:
        """The number of columns, including those in the cache."""
        return self.before + self.width

    def rows(self, rows: slice) -> "Prompt":
        """Return some of the rows, at full width."""
        return replace(
            self,
            given=self.given[rows],
            ids=self.ids[rows],
            inputs=self.inputs[rows],
            padding=None if self.padding is None else self.padding[rows],
            positions=None if self.positions is None else self.positions[rows],
        )

    def text_padding(self) -> Tensor | None:
        """Return the number of leading padding columns of `ids`, (B,), or None."""
        return self.padding if self.ids.shape[1] == self.width else None


def read_prompt(
    inputs: Tensor | Mapping[str, Tensor] | None,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    past: Cache | None,
    position_ids: Tensor | None = None,
    *,
    vocab_size: int,
    device: torch.device,
) -> Prompt:
    """Read the prompt from the arguments of `generate()`.

    Raises:
        InputError: there is none, two contradict each other, or one is of another shape.
    """
    if isinstance(inputs, Mapping):
        unknown = set(inputs) - {"input_ids", "attention_mask", "token_type_ids"}
        if "input_ids" not in inputs or unknown:
            raise InputError(
                f"a mapping as inputs has {sorted(inputs)}; it has to have input_ids, "
                "and may have attention_mask"
            )
        attention_mask = inputs.get("attention_mask") if attention_mask is None else attention_mask
        inputs = inputs["input_ids"]
    if inputs is not None and input_ids is not None:
        raise InputError("inputs and input_ids are two names of the same argument; give one")
    given = input_ids if inputs is None else inputs
    if given is None and inputs_embeds is None:
        raise InputError(
            "there is no prompt; give inputs, for example tokenizer(text), or set bos_token_id, "
            "which a text without a prompt begins with"
        )
    if given is not None:
        _check_ids(given, inputs_embeds is not None)
        check_token_ids(given, vocab_size)
        given = given.to(device)
    if inputs_embeds is not None:
        _check_embeds(inputs_embeds)
    run = given if inputs_embeds is None else inputs_embeds.to(device)
    assert run is not None
    if given is None:
        given = torch.zeros(run.shape[0], 0, dtype=torch.long, device=device)
    if len(given) != len(run):
        raise InputError(
            f"input_ids has {len(given)} rows and inputs_embeds {len(run)}; they have to be the "
            "same"
        )
    mask, before = _read_mask(attention_mask, run, past)
    positions = _read_positions(position_ids, run)
    if mask is None or bool(mask.all()):
        return Prompt(given, given, run, None, before, positions)
    real = mask.to(device).to(torch.bool)
    order = torch.argsort(real.to(torch.int8), dim=1, stable=True)
    ids = given.gather(1, order) if given.shape[1] == run.shape[1] else given
    moved = run.gather(1, order[..., None].expand_as(run)) if run.ndim == 3 else ids
    positions = None if positions is None else positions.gather(1, order)
    return Prompt(given, ids, moved, (~real).sum(dim=1), before, positions)


def _check_ids(ids: Tensor, may_be_empty: bool) -> None:
    if not isinstance(ids, Tensor):
        raise InputError(
            f"input_ids is a {type(ids).__name__}, not a tensor; "
            "call the tokenizer with return_tensors='pt'"
        )
    if ids.ndim != 2 or (ids.numel() == 0 and not may_be_empty):
        raise InputError(
            f"the prompt has shape {tuple(ids.shape)}; it has to be (batch, tokens) with at "
            "least one token (is it empty?)"
        )
    _check_real("input_ids", ids)


def _check_embeds(embeds: Tensor) -> None:
    if not isinstance(embeds, Tensor):
        raise InputError(
            f"inputs_embeds is a {type(embeds).__name__}, not a tensor; make it with "
            "model.get_input_embeddings()(ids)"
        )
    if embeds.ndim != 3 or not embeds.numel() or not embeds.is_floating_point():
        raise InputError(
            f"inputs_embeds has shape {tuple(embeds.shape)} and dtype {embeds.dtype}; it has to be "
            "(batch, tokens, width) of floating point"
        )
    _check_real("inputs_embeds", embeds)
    if not bool(embeds.isfinite().all()):
        row, column = (~embeds.isfinite()).nonzero()[0, :2].tolist()
        raise InputError(
            f"inputs_embeds[{row}, {column}] holds NaN or infinity; it has to be finite numbers"
        )


def _check_real(name: str, given: Tensor) -> None:
    if given.is_meta:
        raise InputError(f"{name} is on the meta device, without values; give it on the model's")


def _read_positions(positions: Tensor | None, run: Tensor) -> Tensor | None:
    if positions is None:
        return None
    if not isinstance(positions, Tensor):
        raise InputError(f"position_ids is a {type(positions).__name__}, not a tensor")
    B, T = run.shape[:2]
    fits = positions.ndim == 2 and positions.shape[1] == T and positions.shape[0] in (1, B)
    if not fits or positions.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"position_ids has shape {tuple(positions.shape)} and dtype {positions.dtype}; it has "
            f"to be {(B, T)} of integers, a position for each token of the prompt"
        )
    _check_real("position_ids", positions)
    if bool((positions < 0).any()):
        raise InputError(
            f"position_ids holds {int(positions.min())}; a position is an integer of at least 0"
        )
    return positions.to(run.device).long().expand(B, -1)


def _read_mask(mask: Tensor | None, run: Tensor, past: Cache | None) -> tuple[Tensor | None, int]:
    """Return the mask of the columns to run, and the length of the past before them."""
    if mask is None:
        return None, 0
    if not isinstance(mask, Tensor):
        raise InputError(
            f"attention_mask is a {type(mask).__name__}, not a tensor; "
            "call the tokenizer with return_tensors='pt'"
        )
    _check_real("attention_mask", mask)
    B, T = run.shape[:2]
    cached = 0 if past is None else past.get_seq_length()
    covers_past = mask.ndim == 2 and cached and len(mask) == B and mask.shape[1] > T
    if not covers_past and mask.shape != (B, T):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)} and the prompt {(B, T)}; they have to "
            "be the same"
        )
    check_ones_and_zeros(mask)
    if covers_past:
        before = mask[:, :-T].to(torch.bool).sum(dim=1)
        lengths = past.lengths(B, before.device) if past is not None else before
        if not torch.equal(before, lengths.to(before)):
            raise InputError(
                f"attention_mask counts {before.tolist()} tokens before the new {T}, and "
                f"past_key_values holds {lengths.tolist()}"
            )
        return mask[:, -T:], cached
    if not bool(mask.any(dim=1).all()):
        raise InputError("attention_mask leaves a row without a single token")
    return mask, 0

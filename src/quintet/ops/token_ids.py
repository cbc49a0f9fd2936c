"""Checks of token ids."""

import torch
from torch import Tensor

from quintet.errors import InputError


def check_token_ids(input_ids: Tensor, vocab_size: int, name: str = "input_ids") -> None:
    """Check that ids are (B, T) integers within the embedding; `name` is for messages.

    Raises:
        InputError: another shape or dtype, no token at all, or an id out of range.
    """
    if not isinstance(input_ids, Tensor):
        raise InputError(
            f"{name} is a {type(input_ids).__name__}, not a tensor; "
            "call the tokenizer with return_tensors='pt'"
        )
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"{name} has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}; "
            "it has to be (batch, tokens) of integers"
        )
    if input_ids.numel() == 0:
        raise InputError(
            f"{name} has shape {tuple(input_ids.shape)}: there is no token to start from; "
            "give at least one, for example the tokenizer's bos or eos token"
        )
    # Reading the ids back from another device would stall it at every step, and rows that
    # torch.func runs side by side cannot be read.
    if torch.compiler.is_compiling() or input_ids.device.type != "cpu":
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(input_ids):
        return
    # Of a few numbers, faster than torch.
    ids = input_ids.flatten().tolist()
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        row, column = (input_ids == bad).nonzero()[0].tolist()
        raise InputError(
            f"{name}[{row}, {column}] is {bad}; the model's vocabulary has ids 0 to "
            f"{vocab_size - 1} (is this the model's own tokenizer?)"
        )


def check_placed(name: str, x: Tensor, device: torch.device) -> None:
    """Check that a tensor is not on meta if the model is not.

    Raises:
        InputError: it is on the meta device and the model is not.
    """
    if x.is_meta and device.type != "meta":
        raise InputError(
            f"{name} is on the meta device, where tensors have no numbers, and the model is on "
            f"{device}; make it outside of torch.device('meta')"
        )

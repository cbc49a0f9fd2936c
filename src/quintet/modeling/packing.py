"""Packed rows: several texts in one row, as trainers and collators mark them."""

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypedDict, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.adapters.rows import takes_adapters
from quintet.errors import InputError
from quintet.ops.documents import Documents, documents_of
from quintet.ops.labels import IGNORED
from quintet.ops.transforms import recorded

Forward = TypeVar("Forward", bound=Callable[..., Any])


class Packing(TypedDict, total=False):
    """Options of every forward that mark packed texts.

    Attributes:
        cu_seq_lens_q: (n + 1,) where each of n texts begins, counted over all rows, and the end.
        cu_seq_lens_k: the same again.
        max_length_q: the length of the longest text, or more.
        max_length_k: the same again.
        seq_idx: (B, T) numbers that change where a text ends.
        token_type_ids: which text of a pair a token is of, as tokenizers say it to models that
            were trained with it; taken, as none of these was, and not used.
    """

    cu_seq_lens_q: Tensor | None
    cu_seq_lens_k: Tensor | None
    max_length_q: int | Tensor | None
    max_length_k: int | Tensor | None
    seq_idx: Tensor | None
    token_type_ids: Tensor | None


def takes_packing(forward: Forward) -> Forward:
    """Add the options of `Packing`, and `adapter_names`, to a forward's signature.

    They are named in the signature that tools read, in place of **options.
    """
    signature = inspect.signature(forward)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    named += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in Packing.__annotations__.items()
    ]
    vars(forward)["__signature__"] = signature.replace(parameters=named)
    return takes_adapters(forward)


def packed(
    packing: Packing,
    shape: tuple[int, int],
    *,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past: object = None,
    keeps: bool = False,
) -> Documents | None:
    """Return the texts packed into rows (B, T), or None if each row is one text.

    Positions tell only without a mask and a cache, as in Transformers: with these, a row is one
    text wherever its positions jump.

    Raises:
        InputError: what tells where texts end contradicts itself, the mask or the cache.
        TypeError: an option is none of `Packing`.
    """
    for name in packing.keys() - Packing.__annotations__.keys():
        raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
    named = [k for k, value in packing.items() if value is not None and k != "token_type_ids"]
    if named:
        _check_alone(named[0], attention_mask)
        if past is not None:
            return _continuing(packing, shape)
        if keeps:
            raise InputError(
                f"{named[0]} tells of several texts in a row, each of which has a row of a cache; "
                "give one as past_key_values, or use_cache=False"
            )
        return _documents(packing, shape)
    cached = past is not None or keeps
    if position_ids is None or attention_mask is not None or cached or position_ids.ndim == 0:
        return None
    B, T = shape
    positions = position_ids.reshape(-1, T).expand(B, T)
    # A text goes on where the next position is one more.
    columns = torch.arange(T, dtype=positions.dtype, device=positions.device)
    return documents_of(positions - columns)


def own_labels(
    labels: Tensor, documents: Documents | None, ahead: int = 1, *, shifted: int = 0
) -> Tensor:
    """Mask labels (B, T) that would be predicted from a token of another text.

    A label is of the token `shifted` places after its own, and predicted `ahead` places before it.
    """
    if documents is None or labels.shape != documents.index.shape:
        return labels
    apart = F.pad(documents.apart(ahead)[:, shifted:], (0, shifted))
    return labels.masked_fill(apart.to(labels.device), IGNORED)


def _check_alone(name: str, mask: Tensor | None) -> None:
    if mask is not None and (mask.ndim != 2 or not bool(mask.to(torch.bool).all())):
        raise InputError(
            f"{name} tells of several texts in a row, which have no padding and no mask of their "
            "own; leave attention_mask out"
        )


def _documents(packing: Packing, shape: tuple[int, int]) -> Documents | None:
    B, T = shape
    named: list[tuple[str, Tensor]] = []
    index = packing.get("seq_idx")
    if index is not None:
        if not isinstance(index, Tensor) or index.shape not in ((T,), (1, T), (B, T)):
            raise InputError(
                f"seq_idx has to be a tensor of shape ({B}, {T}), a number for each token"
            )
        named.append(("seq_idx", index.reshape(-1, T).expand(B, T)))
    for side, lengths, most in (
        ("q", packing.get("cu_seq_lens_q"), packing.get("max_length_q")),
        ("k", packing.get("cu_seq_lens_k"), packing.get("max_length_k")),
    ):
        if lengths is not None:
            named.append((f"cu_seq_lens_{side}", _numbers(lengths, side, most, shape)))
        elif most is not None:
            raise InputError(f"max_length_{side} says nothing without cu_seq_lens_{side}")
    found = [(name, documents_of(numbers)) for name, numbers in named]
    for name, other in found[1:]:
        if not _alike(found[0][1], other):
            raise InputError(f"{found[0][0]} and {name} tell of different texts")
    return found[0][1]


def _continuing(packing: Packing, shape: tuple[int, int]) -> Documents:
    """Return the texts of one row that each continue a row of a cache."""
    B = shape[0]
    lengths, keys = packing.get("cu_seq_lens_q"), packing.get("cu_seq_lens_k")
    if lengths is None or packing.get("seq_idx") is not None or B > 1:
        raise InputError(
            "texts that continue a cache are told of by cu_seq_lens_q alone, which has to say how "
            f"many tokens each of its rows is given in one row of input; there are {B}"
        )
    if keys is not None and not torch.equal(keys, lengths):
        raise InputError(
            "cu_seq_lens_k has to be cu_seq_lens_q again: where texts continue a cache, it knows "
            "how many keys they have there"
        )
    index = _numbers(lengths, "q", packing.get("max_length_q"), shape)
    return Documents(index, tuple(lengths.diff().tolist()))


def _numbers(
    lengths: Tensor, side: str, most: int | Tensor | None, shape: tuple[int, int]
) -> Tensor:
    """Return the index of each token's text, (B, T)."""
    B, T = shape
    if not recorded():
        _check_lengths(lengths, side, most, B * T)
    places = torch.arange(B * T, dtype=lengths.dtype, device=lengths.device)
    return torch.searchsorted(lengths[1:], places, right=True).view(B, T)


def _check_lengths(lengths: Tensor, side: str, most: int | Tensor | None, N: int) -> None:
    ends = lengths.tolist() if isinstance(lengths, Tensor) and lengths.ndim == 1 else []
    sizes = [after - before for before, after in pairwise(ends)]
    if not sizes or ends[0] != 0 or ends[-1] != N or min(sizes) < 0:
        raise InputError(
            f"cu_seq_lens_{side}={ends or lengths} has to be a tensor of where each text begins, "
            f"from 0 to the {N} tokens there are"
        )
    if most is not None and int(most) < max(sizes):
        raise InputError(f"max_length_{side}={int(most)}, and a text has {max(sizes)}")


def _alike(one: Documents | None, other: Documents | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.lengths == other.lengths

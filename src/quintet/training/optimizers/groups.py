"""Parameter groups."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import get_args

from torch import nn

from quintet.errors import ConfigError, shown
from quintet.modeling.base import PreTrainedModel
from quintet.training.optimizers.roles import Member, members
from quintet.training.optimizers.settings import GroupSettings, Kind, OptimizerSettings, Role

ROLES: tuple[str, ...] = get_args(Role)


@dataclass(slots=True)
class Group:
    """Parameters that are moved alike.

    Attributes:
        name: what the group is called in a log.
        kind: who moves them.
        learning_rate: what the schedule is multiplied by.
        weight_decay: λ of w -= ηλw.
        matrices: of how many matrices, one above the other, each of them is made.
        members: the parameters.
    """

    name: str
    kind: Kind
    learning_rate: float
    weight_decay: float
    matrices: int
    members: list[Member] = field(default_factory=list)


def grouped(
    model: PreTrainedModel, settings: OptimizerSettings, whole: nn.Module | None = None
) -> list[Group]:
    """Put each parameter to train into one group; freeze those to freeze.

    Where other processes have other layers, the groups are those of the whole model in all of them,
    some of them without a parameter here.

    Args:
        model: the model, or some of its layers.
        settings: the settings.
        whole: in that case, all of it, without memory.

    Raises:
        ConfigError: a pattern matches no parameter, a group asks for what cannot be done with its
            parameters, or nothing is left to be trained.
    """
    if isinstance(whole, PreTrainedModel):
        return _local(grouped(whole, settings), model)
    found: dict[tuple[object, ...], Group] = {}
    matched: set[str] = set()
    for member in list(members(model, by_head=settings.by_head)):
        own = _settings_of(member, settings.groups, matched)
        if own is not None and own.frozen:
            member.parameter.requires_grad_(False)
            continue
        group = _group_of(member, settings, own)
        key = (group.kind, group.learning_rate, group.weight_decay, group.matrices)
        found.setdefault(key, group).members.append(member)
    _all_matched(model, settings.groups, matched)
    if not found:
        raise ConfigError(
            "no parameter of the model is trained: all are frozen; "
            "take frozen = true from a group, or load the model without its adapters"
        )
    return _named(list(found.values()))


def _local(groups: list[Group], model: PreTrainedModel) -> list[Group]:
    """Return the groups of a whole model with those parameters that a part of it has."""
    own = dict(model.named_parameters())
    trained = {member.name for group in groups for member in group.members}
    for name in own.keys() - trained:
        own[name].requires_grad_(False)
    for group in groups:
        group.members = [
            replace(member, parameter=own[member.name])
            for member in group.members
            if member.name in own and own[member.name].requires_grad
        ]
    return groups


def _named(groups: list[Group]) -> list[Group]:
    """Name each group uniquely by its optimizer and contents."""
    names: list[str] = []
    for group in groups:
        holds = ", ".join(dict.fromkeys(m.role for m in group.members))
        name = f"{group.kind}: {holds}" + (f" of {group.matrices}" if group.matrices > 1 else "")
        same = names.count(name)
        names.append(name)
        group.name = f"{name} ({same + 1})" if same else name
    return groups


def _settings_of(
    member: Member, groups: Iterable[GroupSettings], matched: set[str]
) -> GroupSettings | None:
    own = None
    for group in groups:
        for pattern in group.match:
            if pattern == member.role or fnmatchcase(member.name, pattern):
                matched.add(pattern)
                own = own or group
    return own


def _group_of(member: Member, settings: OptimizerSettings, own: GroupSettings | None) -> Group:
    kind: Kind = settings.kind if member.role == "matrix" else "adamw"
    if own is not None and own.kind is not None:
        kind = own.kind
    is_separate = kind == "adamw" and settings.kind == "muon"
    rate = settings.adamw_learning_rate if is_separate else None
    rate = settings.learning_rate if rate is None else rate
    decay = 0.0 if member.role in settings.undecayed else settings.weight_decay
    matrices = member.matrices
    if own is not None:
        rate *= own.learning_rate
        decay = decay if own.weight_decay is None else own.weight_decay
        matrices = own.matrices or matrices
    if kind == "muon":
        _are_matrices(member, matrices)
    elif own is not None and own.matrices is not None:
        raise ConfigError(
            f"matrices={own.matrices} is for Muon, and {member.name} is moved by AdamW; "
            'take it out, or give its group kind = "muon"'
        )
    return Group("", kind, rate, decay, matrices if kind == "muon" else 1)


def _are_matrices(member: Member, matrices: int) -> None:
    shape = tuple(member.parameter.shape)
    if len(shape) < 2:
        raise ConfigError(
            f'{member.name} of shape {shape} is no matrix, and kind="muon" is for matrices; '
            'give its group kind = "adamw"'
        )
    if shape[-2] % matrices:
        raise ConfigError(
            f"matrices={matrices} does not divide the {shape[-2]} rows of {member.name}; "
            "write a number that does"
        )


def _all_matched(
    model: PreTrainedModel, groups: Iterable[GroupSettings], matched: set[str]
) -> None:
    for pattern in (pattern for group in groups for pattern in group.match):
        if pattern in matched:
            continue
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        near = difflib.get_close_matches(pattern, [*ROLES, *names], 1, cutoff=0.3)
        raise ConfigError(
            f"groups: match={shown(pattern)} matches no parameter that is trained; write one of "
            f"the roles {', '.join(ROLES)}, or a pattern of names"
            + (f" as {near[0]!r}" if near else "")
        )


def table(groups: Iterable[Group]) -> str:
    """Describe the groups, one a line."""
    rows = [("", "learning rate", "decay", "tensors", "numbers"), *_rows(groups)]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    )


def _rows(groups: Iterable[Group]) -> Iterator[tuple[str, str, str, str, str]]:
    for group in groups:
        yield (
            group.name,
            f"{group.learning_rate:g}",
            f"{group.weight_decay:g}",
            str(len(group.members)),
            f"{sum(m.parameter.numel() for m in group.members):,}",
        )

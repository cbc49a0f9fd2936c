"""Processes that generate one text together: all get the same arguments, and one decides.

What is chosen of logits must be the same in all, or their forwards part. The same seed in all is
no promise of it: sums differ in their last digits, and what is drawn elsewhere moves a generator.
So the first process of a model decides, and the others are told.
"""

import ctypes
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quintet import errors
from quintet.errors import DisagreementError, QuintetError, RankFailedError, listed, shown
from quintet.parallel.interrupts import Interrupts
from quintet.parallel.posts import Posts
from quintet.parallel.shared_buffer import shared_buffer_of
from quintet.parallel.world import World

# What a step decides fits into so many numbers, and goes in one message with what it says of them.
SMALL = 256
HEAD = 8
DECIDED, FAILED, INTERRUPTED = range(3)
# Of an error's message, and of what one process was given.
LETTERS, BRIEF = 4000, 120


@dataclass(slots=True)
class Agreement:
    """Messages among a model's processes besides those of its layers.

    Attributes:
        group: the processes.
        rank: which of them this is.
        ranks: what each is called in the whole world.
        ended: whether what the deciding process raised was told, and is raised in all.
    """

    group: dist.ProcessGroup
    rank: int
    ranks: list[int]
    ended: bool = field(default=False, init=False)
    _interrupts: Interrupts = field(default_factory=Interrupts, init=False)
    _posts: Posts | None = field(default=None, init=False)

    @classmethod
    def of(cls, world: World | None) -> "Agreement | None":
        """Return the agreement of a model's processes; None if one process has all of it."""
        group = None if world is None else world.groups.get("model")
        if group is None:
            return None
        return cls(group, dist.get_rank(group), dist.get_process_group_ranks(group))

    @property
    def decides(self) -> bool:
        """Whether this process decides, and the others follow."""
        return self.rank == 0

    # -- deciding ------------------------------------------------------------------------------

    def decided(self, decide: Callable[[], Tensor], device: torch.device | None = None) -> Tensor:
        """Return the deciding process's result, integers of any shape, in all processes.

        Args:
            decide: makes it; called in that process alone.
            device: where the others want it.

        Raises:
            QuintetError: what it raised there, where it is one of ours; a `RankFailedError` in the
                others otherwise.
        """
        if not self.decides:
            return self._receive_decision(device)
        try:
            if self._interrupts.take():
                raise KeyboardInterrupt
            decision = decide()
        except RankFailedError:
            # It ran something that all ran, and all know.
            self.ended = True
            raise
        except BaseException as error:
            self._fail(error)
            raise
        self._send_decision(DECIDED, decision)
        return decision

    def broadcast(self, x: Tensor) -> Tensor:
        """Return the deciding process's x in all, which have one of the same shape and dtype."""
        on_host = x.cpu().contiguous()
        self._pass_on(on_host)
        return x if self.decides else on_host.to(x.device)

    def _pass_on(self, x: Tensor) -> None:
        """Copy x from the deciding process to all, in place."""
        if self._posts is not None:
            self._posts.pass_on(x)
            return
        shared_buffer = shared_buffer_of(self.group)
        if shared_buffer is not None and not self.decides:
            x.zero_()
        if shared_buffer is None or not shared_buffer.sum(x):
            dist.broadcast(x, self.ranks[0], group=self.group)

    def _send_decision(self, status: int, decision: Tensor) -> None:
        flat = decision.detach().to("cpu", torch.int64).flatten()
        message = torch.zeros(SMALL, dtype=torch.int64, device="cpu")
        head = [status, decision.ndim, *decision.shape]
        assert len(head) <= HEAD, "what is decided has too many dimensions"
        message[: len(head)] = torch.tensor(head, dtype=torch.int64, device="cpu")
        fits = len(flat) <= SMALL - HEAD
        if fits:
            message[HEAD : HEAD + len(flat)] = flat
        self._pass_on(message)
        if not fits:
            self._pass_on(flat.contiguous())

    def _receive_decision(self, device: torch.device | None) -> Tensor:
        message = torch.empty(SMALL, dtype=torch.int64, device="cpu")
        self._pass_on(message)
        status, ndim, *sizes = message[:HEAD].tolist()
        shape = torch.Size(sizes[:ndim])
        count = shape.numel()
        if count <= SMALL - HEAD:
            flat = message[HEAD : HEAD + count]
        else:
            flat = torch.empty(count, dtype=torch.int64, device="cpu")
            self._pass_on(flat)
        self.ended = status != DECIDED
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        if status == FAILED:
            raise self._raised(bytes(flat.tolist()))
        return flat.view(shape).to(device) if device is not None else flat.view(shape)

    def _fail(self, error: BaseException) -> None:
        """Report to the others why no decision follows."""
        self.ended = True
        if isinstance(error, KeyboardInterrupt):
            self._send_decision(INTERRUPTED, torch.zeros(0, dtype=torch.int64, device="cpu"))
            return
        # Of what is derived from one of ours, that is what the others can make.
        ours = [kind.__name__ for kind in type(error).__mro__ if kind.__name__ in errors.__all__]
        report = {"ours": ours[:1], "kind": type(error).__name__, "says": str(error)[:LETTERS]}
        text = list(json.dumps(report).encode())
        self._send_decision(FAILED, torch.tensor(text, dtype=torch.int64, device="cpu"))

    def _raised(self, message: bytes) -> Exception:
        error = json.loads(message)
        for name in error["ours"]:
            kind = vars(errors)[name]
            if issubclass(kind, QuintetError) and "__init__" not in vars(kind):
                return kind(str(error["says"]))  # type: ignore[no-any-return]
        return RankFailedError(self.ranks[0], f"raised {error['kind']}: {error['says']}")

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Let the deciding process run ahead inside; the others get its messages when they ask."""
        self._posts = posts = Posts(self.group)
        try:
            yield
        finally:
            self._posts = None
            posts.wait_all()

    # -- being asked alike ---------------------------------------------------------------------

    def check_same(self, given: Mapping[str, object]) -> None:
        """Check that all processes were given the same, by one small message.

        Args:
            given: what each was given, by the same names in all; tensors are compared number by
                number, objects by their class and what they say of themselves.

        Raises:
            DisagreementError: they were not.
        """
        own = torch.tensor(
            [_digest(value) for value in given.values()], dtype=torch.int64, device="cpu"
        )
        of_all = [torch.empty_like(own) for _ in self.ranks]
        dist.all_gather(of_all, own, group=self.group)
        differs = (torch.stack(of_all) != of_all[0]).any(dim=0).tolist()
        names = [name for name, other in zip(given, differs, strict=True) if other]
        if names:
            given_by_ranks = self._of_all(_briefly({name: given[name] for name in names}))
            raise DisagreementError(_difference(self.ranks, given_by_ranks, names))

    def _of_all(self, own: dict[str, str]) -> list[dict[str, str]]:
        """Return a small table of every process."""
        text = json.dumps(own).encode()[: 1 << 20]
        sizes = [torch.empty(1, dtype=torch.int64, device="cpu") for _ in self.ranks]
        size = torch.tensor([len(text)], dtype=torch.int64, device="cpu")
        dist.all_gather(sizes, size, group=self.group)
        room = int(max(sizes))
        padded = torch.tensor(list(text.ljust(room)), dtype=torch.uint8, device="cpu")
        texts = [torch.empty_like(padded) for _ in self.ranks]
        dist.all_gather(texts, padded, group=self.group)
        return [json.loads(bytes(text.tolist())) for text in texts]

    # -- being interrupted ---------------------------------------------------------------------

    @contextmanager
    def agreed_interrupts(self) -> Iterator[None]:
        """Let Ctrl-C end all processes at the same step: the deciding one notes it, others wait.

        A second one ends this process at once.
        """
        with self._interrupts.noted(again=self.decides):
            yield


def _digest(value: object) -> int:
    """Return a 63-bit digest, by which two processes compare values."""
    hashed = hashlib.blake2b(digest_size=8)
    _feed(hashed.update, value)
    return int.from_bytes(hashed.digest()) >> 1


def _feed(update: Callable[[bytes], None], value: object) -> None:
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        update(ctypes.string_at(plain.data_ptr(), plain.nbytes) if plain.numel() else b"")
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            update(str(key).encode())
            _feed(update, value[key])
    elif isinstance(value, list | tuple | set | frozenset):
        update(f"{type(value).__name__}{len(value)}".encode())
        items: Any = value if isinstance(value, list | tuple) else sorted(value, key=repr)
        for item in items:
            _feed(update, item)
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        update(repr(value).encode())
    else:
        kind = type(value)
        update(f"{kind.__module__}.{kind.__qualname__}".encode())
        fields = _fields_of(value)
        if fields is not None:
            _feed(update, fields)


def _fields_of(value: object) -> Mapping[str, object] | None:
    """Return the fields of a config, or None if it has none."""
    kinds = (vars(kind) for kind in type(value).__mro__)
    to_dict: Any = next((kind["to_dict"] for kind in kinds if "to_dict" in kind), None)
    fields = to_dict(value) if callable(to_dict) else None
    return fields if isinstance(fields, Mapping) else None


def _briefly(given: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Describe each value in a few words, the items of tables by themselves."""
    found: dict[str, str] = {}
    for name, value in given.items():
        items = value if isinstance(value, Mapping) else _fields_of(value)
        if isinstance(value, Tensor):
            sizes = "×".join(map(str, value.shape))
            found[prefix + name] = f"{sizes} {value.dtype} ({_digest(value):x})"[:BRIEF]
        elif items is not None and not prefix:
            found |= _briefly({str(key): item for key, item in items.items()}, f"{name}.")
        else:
            found[prefix + name] = shown(value)[:BRIEF]
    return found


def _difference(
    ranks: Sequence[int], given_by_ranks: Sequence[Mapping[str, str]], names: Sequence[str]
) -> str:
    """Describe the arguments in which processes differ from the first."""
    differences = []
    for rank, own in zip(ranks[1:], given_by_ranks[1:], strict=True):
        keys = [
            key
            for key in {**given_by_ranks[0], **own}
            if own.get(key) != given_by_ranks[0].get(key)
        ]
        if keys:
            parts = [
                f"{key} is {own.get(key, 'not given')}, and "
                f"{given_by_ranks[0].get(key, 'not given')} in rank {ranks[0]}"
                for key in keys[:3]
            ]
            differences.append(f"in rank {rank}, " + "; ".join(parts))
    description = "; ".join(differences[:4]) or listed(list(names))
    return (
        f"the processes of a model have to be asked alike: {description}. Give all the same, as by "
        "reading it in one and sending it to the others (torch.distributed.broadcast)"
    )

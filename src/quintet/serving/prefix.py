"""What was read before, to be gone on from: a tree of copies, found by comparing tokens.

A node holds what a row held of some tokens; its children go on from there. Keys and values can be
cut anywhere, recurrent states not: with those, a text is gone on from where somebody kept a state.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

from quintet.serving.limits import GRID

__all__ = ["Content", "PrefixCache"]


class Content(Protocol):
    """A copy of what a row holds of its tokens from one to another."""

    @property
    def nbytes(self) -> int:
        """The bytes held."""
        ...

    @property
    def resumable(self) -> bool:
        """Whether a row can go on behind the last of these tokens."""
        ...

    def split(self, at: int) -> tuple[Self, Self]:
        """Return the content up to a token and from there on."""
        ...


C = TypeVar("C", bound=Content)


@dataclass(slots=True, eq=False)
class _Node(Generic[C]):
    """Some tokens behind others.

    Attributes:
        start: how many tokens there are before.
        ids: the tokens.
        content: what a row held of them; None in a root.
        parent: what comes before; None for a root.
        children: what follows, by its first token.
        used: when it was used last.
    """

    start: int
    ids: tuple[int, ...]
    content: C | None
    parent: "_Node[C] | None"
    children: "dict[int, _Node[C]]" = field(default_factory=dict)
    used: int = 0

    @property
    def stop(self) -> int:
        """How many tokens there are with its own."""
        return self.start + len(self.ids)

    @property
    def whole(self) -> C:
        """What a row held of the tokens."""
        assert self.content is not None
        return self.content


class PrefixCache(Generic[C]):
    """Copies of what rows held, within a number of bytes; the ones used least lately go.

    Args:
        nbytes: how much to keep.
        divisible: whether content can be gone on from anywhere, as keys and values can.
        grid: where it can, it is at a multiple of it, so that the rest of a prompt is cut as the
            whole was.
    """

    def __init__(self, nbytes: int, *, divisible: bool, grid: int = GRID) -> None:
        self.limit, self.divisible, self.grid = nbytes, divisible, grid
        self._roots: dict[str, _Node[C]] = {}
        self._bytes: dict[str, int] = {}
        self._clock = 0
        # How often something went for want of room.
        self.evicted = 0

    @property
    def nbytes(self) -> int:
        """The bytes held."""
        return sum(self._bytes.values())

    def match(self, scope: str, ids: Sequence[int]) -> tuple[list[C], int]:
        """Return what is kept of the beginning of a text, and of how many tokens that is.

        At least one token is left to be run over.
        """
        path, reached = self._walk(scope, ids[:-1])
        if self.divisible:
            length = reached - reached % self.grid
            path = [node for node in path if node.start < length]
        else:
            while path and not (path[-1].stop <= reached and path[-1].whole.resumable):
                path.pop()
            length = path[-1].stop if path else 0
        contents = [node.whole for node in path]
        if path and length < path[-1].stop:
            contents[-1] = contents[-1].split(length)[0]
        for node in path:
            self._touch(node)
        return contents, length

    def keep(self, scope: str, ids: Sequence[int], extract: Callable[[int, int], C]) -> None:
        """Keep what a row holds of a text.

        Args:
            scope: who may go on from it.
            ids: the tokens that the row holds.
            extract: copies what it holds of them, from one to another.
        """
        if not ids or not self.limit:
            return
        root = self._roots.setdefault(scope, _Node(0, (), None, None))
        path, reached = self._walk(scope, ids)
        last = path[-1] if path else root
        if reached < last.stop:
            last = self._split(scope, last, reached)
        if reached < len(ids):
            content = extract(reached, len(ids))
            node = _Node(reached, tuple(ids[reached:]), content, last)
            last.children[ids[reached]] = node
            self._count(scope, content.nbytes)
            last = node
        elif not last.whole.resumable:
            # The tokens are here, and what makes them one to go on from is not.
            content = extract(last.start, last.stop)
            self._count(scope, content.nbytes - last.whole.nbytes)
            last.content = content
        for node in (*path, last):
            self._touch(node)
        self._evict()

    def clear(self, scope: str | None = None) -> None:
        """Forget all of a scope, or everything."""
        for one in [scope] if scope is not None else list(self._roots):
            self._roots.pop(one, None)
            self._bytes.pop(one, None)

    # -- within ------------------------------------------------------------------------------------

    def _walk(self, scope: str, ids: Sequence[int]) -> tuple[list[_Node[C]], int]:
        """Return the nodes that a text runs through, and how many of its tokens they hold."""
        node, path, reached = self._roots.get(scope), [], 0
        while node is not None and reached < len(ids):
            node = node.children.get(ids[reached])
            if node is None:
                break
            path.append(node)
            end = min(node.stop, len(ids))
            own, given = node.ids[: end - reached], ids[reached:end]
            same = next(
                (n for n, (a, b) in enumerate(zip(own, given, strict=True)) if a != b), len(own)
            )
            reached += same
            if reached < node.stop:
                break
        return path, reached

    def _split(self, scope: str, node: _Node[C], at: int) -> _Node[C]:
        """Cut a node in two, and return the first."""
        assert node.parent is not None
        before, (head, tail) = node.whole.nbytes, node.whole.split(at)
        first = _Node(node.start, node.ids[: at - node.start], head, node.parent, used=node.used)
        node.parent.children[node.ids[0]] = first
        node.start, node.ids = at, node.ids[at - node.start :]
        node.content, node.parent = tail, first
        first.children[node.ids[0]] = node
        self._count(scope, head.nbytes + tail.nbytes - before)
        return first

    def _touch(self, node: _Node[C]) -> None:
        self._clock += 1
        node.used = self._clock

    def _count(self, scope: str, nbytes: int) -> None:
        self._bytes[scope] = self._bytes.get(scope, 0) + nbytes

    def _evict(self) -> None:
        while self.nbytes > self.limit:
            # A few hundred nodes at the most: what one holds takes milliseconds to compute.
            scopes = [scope for scope, held in self._bytes.items() if held]
            # Whoever has more than half, of several, is the first to lose.
            rich = [one for one in scopes if len(scopes) > 1 and self._bytes[one] > self.limit / 2]
            leaves = [
                (leaf.used, scope, leaf)
                for scope in rich or scopes
                for leaf in _leaves(self._roots[scope])
            ]
            _, scope, leaf = min(leaves, key=lambda one: one[0])
            assert leaf.parent is not None
            del leaf.parent.children[leaf.ids[0]]
            self._count(scope, -leaf.whole.nbytes)
            self.evicted += 1


def _leaves(root: _Node[C]) -> Iterator[_Node[C]]:
    """Return what nothing follows."""
    nodes = list(root.children.values())
    while nodes:
        node = nodes.pop()
        if node.children:
            nodes += node.children.values()
        else:
            yield node

"""The prefix cache: a tree of row contents, found by comparing tokens.

A node holds what a row held of some tokens; its children go on from there. Keys and values can be
cut anywhere, recurrent states not: with those, a text is gone on from where somebody kept a state.
A scope has a tree for each adapter, as what one made of tokens is nothing to another.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

from quintet.serving.limits import GRID


class CachedContent(Protocol):
    """A copy of a row's content for a range of tokens."""

    @property
    def nbytes(self) -> int:
        """The bytes held."""
        ...

    @property
    def resumable(self) -> bool:
        """Whether a row can continue behind these tokens."""
        ...

    def split(self, at: int) -> tuple[Self, Self]:
        """Split the content at a token."""
        ...

    def without_states(self) -> Self:
        """Return the content without recurrent states."""
        ...


C = TypeVar("C", bound=CachedContent)


@dataclass(slots=True, eq=False)
class _Node(Generic[C]):
    """A run of tokens behind its parent's.

    Attributes:
        start: how many tokens there are before.
        ids: the tokens.
        content: what a row held of them; None in a root.
        parent: what comes before; None for a root.
        children: what follows, by its first token.
        used: when it was used last.
        resumed: when somebody went on from its end last, or it was kept for that.
    """

    start: int
    ids: tuple[int, ...]
    content: C | None
    parent: "_Node[C] | None"
    children: "dict[int, _Node[C]]" = field(default_factory=dict)
    used: int = 0
    resumed: int = 0

    @property
    def stop(self) -> int:
        """The number of tokens including its own."""
        return self.start + len(self.ids)

    @property
    def whole(self) -> C:
        """The content of its tokens."""
        assert self.content is not None
        return self.content


class PrefixCache(Generic[C]):
    """Row contents within a number of bytes; least recently used ones are evicted.

    While several scopes have something here, one that has more than half is the first to lose.

    Args:
        nbytes: how much to keep.
        divisible: whether content can be gone on from anywhere, as keys and values can.
        grid: where it can, it is at a multiple of it, so that the rest of a prompt is cut as the
            whole was.
        tail: there, more than so many tokens are left to be run over.

    Attributes:
        evicted: how often something went for want of room.
    """

    def __init__(self, nbytes: int, *, divisible: bool, grid: int = GRID, tail: int = 0) -> None:
        self.limit, self.divisible, self.grid, self.tail = nbytes, divisible, grid, tail
        self._roots: dict[str, dict[str, _Node[C]]] = {}
        self._bytes: dict[str, int] = {}
        self._clock = 0
        self.evicted = 0

    @property
    def nbytes(self) -> int:
        """The bytes held."""
        return sum(self._bytes.values())

    def usable(self, length: int, tokens: int) -> int:
        """Return the number of the first `length` tokens that can be reused.

        It is on the grid, with enough left to be run over.
        """
        length = min(length, tokens - 1)
        length -= length % self.grid
        return length - self.grid if 0 < tokens - length <= self.tail and length else length

    def match(self, scope: str, ids: Sequence[int], adapter: str = "") -> tuple[list[C], int, int]:
        """Return the cached content for the beginning of a text.

        At least one token is left to be run over.

        Returns:
            The contents, of how many tokens these are, and how many of the text's were found: more
            where recurrent states are missing.
        """
        path, length, reached = self._usable(scope, ids, adapter)
        contents = [node.whole for node in path]
        if path and length < path[-1].stop:
            contents[-1] = contents[-1].split(length)[0]
        for node in path:
            self._touch(node)
        if path:
            path[-1].resumed = self._clock
        return contents, length, reached

    def length(self, scope: str, ids: Sequence[int], adapter: str = "") -> int:
        """Return the number of tokens `match` would reuse, without counting as a use."""
        return self._usable(scope, ids, adapter)[1]

    def keep(
        self,
        scope: str,
        ids: Sequence[int],
        extract: Callable[[int, int], C],
        adapter: str = "",
    ) -> None:
        """Store a row's content.

        Args:
            scope: who may go on from it.
            ids: the tokens that the row holds.
            extract: copies what it holds of them, from one to another.
            adapter: what they were made with.
        """
        if not ids or not self.limit:
            return
        path, reached = self._walk(scope, ids, adapter)
        roots = self._roots.setdefault(scope, {})
        last = path[-1] if path else roots.setdefault(adapter, _Node(0, (), None, None))
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
        last.resumed = self._clock
        self._evict()

    def clear(self, scope: str | None = None) -> None:
        """Clear a scope, or everything."""
        for one in [scope] if scope is not None else list(self._roots):
            self._roots.pop(one, None)
            self._bytes.pop(one, None)

    # -- within ------------------------------------------------------------------------------------

    def _usable(
        self, scope: str, ids: Sequence[int], adapter: str
    ) -> tuple[list[_Node[C]], int, int]:
        """Return the nodes to reuse, their number of tokens, and the number found."""
        path, reached = self._walk(scope, ids[:-1], adapter)
        if self.divisible:
            length = self.usable(reached, len(ids))
            return [node for node in path if node.start < length], length, reached
        while path and not (path[-1].stop <= reached and path[-1].whole.resumable):
            path.pop()
        return path, path[-1].stop if path else 0, reached

    def _walk(self, scope: str, ids: Sequence[int], adapter: str) -> tuple[list[_Node[C]], int]:
        """Return the nodes along a text, and the number of its tokens that they hold."""
        node, path, reached = self._roots.get(scope, {}).get(adapter), [], 0
        while node is not None and reached < len(ids):
            node = node.children.get(ids[reached])
            if node is None:
                break
            path.append(node)
            end = min(node.stop, len(ids))
            reached += common(node.ids, tuple(ids[reached:end]))
            if reached < node.stop:
                break
        return path, reached

    def _split(self, scope: str, node: _Node[C], at: int) -> _Node[C]:
        """Split a node in two, and return the first."""
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
            scopes = [scope for scope, nbytes in self._bytes.items() if nbytes]
            rich = [one for one in scopes if len(scopes) > 1 and self._bytes[one] > self.limit / 2]
            nodes = [
                (node.resumed if node.children else node.used, scope, node)
                for scope in rich or scopes
                for root in self._roots[scope].values()
                for node in _below(root)
                # Between others, tokens are needed, and only the states behind them are not.
                if not node.children or (not self.divisible and node.whole.resumable)
            ]
            _, scope, node = min(nodes, key=lambda one: one[0])
            self.evicted += 1
            if node.children:
                bare = node.whole.without_states()
                self._count(scope, bare.nbytes - node.whole.nbytes)
                node.content = bare
                continue
            while node.parent is not None and not node.children:
                del node.parent.children[node.ids[0]]
                self._count(scope, -node.whole.nbytes)
                node = node.parent
                if node.content is not None and (self.divisible or node.whole.resumable):
                    break


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two texts."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _below(root: _Node[C]) -> Iterator[_Node[C]]:
    """Return all nodes but the root."""
    nodes = list(root.children.values())
    while nodes:
        node = nodes.pop()
        nodes += node.children.values()
        yield node

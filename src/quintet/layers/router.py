"""What every router is: affinities of experts, a choice, and the weights of those chosen."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from quintet.layers.plain import PlainModule
from quintet.sharding import WHOLE, Sharding


class Choices:
    """What was chosen in the first run of a layer, for those that recompute it.

    A second run may see other numbers than the first: a bias moved in between, or other kernels
    rounded otherwise. Chosen anew, tokens would go to other experts than those whose results the
    gradients are of.
    """

    def __init__(self, made: list[Tensor] | None = None) -> None:
        self._made: list[Tensor] = [] if made is None else made
        self._place = 0

    def settled(self, choose: Callable[[], Tensor]) -> Tensor:
        """Return the next choice of the first run, or choose if this is the first."""
        if self._place == len(self._made):
            self._made.append(choose())
        self._place += 1
        return self._made[self._place - 1]

    def again(self) -> "Choices":
        """Return the same for one more run, from its beginning."""
        return Choices(self._made)


class ExpertRouter(PlainModule, ABC):
    """Scores of E experts for each token, and the A that it is sent to.

    Attributes:
        num_experts: E; known also where the weight is in another process.
    """

    num_experts: int
    weight: nn.Parameter

    def forward(self, x: Tensor, choices: Choices | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits (N, E) of tokens (N, C), the weights (N, A), and whose these are."""
        logits = self.score(x)
        if choices is None:
            indices, weights = self.choose(logits)
            return logits, weights, indices
        scores = self.affinities(logits)
        indices = choices.settled(lambda: self.choice(scores))
        return logits, self.weigh(scores, indices).to(logits.dtype), indices

    def sharding(self) -> Sharding:
        """Cut nothing: each process chooses for all tokens, and all choose the same."""
        return Sharding(dict.fromkeys(self.state_dict(keep_vars=True), WHOLE))

    @property
    @abstractmethod
    def active(self) -> int:
        """A, how many experts a token is sent to."""

    @abstractmethod
    def score(self, x: Tensor) -> Tensor:
        """Return the logits (N, E) of tokens (N, C)."""

    @abstractmethod
    def affinities(self, logits: Tensor) -> Tensor:
        """Return the affinities (N, E) in float32, given the logits (N, E)."""

    @abstractmethod
    def choice(self, scores: Tensor) -> Tensor:
        """Return the experts (N, A), given the affinities (N, E); no gradient passes it."""

    @abstractmethod
    def weigh(self, scores: Tensor, indices: Tensor) -> Tensor:
        """Return the weights (N, A) of experts (N, A), given the affinities (N, E)."""

    @abstractmethod
    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts (N, A) and their weights at once, given the logits (N, E)."""

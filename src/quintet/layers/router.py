"""Base of the routers: scores of experts, a choice, and the weights of the chosen."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from quintet.layers.plain import PlainModule
from quintet.sharding import WHOLE, Sharding


class Choices:
    """The experts chosen in a layer's first run, for its recomputation.

    A second run may see other numbers than the first: a bias moved in between, or other kernels
    rounded otherwise. Chosen anew, tokens would go to other experts than those whose results the
    gradients are of.
    """

    def __init__(self, recorded: list[Tensor] | None = None) -> None:
        self._recorded: list[Tensor] = [] if recorded is None else recorded
        self._place = 0

    def replay(self, choose: Callable[[], Tensor]) -> Tensor:
        """Return the next recorded choice, or choose and record in the first run."""
        if self._place == len(self._recorded):
            self._recorded.append(choose())
        self._place += 1
        return self._recorded[self._place - 1]

    def again(self) -> "Choices":
        """Return the recorded choices from the beginning, for one more run."""
        return Choices(self._recorded)


class ExpertRouter(PlainModule, ABC):
    """Scores E experts for each token and chooses A of them.

    Attributes:
        num_experts: E; known also where the weight is in another process.
    """

    num_experts: int
    weight: nn.Parameter

    def forward(self, x: Tensor, choices: Choices | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (N, E), weights (N, A) and expert indices (N, A) of tokens (N, C)."""
        logits = self.score(x)
        if choices is None:
            indices, weights = self.choose(logits)
            return logits, weights, indices
        scores = self.affinities(logits)
        indices = choices.replay(lambda: self.choice(scores))
        return logits, self.weigh(scores, indices).to(logits.dtype), indices

    def sharding(self) -> Sharding:
        """Keep the router whole: every process routes all tokens, and alike."""
        return Sharding(dict.fromkeys(self.state_dict(keep_vars=True), WHOLE))

    @property
    @abstractmethod
    def active(self) -> int:
        """A, the number of experts per token."""

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

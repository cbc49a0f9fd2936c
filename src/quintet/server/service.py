"""The state shared by all routes."""

from dataclasses import dataclass, field
from typing import Protocol

from starlette.requests import Request

from quintet.server.registry import ModelRegistry
from quintet.server.score_budget import ScoreBudget
from quintet.server.settings import Settings


class Observer(Protocol):
    """Interface for observers of requests."""

    def answered(
        self, route: str, method: str, status: int, seconds: float, code: str | None
    ) -> None:
        """Called when a request ends, with the error code if it failed.

        499 is a client that went before, "client_gone", or did not read, "slow_reader".
        """
        ...


@dataclass(slots=True)
class Service:
    """The server as its routes see it; `request.app.state.server`.

    Attributes:
        settings: what it was told.
        registry: the models.
        observers: are told of every request.
        draining: new requests are refused, as it will end.
        under_way: how many requests are answered now.
        receiving: how many bytes are there of bodies that are not complete.
        scores: counts the scores of tokens that are kept until answers are whole.
    """

    settings: Settings
    registry: ModelRegistry
    observers: list[Observer] = field(default_factory=list)
    draining: bool = False
    under_way: int = 0
    receiving: int = 0
    scores: ScoreBudget = field(init=False)

    def __post_init__(self) -> None:
        self.scores = ScoreBudget(self.settings.scores)

    @property
    def healthy(self) -> bool:
        """Whether all models are healthy."""
        return self.registry.healthy and not self.stuck

    @property
    def stuck(self) -> bool:
        """Whether a step takes longer than allowed."""
        longest = self.settings.step
        return any(engine.turning > longest for engine in self.registry.engines.values())


def service_of(request: Request) -> Service:
    """Return a request's service."""
    service = request.app.state.server
    assert isinstance(service, Service)
    return service


def request_id_of(request: Request) -> str:
    """Return a request's id."""
    return str(request.state.request_id)


def caller_of(request: Request) -> str:
    """Return the caller, by key: the scope of fairness and prefix cache."""
    return str(request.state.caller)

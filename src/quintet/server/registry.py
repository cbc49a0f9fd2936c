"""The registry of served models, each with its engine."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from quintet.errors import DoesNotFitError, InputError, QuintetError, RankFailedError, shown
from quintet.parsing import Format
from quintet.server.failures import ApiError, unavailable
from quintet.server.logs import logged
from quintet.server.shapes import Shapes
from quintet.serving import Engine
from quintet.tokenization import PreTrainedTokenizer


@dataclass(frozen=True, slots=True)
class Loaded:
    """A loaded model.

    Attributes:
        engine: generates.
        tokenizer: reads prompts and writes answers.
        context: how many tokens prompt and answer may have.
        fingerprint: tells weights and formats apart that answer differently.
        calls: how the model writes calls of tools, where its template is not to say it.
        shapes: hold answers to a form.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizer
    context: int
    fingerprint: str
    calls: Format | None = None
    shapes: Shapes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", Shapes(self.engine.model, self.tokenizer, self.calls))


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model: its engine, tokenizer and limits.

    Attributes:
        name: as the request has it.
        engine: generates.
        tokenizer: reads prompts and writes answers.
        adapter: is put on the model for it; None for the model as it is.
        created: when the server began, in seconds.
        context: how many tokens prompt and answer may have.
        fingerprint: tells weights and formats apart that answer differently.
        shapes: hold answers to a form.
        calls: how the model writes calls of tools, where its template is not to say it.
    """

    name: str
    engine: Engine
    tokenizer: PreTrainedTokenizer
    adapter: str | None
    created: int
    context: int
    fingerprint: str
    shapes: Shapes
    calls: Format | None = None

    def admit(self) -> None:
        """Refuse a request early if it would not be admitted.

        Raises:
            ApiError: as many wait as may.
        """
        if self.engine.full:
            raise unavailable("too many requests wait already; try again", "queue_full")


@dataclass(frozen=True, slots=True)
class Listed:
    """A model's entry in the list of models.

    Attributes:
        name: of the model, or of an adapter.
        created: when the server began, in seconds.
        context: how many tokens prompt and answer may have; None while it is not loaded.
        parent: the model that an adapter is put on.
        loaded: whether it is in memory.
    """

    name: str
    created: int
    context: int | None
    parent: str | None
    loaded: bool


class Offer:
    """A model under a name, loaded or not.

    Args:
        name: what requests call it.
        load: brings it into memory; may take long.
        adapters: names under which it answers with an adapter.
        loaded: what `load` returned, where it was called already.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Loaded],
        adapters: Sequence[str] = (),
        loaded: Loaded | None = None,
    ) -> None:
        self.name, self.load, self.adapters, self.loaded = name, load, tuple(adapters), loaded
        self.context = None if loaded is None else loaded.context
        self.turn = asyncio.Lock()


class ModelRegistry:
    """Finds models by name.

    Args:
        offers: the models; the first is the one that counts where no name is given.
        clock: tells the time in seconds.

    Raises:
        InputError: no model, or a name twice.
    """

    def __init__(self, offers: Sequence[Offer], clock: Callable[[], float] = time.time) -> None:
        self.created = int(clock())
        self.offers = tuple(offers)
        self._names: dict[str, tuple[Offer, str | None]] = {}
        for offer in offers:
            for name, adapter in ((offer.name, None), *((one, one) for one in offer.adapters)):
                if name in self._names:
                    raise InputError(f"two models or adapters are named {shown(name)}; rename one")
                self._names[name] = (offer, adapter)
        if not offers:
            raise InputError("there is no model to serve; name one")

    async def get(self, name: str) -> ServedModel:
        """Return the model or adapter of a name, loading it if needed.

        Raises:
            ApiError: no such model (404), or it could not be brought back (500, 503).
        """
        offer, adapter = self._find(name)
        async with offer.turn:
            loaded = offer.loaded or await self._load(offer)
        return ServedModel(
            name,
            loaded.engine,
            loaded.tokenizer,
            adapter,
            self.created,
            loaded.context,
            loaded.fingerprint,
            loaded.shapes,
            loaded.calls,
        )

    def listed(self) -> list[Listed]:
        """Return all names, models first, in the given order."""
        return [self.describe(name) for name in self._names]

    def describe(self, name: str) -> Listed:
        """Return a name's entry in the list.

        Raises:
            ApiError: no such model (404).
        """
        offer, adapter = self._find(name)
        parent = None if adapter is None else offer.name
        return Listed(name, self.created, offer.context, parent, offer.loaded is not None)

    async def unload(self, name: str) -> None:
        """Unload an idle model; the next request loads it again.

        Raises:
            ApiError: no such model (404), or it is at work, or held by several processes (409).
        """
        offer, _ = self._find(name)
        async with offer.turn:
            loaded = offer.loaded
            if loaded is None:
                return
            if loaded.engine.model.world is not None:
                raise ApiError(
                    409,
                    f"the model {shown(name)} is held by several processes, which load it once; "
                    "end them all to free its memory",
                    code="model_divided",
                    param="model",
                )
            if loaded.engine.state.running or loaded.engine.state.waiting:
                raise ApiError(
                    409,
                    f"the model {shown(name)} is at work; unload it when it is idle",
                    code="model_busy",
                    param="model",
                )
            offer.loaded = None
            await asyncio.to_thread(loaded.engine.close)

    @property
    def engines(self) -> dict[str, Engine]:
        """The present engines by model name."""
        return {
            offer.name: offer.loaded.engine for offer in self.offers if offer.loaded is not None
        }

    @property
    def shapes(self) -> dict[str, Shapes]:
        """The compilers of answers' forms, by model name."""
        return {
            offer.name: offer.loaded.shapes for offer in self.offers if offer.loaded is not None
        }

    @property
    def healthy(self) -> bool:
        """Whether every engine is healthy."""
        return all(engine.healthy for engine in self.engines.values())

    @property
    def parted(self) -> RankFailedError | None:
        """The failed process of a sharded model, or None."""
        stopped = (engine.stopped for engine in self.engines.values())
        causes = (None if why is None else why.__cause__ for why in stopped)
        return next((one for one in causes if isinstance(one, RankFailedError)), None)

    def close(self) -> None:
        """Stop all engines."""
        for engine in self.engines.values():
            engine.close()

    async def _load(self, offer: Offer) -> Loaded:
        try:
            loaded = await asyncio.to_thread(offer.load)
        except (DoesNotFitError, MemoryError):
            raise
        except QuintetError as error:
            # It is of files of this machine, and of nothing that was asked.
            logged("not loaded", {"model": offer.name, "error": str(error)}, logging.ERROR)
            raise ApiError(
                500,
                f"the model {shown(offer.name)} could not be loaded; the log says why",
                "server_error",
                "model_not_loaded",
            ) from None
        offer.loaded, offer.context = loaded, loaded.context
        return loaded

    def _find(self, name: str) -> tuple[Offer, str | None]:
        found = self._names.get(name)
        if found is None:
            known = ", ".join(list(self._names)[:10])
            raise ApiError(
                404,
                f"there is no model {shown(name)} here; there are {known}",
                code="model_not_found",
                param="model",
            )
        return found

"""The banner of `quintet serve`: address, models, memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import quintet
from quintet.cli.output import size_of
from quintet.cli.together import several

if TYPE_CHECKING:
    from quintet.cli.options import Opened
    from quintet.server.service import Service
    from quintet.server.settings import Settings


def announcement(
    service: "Service", address: tuple[Any, ...], opened: "Sequence[Opened]"
) -> tuple[list[str], dict[str, object]]:
    """Return it as lines for people, and as facts for programs.

    Args:
        service: what is served.
        address: of the socket.
        opened: the models, in the order in which the service has them.
    """
    from quintet.kernels.native import native

    settings, kernels = service.settings, native()
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    url = f"http://{host}:{address[1]}"
    level = kernels.level or f"PyTorch alone, as {kernels.reason}"
    lines = [f"quintet {quintet.__version__} answers {_whom(settings)} at {url}/v1"]
    # Others have their part of that.
    where = " of the first process" if several() else ""
    models: list[dict[str, object]] = []
    for offer, one in zip(service.registry.offers, opened, strict=True):
        assert offer.loaded is not None
        room = offer.loaded.engine.room
        lines += [
            f"  {offer.name}: {one.describe()}",
            f"    {room.rows} rows of {room.capacity:,} tokens: at most {size_of(room.whole)}"
            f"{where} for {room.tokens:,} tokens, and {size_of(room.kept)} for what was read "
            "before",
        ]
        if offer.adapters:
            lines.append(f"    adapters: {', '.join(offer.adapters)}")
        models.append(
            {
                "name": offer.name,
                "what": one.describe(),
                "rows": room.rows,
                "capacity": room.capacity,
                "bytes": room.whole,
                "tokens": room.tokens,
                "kept": room.kept,
                "adapters": list(offer.adapters),
            }
        )
    lines.append(f"  kernels: {level}")
    if settings.page:
        lines.append(f"  a page to chat on: {url}/")
    lines.append("  Ctrl-C ends it")
    facts: dict[str, object] = {
        "version": quintet.__version__,
        "url": url,
        "answers": _whom(settings),
        "kernels": level,
        "models": models,
    }
    return lines, facts


def _whom(settings: "Settings") -> str:
    if settings.keys:
        return "who has the key" if len(settings.keys) == 1 else "who has a key"
    return "EVERYBODY on the network" if settings.is_open else "this machine"

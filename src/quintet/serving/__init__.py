"""A serving engine: many concurrent requests on one model, independent of protocols."""

from quintet.generation.following import accompany, follow, leading
from quintet.generation.observing import TokenLogprobs
from quintet.serving.answers import Answer, Usage
from quintet.serving.engine import Engine
from quintet.serving.figures import Distribution, Snapshot
from quintet.serving.limits import Limits
from quintet.serving.memory import Room, limits_for
from quintet.serving.options import RequestOptions

__all__ = [
    "Answer",
    "Distribution",
    "Engine",
    "Limits",
    "RequestOptions",
    "Room",
    "Snapshot",
    "TokenLogprobs",
    "Usage",
    "accompany",
    "follow",
    "leading",
    "limits_for",
]

"""Many readers, one model: who takes part in which step, without a protocol around it."""

from quintet.serving.engine import Answer, Engine, Usage
from quintet.serving.limits import Limits

__all__ = ["Answer", "Engine", "Limits", "Usage"]

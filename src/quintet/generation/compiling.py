"""Compiles the decode step, and caches the result between processes."""

import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch

from quintet.errors import InputError
from quintet.generation.config import GenerationConfig
from quintet.generation.decode import LanguageModel
from quintet.kernels.store import BuildError, open_folder
from quintet.layers.plain import in_between

__all__ = ["ROOM_STEP", "CompileConfig", "Programs", "compiled"]

# Each length of a preallocated cache is a program of its own, so there are few lengths.
ROOM_STEP = 256
FOLDER = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True)
class CompileConfig:
    """The arguments of `torch.compile`, with its defaults.

    Attributes:
        fullgraph: fail where the step is not one graph.
        dynamic: compile for any shape; None to do so when a second one is met.
        backend: the compiler's name, or a compiler.
        mode: such as "reduce-overhead", which captures the step in a graph of the device.
        options: of the backend; not together with a mode.
    """

    fullgraph: bool = False
    dynamic: bool | None = None
    backend: str | Callable[..., Any] = "inductor"
    mode: str | None = None
    options: dict[str, Any] | None = None


class Programs:
    """The compiled decode steps of one model, shared by all calls."""

    def __init__(self) -> None:
        self._compiled: list[tuple[CompileConfig, LanguageModel, tuple[object, ...]]] = []

    def of(self, model: object, config: GenerationConfig) -> LanguageModel | None:
        """Return the compiled model, or None if hooks were added since.

        Raises:
            InputError: `compile_config` is none.
        """
        how = CompileConfig() if config.compile_config is None else config.compile_config
        if not isinstance(how, CompileConfig):
            raise InputError(
                f"compile_config is a {type(how).__module__}.{type(how).__name__}; it has to be "
                "a quintet CompileConfig"
            )
        between = in_between(cast("torch.nn.Module", model))
        for known, program, traced in self._compiled:
            if known == how and traced == between:
                return program
            if known == how:
                # The compiler takes hooks for what never changes, and would not look again.
                warnings.warn(
                    "this model's hooks, or the forward of a class, changed since its step was "
                    "compiled: without effect, compile=True; the step runs as it is",
                    stacklevel=4,
                )
                return None
        self._compiled.append((how, compiled(cast("LanguageModel", model), how), between))
        return self._compiled[-1][1]


def compiled(model: LanguageModel, config: CompileConfig) -> LanguageModel:
    """Return the model with its forward compiled at the first call.

    What the compiler makes is kept in the user's cache, so that another process finds it; where
    `TORCHINDUCTOR_CACHE_DIR` says otherwise, there.
    """
    # Imported here: torch's compiler takes a second, and most never compile.
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch writes its own choice into the environment as soon as it looks.
    if os.environ.get(FOLDER, default_cache_dir()) == default_cache_dir():
        # Where the user's cache cannot be written, what torch chose can.
        with suppress(BuildError, OSError):
            folder = open_folder() / "inductor"
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                os.environ[FOLDER] = str(folder)
    program = torch.compile(
        cast("Callable[..., Any]", model),
        fullgraph=config.fullgraph,
        dynamic=config.dynamic,
        backend=config.backend,
        mode=config.mode,
        options=config.options,
    )
    return cast("LanguageModel", program)

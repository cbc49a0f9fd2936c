"""The state of a training besides weights and optimisers: counters and generators."""

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
import torch

from quintet.errors import CheckpointError, shown


@dataclass(slots=True)
class Counters:
    """The counters of a training.

    Attributes:
        step: how many steps were taken, those included that were left out.
        batches: how many batches of the data these read.
        tokens: how many tokens were read.
        seconds: how long the steps took.
        worked: how long the processor has worked for them, which is what minutes are counted in.
        skipped: how many steps in a row were left out last.
        best: the lowest score so far, or None.
    """

    step: int = 0
    batches: int = 0
    tokens: int = 0
    seconds: float = 0.0
    worked: float = 0.0
    skipped: int = 0
    best: float | None = None

    def plain(self) -> dict[str, Any]:
        """Return them as JSON has them."""
        return asdict(self)

    @classmethod
    def of(cls, values: object) -> Self:
        """Return counters that JSON had.

        Raises:
            CheckpointError: they are none.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            raise CheckpointError(f"{shown(values)} are not the counters of a training")
        for name, value in values.items():
            kinds = (int,) if name in ("step", "batches", "tokens", "skipped") else (int, float)
            if not (type(value) in kinds or (name == "best" and value is None)):
                raise CheckpointError(f"the counter {name} of a training is {shown(value)}")
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Randomness:
    """The states of the generators of PyTorch, Python and NumPy."""

    values: Mapping[str, Any]

    @classmethod
    def now(cls) -> Self:
        """Return the current states of the generators."""
        version, numbers, gauss = random.getstate()
        name, keys, place, has_gauss, cached = np.random.get_state()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(
            {
                "torch": torch.get_rng_state().numpy().tobytes().hex(),
                "cuda": [state.numpy().tobytes().hex() for state in cuda],
                "python": [version, list(numbers), gauss],
                "numpy": [name, np.asarray(keys).tolist(), place, has_gauss, cached],
            }
        )

    def restore(self) -> None:
        """Put the generators where they were.

        Raises:
            CheckpointError: these are no states of generators, or of other devices than there are.
        """
        try:
            version, numbers, gauss = self.values["python"]
            random.setstate((version, tuple(numbers), gauss))
            name, keys, *more = self.values["numpy"]
            np.random.set_state((name, np.array(keys, dtype=np.uint32), *more))
            torch.set_rng_state(_bytes(self.values["torch"]))
            if self.values["cuda"]:
                torch.cuda.set_rng_state_all([_bytes(text) for text in self.values["cuda"]])
        except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise CheckpointError(
                f"the states of the generators of random numbers cannot be taken over: {error}"
            ) from error


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

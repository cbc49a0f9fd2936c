"""The degrees of a training's division among processes, by axis."""

from dataclasses import dataclass, fields
from typing import Literal

from quintet.parallel.world import Degrees
from quintet.training.settings import SettingError

AXES = ("tp", "cp", "fsdp", "dp", "pp", "ep")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSettings:
    """The `[parallel]` table: the number of processes per axis; one may be "auto".

    The same training goes on with other numbers: nothing of what it learns follows from them but
    how sums are rounded.

    Attributes:
        fsdp: batches, and slices of all weights, which are gathered for a layer when it runs.
        dp: batches; there are as many copies of what fsdp leaves.
        tp: the matrices of layers.
        ep: experts, among the processes of tp, then of fsdp; no further factor.
        cp: the tokens of a sequence.
        pp: the layers; parts of a step (`[train] parts`) pass from one process to the next.
        sequence_parallel: whether norms and residuals between matrices that tp cuts are computed
            for a slice of the tokens by each process.
        timeout: the seconds that processes wait for each other before they give up.
    """

    fsdp: int | Literal["auto"] = "auto"
    dp: int | Literal["auto"] = 1
    tp: int | Literal["auto"] = 1
    ep: int = 1
    cp: int | Literal["auto"] = 1
    pp: int | Literal["auto"] = 1
    sequence_parallel: bool = False
    timeout: float = 300.0

    def __post_init__(self) -> None:
        automatic = [f.name for f in fields(self) if getattr(self, f.name) == "auto"]
        # What nobody asked for gives way to what somebody did.
        if len(automatic) == 2 and "fsdp" in automatic:
            object.__setattr__(self, "fsdp", 1)
        elif len(automatic) > 1:
            raise SettingError(
                "", f" {' and '.join(automatic)} cannot all be auto; one can, which takes the rest"
            )
        for name in AXES:
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise SettingError.value(name, value, "has to be a number of processes, 1 or more")
        if self.sequence_parallel and self.tp == 1:
            raise SettingError.value(
                "sequence_parallel", True, "divides tokens among the processes of tp; give tp, too"
            )
        if not self.timeout > 0:
            raise SettingError.value("timeout", self.timeout, "has to be above 0")

    def given(self) -> Degrees:
        """Return the degrees that are given."""
        given = {name: getattr(self, name) for name in AXES}
        return Degrees(**{name: 1 if n == "auto" else n for name, n in given.items()})

    def degrees(self, size: int) -> Degrees:
        """Return the degrees of `size` processes.

        Raises:
            SettingError: they are too many, or too few.
        """
        given = {name: getattr(self, name) for name in AXES}
        automatic = [name for name, value in given.items() if value == "auto"]
        taken = 1
        for name, value in given.items():
            if name != "ep" and value != "auto":
                taken *= value
        if size % taken or (not automatic and size != taken):
            product = " · ".join(f"{n}={v}" for n, v in given.items() if n != "ep" and v != 1)
            raise SettingError(
                "",
                f" {product} cannot be {size} processes; start {taken} of them, or a multiple "
                "where one axis is auto: torchrun --nproc-per-node "
                f"{taken} -m quintet train CONFIG",
            )
        return Degrees(**{**given, **dict.fromkeys(automatic, size // taken)})

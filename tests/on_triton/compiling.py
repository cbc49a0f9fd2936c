"""Compiles every kernel of the cases for GPUs that are not here.

    python -m on_triton.compiling 80 90 100

With `--once`, a kernel is compiled for one case alone of each type of its inputs. Writes a line of
JSON for each kernel: its name, the target, and the registers and shared memory that it takes. To be
run without `TRITON_INTERPRET`.
"""

import json
import sys
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from on_triton.cases import every_case

CPU = torch.device("cpu")


class Absent:
    """What Triton asks of a driver when it compiles, of a device that is not there."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(capability: int, *, once: bool = False) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what every kernel takes, by its name and what it was compiled for."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    seen: set[tuple[Any, ...]] = set()

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        first = next((x for x in args if isinstance(x, torch.Tensor)), None)
        kind = (self.__name__, None if first is None else first.dtype)
        if once and kind in seen:
            return
        seen.add(kind)
        made = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert made.asm["ptx"]
        shared = made.metadata.shared
        found[self.__name__, made.hash] = {
            "kernel": self.__name__,
            "sm": capability,
            "shared": shared,
        }

    run = JITFunction.run
    with patch.object(JITFunction, "run", compile_only):
        triton.runtime.driver.set_active(Absent(capability))
        with ExitStack() as taken, torch.no_grad():
            cases = every_case()
            for name, module in list(sys.modules.items()):
                if name.startswith("quintet.triton.") and "takes" in vars(module):
                    taken.enter_context(patch.object(module, "takes", return_value=True))
            for case in (one for one in cases if one.compiles):
                case.kernel(**case.inputs(CPU))
    return found


def main() -> None:
    """Compile for each target that is named."""
    once, capabilities = "--once" in sys.argv, [one for one in sys.argv[1:] if one != "--once"]
    for capability in map(int, capabilities):
        for one in compiled(capability, once=once).values():
            print(json.dumps(one))


if __name__ == "__main__":
    main()

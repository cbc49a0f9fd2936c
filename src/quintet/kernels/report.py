"""Reports which kernels this process uses, and why others are not."""

from dataclasses import dataclass

from quintet.kernels.allocator import keep_freed_memory
from quintet.kernels.native import find_recipe, native
from quintet.kernels.store import BuildError

# What there is, and when a model uses it.
KERNELS = {
    "attention": "softmax attention in bfloat16",
    "decode": "attention of up to 16 new tokens a row, in bfloat16 and float32",
    "gated": "MLPs and experts with SiLU of up to 16 tokens, weights as of linear maps",
    "grouped": "experts with SiLU of more tokens, in bfloat16",
    "latent": "DeepSeek's attention in the space of the latents, in bfloat16",
    "stack": "all layers for up to 64 tokens of any sequences in one call",
    "linear": "linear maps of up to 16 vectors at once (32 in float32)",
    "linear int8": "the same, weights in int8",
    "linear int4": "the same, weights in int4",
    "linear groups": "the same, weights in 4 and 8 bits with scales and offsets of groups",
    "product": "linear maps of more vectors, and the gates of MLPs with SiLU, in bfloat16",
    "rows": "RMSNorm, rotary embedding and SiLU gates in bfloat16 and float32",
    "sampling": "the penalty for tokens that occurred",
    "routing": "routers, in bfloat16 and float32",
    "blocks": "the blocks of GGUF files to numbers, and to groups with scales, as they are loaded",
    "widen": "weights of integers to bfloat16 or float32, for more vectors than that",
    "mamba2": "Zamba2's mixer between its projections, in bfloat16 and float32",
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """The report on one kernel.

    Attributes:
        name: what it computes.
        when: what it is used for.
        level: the instruction set it was compiled for; None where PyTorch computes instead.
        reason: why PyTorch does.
    """

    name: str
    when: str
    level: str | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """The report on all kernels and their library."""

    kernels: tuple[Kernel, ...]
    library: str | None
    keeps_memory: bool

    def __str__(self) -> str:
        lines = [f"library: {self.library or 'none'}"]
        kept = "kept, up to 256 MB" if self.keeps_memory else "handed back as the C library does"
        lines.append(f"freed memory: {kept}")
        for kernel in self.kernels:
            state = kernel.level or f"PyTorch, as {kernel.reason}"
            lines.append(f"{kernel.name}: {state} ({kernel.when})")
        return "\n".join(lines)


def report() -> Report:
    """Report on each kernel, compiling the library if needed."""
    found = native()
    kernels = (Kernel(name, when, found.level, found.reason) for name, when in KERNELS.items())
    library = None if found.library is None else found.library._name
    return Report(tuple(kernels), library, library is not None and keep_freed_memory())


def outlook() -> str:
    """Return one line on what this process computes with, without compiling."""
    try:
        recipe = find_recipe()
        made = recipe.made()
    except BuildError as error:
        return f"PyTorch alone, as {error}" + (f"; {error.remedy}" if error.remedy else "")
    return recipe.level if made else f"{recipe.level}, compiled at first use (half a minute, once)"

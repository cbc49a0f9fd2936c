"""Checks of `generate()` on a model sharded over processes."""

from collections.abc import Sequence

from torch import Tensor

from quintet.cache import Cache
from quintet.errors import InputError
from quintet.generation.arguments import Arguments
from quintet.generation.config import GenerationConfig
from quintet.generation.processors.base import LogitsProcessorList
from quintet.generation.processors.guidance import UnbatchedClassifierFreeGuidanceLogitsProcessor
from quintet.parallel.agree import Agreement


def check_alike(agreement: Agreement, given: Arguments, config: GenerationConfig) -> None:
    """Check that all processes were given the same arguments, and that models have one config.

    Raises:
        DisagreementError: they were not.
    """
    past = given.past_key_values
    cached: object = None
    if isinstance(past, Cache):
        cached = type(past).__name__, past.get_seq_length()
    elif past:
        cached = [tuple(x.shape) for layer in past for x in layer if isinstance(x, Tensor)]
    own = {"past_key_values": cached, "model.generation_config": config}
    agreement.check_same({**given.shared(), **own})


def check_together(config: GenerationConfig, *, agrees: bool, exchanges: bool) -> None:
    """Refuse options that a sharded model does not support.

    Args:
        config: the options.
        agrees: whether several processes have the same text.
        exchanges: whether experts are elsewhere, among processes with other texts.

    Raises:
        InputError: such an option is set.
    """
    reasons = {
        "compile": (
            config.compiles and (agrees or exchanges),
            "a compiled program cannot pass sums or tokens between processes",
        ),
        "output_attentions": (
            bool(config.output_attentions) and agrees,
            "each process weighs by its own heads, and nobody has all of them",
        ),
    }
    for name, (requested, why) in reasons.items():
        if requested:
            raise InputError(
                f"{name} cannot be used where several processes hold the model: {why}; leave it "
                "out, or load the model in one process"
            )


def running_the_model(processors: Sequence[object]) -> LogitsProcessorList:
    """Return the processors that call the model, which every process must run."""
    kind = UnbatchedClassifierFreeGuidanceLogitsProcessor
    return LogitsProcessorList(one for one in processors if isinstance(one, kind))

"""Every error Quintet raises on purpose.

    QuintetError
    ├── ConfigError              a configuration value breaks a rule
    ├── InputError               an argument of a call is not usable as given
    │   ├── ContextLengthError   more tokens than the model has positions for
    │   └── GrammarError         what a text is to follow cannot be followed
    ├── ModelNotFoundError       no such directory, repository, revision or file
    │   └── OfflineError         it may exist, but the network is off or unreachable
    ├── UnsupportedModelError    the model is of a family, or needs a feature, that is not here
    ├── CheckpointError          files that are incomplete, damaged, unsafe or of other shapes
    ├── DataError                a text to learn from that cannot be read or learned from
    ├── SaveError                writing failed; what was there before is untouched
    ├── TokenizerError           tokenizer files or a call of the tokenizer
    │   └── ChatTemplateError    a chat template is missing, invalid or refuses its input
    ├── UnsupportedBackendError  a kernel that cannot serve this request
    ├── DoesNotFitError          a model that is larger than the memory there is
    ├── DivergedError            a training whose numbers are not finite, step after step
    ├── ServingError             a request that was not answered to its end
    │   ├── QueueFullError       as many wait already as may
    │   ├── DeadlineError        its time was over
    │   ├── NonFiniteError       the model made numbers for it that are not finite
    │   ├── StepFailedError      a step of the model failed, for all that had a part in it
    │   └── EngineStoppedError   what generates was closed, or has failed
    ├── DistributedError         several processes that cannot begin, or go on, together
    │   ├── RankFailedError      one of them failed, was ended, or stands still
    │   └── DisagreementError    they were given different prompts, options or checkpoints
    └── MissingDependencyError   an optional package that is not installed

Each also inherits the built-in error a caller would expect, and carries the exit code with
which the command line ends (`docs/errors.md`).
"""

from typing import ClassVar

__all__ = [
    "ChatTemplateError",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "DataError",
    "DeadlineError",
    "DisagreementError",
    "DistributedError",
    "DivergedError",
    "DoesNotFitError",
    "EngineStoppedError",
    "GrammarError",
    "InputError",
    "MissingDependencyError",
    "ModelNotFoundError",
    "NonFiniteError",
    "OfflineError",
    "QueueFullError",
    "QuintetError",
    "RankFailedError",
    "SaveError",
    "ServingError",
    "StepFailedError",
    "TokenizerError",
    "UnsupportedBackendError",
    "UnsupportedModelError",
    "listed",
    "named",
    "shown",
]


class QuintetError(Exception):
    """Base of every error raised on purpose; its message names value, rule and remedy."""

    exit_code = 1


class ConfigError(QuintetError, ValueError):
    """A configuration key has a value that breaks a rule."""

    exit_code = 4


class InputError(QuintetError, ValueError):
    """An argument of a call is not usable as given."""

    exit_code = 2


class ContextLengthError(InputError):
    """More tokens were asked for than the model, or the preallocated cache, has room for."""


class GrammarError(InputError):
    """What a text is to follow cannot be followed: it is wrong, contradictory or too complex."""


class ModelNotFoundError(QuintetError, FileNotFoundError):
    """No such directory, repository, revision or file."""

    exit_code = 3


class OfflineError(ModelNotFoundError):
    """The files are not in the local cache and the network is off or unreachable."""

    exit_code = 6


class UnsupportedModelError(QuintetError, ValueError):
    """A model of a family, or with a feature, that Quintet does not implement."""

    exit_code = 3


class CheckpointError(QuintetError, ValueError):
    """Checkpoint files that are incomplete, damaged, unsafe or of other shapes than the model."""

    exit_code = 4


class DataError(QuintetError, ValueError):
    """Texts to learn from that cannot be read, or that nothing can be learned from."""

    exit_code = 4


class SaveError(QuintetError, OSError):
    """Writing failed; the old files are untouched."""

    exit_code = 7


class TokenizerError(QuintetError, ValueError):
    """Tokenizer files that cannot be read, or a tokenizer call that cannot be answered."""

    exit_code = 4


class ChatTemplateError(TokenizerError):
    """A chat template that is missing, invalid, over its budget, or refuses the conversation."""


class UnsupportedBackendError(QuintetError, ValueError):
    """A kernel or backend cannot serve a request."""

    exit_code = 2


class DoesNotFitError(QuintetError, MemoryError):
    """A model that is larger than the memory there is for it."""

    exit_code = 5


class DivergedError(QuintetError, ArithmeticError):
    """A training whose loss or gradient is not finite, step after step."""


class ServingError(QuintetError):
    """A request that was not answered to its end.

    Attributes:
        code: a word for it that stays the same.
        retryable: whether the same request may be answered when it comes again.
    """

    code: ClassVar[str] = "serving_error"
    retryable: ClassVar[bool] = False


class QueueFullError(ServingError):
    """As many requests wait already as may."""

    code = "queue_full"
    retryable = True


class DeadlineError(ServingError, TimeoutError):
    """The time of a request was over before its answer was complete."""

    code = "deadline_exceeded"


class NonFiniteError(ServingError, ArithmeticError):
    """What the model made of a request holds NaN or infinity, of which no token can be taken."""

    code = "nonfinite"


class StepFailedError(ServingError):
    """A step of the model failed, or had too little memory for one of those in it."""

    code = "step_failed"
    retryable = True


class EngineStoppedError(ServingError):
    """What generates was closed, or has failed too often to go on."""

    code = "engine_stopped"
    retryable = True


class DistributedError(QuintetError, RuntimeError):
    """Several processes that are to hold one model cannot begin, or go on, together."""


class RankFailedError(DistributedError):
    """One of several processes failed, was ended or stands still, and the others cannot go on.

    Attributes:
        rank: which one, or None where the others cannot tell.
        cause: what happened to it.
    """

    def __init__(self, rank: int | None, cause: str) -> None:
        super().__init__(f"{'a process' if rank is None else f'rank {rank}'} {cause}")
        self.rank = rank
        self.cause = cause

    def __reduce__(self) -> tuple[type, tuple[int | None, str]]:
        """Let it pass between processes with all it says."""
        return type(self), (self.rank, self.cause)


class DisagreementError(DistributedError, ValueError):
    """The processes were given different prompts, options or checkpoints for one model."""

    exit_code = 2


class MissingDependencyError(QuintetError, ImportError):
    """An optional package is needed and not installed."""


def listed(names: list[str], most: int = 10) -> str:
    """Write at most `most` names, one an indented line, and the number of the others."""
    shown = [f"  {name}" for name in names[:most]]
    if len(names) > most:
        shown.append(f"  … and {len(names) - most} more")
    return "\n".join(shown)


def named(value: object) -> str:
    """Return the name of a value's class, with its module: other libraries' may have the same."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def shown(value: object) -> str:
    """Write a value from a file as it may stand in a message: quoted and not endless."""
    if isinstance(value, str | bytes | list | tuple) and len(value) > 160:
        return f"{repr(value[:160])[:159]}…"
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"{type(value).__name__} too long to be written"
    return text if len(text) <= 160 else f"{text[:159]}…"

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
    """More tokens are requested than the model, or the preallocated cache, has room for."""


class GrammarError(InputError):
    """A grammar or schema is wrong, contradictory or too complex."""


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
    """Checkpoint files are incomplete, damaged, unsafe or do not fit the model."""

    exit_code = 4


class DataError(QuintetError, ValueError):
    """Training texts cannot be read or contain nothing to learn from."""

    exit_code = 4


class SaveError(QuintetError, OSError):
    """Writing failed; the old files are untouched."""

    exit_code = 7


class TokenizerError(QuintetError, ValueError):
    """Tokenizer files cannot be read, or a tokenizer call cannot be answered."""

    exit_code = 4


class ChatTemplateError(TokenizerError):
    """A chat template is missing, invalid, over budget, or refuses the conversation."""


class UnsupportedBackendError(QuintetError, ValueError):
    """A kernel or backend cannot serve a request."""

    exit_code = 2


class DoesNotFitError(QuintetError, MemoryError):
    """A model is larger than the available memory."""

    exit_code = 5


class DivergedError(QuintetError, ArithmeticError):
    """Loss or gradient of a training is not finite for several steps."""


class ServingError(QuintetError):
    """A request was not completed.

    Attributes:
        code: a word for it that stays the same.
        retryable: whether the same request may be answered when it comes again.
    """

    code: ClassVar[str] = "serving_error"
    retryable: ClassVar[bool] = False


class QueueFullError(ServingError):
    """The queue of waiting requests is full."""

    code = "queue_full"
    retryable = True


class DeadlineError(ServingError, TimeoutError):
    """A request ran out of time."""

    code = "deadline_exceeded"


class NonFiniteError(ServingError, ArithmeticError):
    """The model's output for a request holds NaN or infinity."""

    code = "nonfinite"


class StepFailedError(ServingError):
    """A forward failed, or ran out of memory for one of its requests."""

    code = "step_failed"
    retryable = True


class EngineStoppedError(ServingError):
    """The engine was closed, or failed too often to continue."""

    code = "engine_stopped"
    retryable = True


class DistributedError(QuintetError, RuntimeError):
    """The processes of one model cannot start or continue together."""


class RankFailedError(DistributedError):
    """A process failed, was killed or hangs, so the others cannot continue.

    Attributes:
        rank: which one, or None if the others cannot tell.
        cause: what happened to it.
    """

    def __init__(self, rank: int | None, cause: str) -> None:
        super().__init__(f"{'a process' if rank is None else f'rank {rank}'} {cause}")
        self.rank = rank
        self.cause = cause

    def __reduce__(self) -> tuple[type, tuple[int | None, str]]:
        """Support pickling with all attributes."""
        return type(self), (self.rank, self.cause)


class DisagreementError(DistributedError, ValueError):
    """The processes of one model were given different prompts, options or checkpoints."""

    exit_code = 2


class MissingDependencyError(QuintetError, ImportError):
    """An optional package is needed and not installed."""


def listed(names: list[str], most: int = 10) -> str:
    """Format at most `most` names, one indented line each, and the number of the rest."""
    shown = [f"  {name}" for name in names[:most]]
    if len(names) > most:
        shown.append(f"  … and {len(names) - most} more")
    return "\n".join(shown)


def named(value: object) -> str:
    """Return the qualified class name of a value."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def shown(value: object) -> str:
    """Format a value from a file for a message: quoted and shortened."""
    if isinstance(value, str | bytes | list | tuple) and len(value) > 160:
        return f"{repr(value[:160])[:159]}…"
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"{type(value).__name__} too long to be written"
    return text if len(text) <= 160 else f"{text[:159]}…"

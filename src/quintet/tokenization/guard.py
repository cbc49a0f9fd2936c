"""Converts errors and panics of the `tokenizers` library."""

from collections.abc import Iterator
from contextlib import contextmanager

from quintet.errors import CheckpointError, QuintetError, TokenizerError

MAX_MESSAGE = 1000


@contextmanager
def guarded(action: str) -> Iterator[None]:
    """Turn any failure of the library into a TokenizerError.

    The library raises bare Exception, and its panics are no Exception at all.

    Raises:
        TokenizerError: the block ended in an error that was not raised on purpose.
    """
    try:
        yield
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error
    except (QuintetError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        message = str(error).encode(errors="backslashreplace").decode()[:MAX_MESSAGE]
        raise TokenizerError(f"{action} ({type(error).__name__}: {message})") from error

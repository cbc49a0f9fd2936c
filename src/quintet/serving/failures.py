"""Errors of failed steps, and of lost processes."""

from quintet.errors import (
    DisagreementError,
    EngineStoppedError,
    RankFailedError,
    StepFailedError,
)
from quintet.parallel.faults import collective


def no_memory(error: Exception) -> StepFailedError:
    """Return the error for a request that is dropped for lack of memory."""
    why = "there was not enough memory for a step, and this request was the first to give way"
    failure = StepFailedError(f"{why}; come again, or serve fewer rows or tokens at once")
    # Without its frames, which hold what the step had made.
    failure.__cause__ = error.with_traceback(None)
    return failure


def often(count: int, error: Exception) -> EngineStoppedError:
    """Return the error that stops an engine after repeated failures."""
    return EngineStoppedError(
        f"{count} forwards in a row failed, the last with {error!r}; look at its cause, and make "
        "another engine"
    )


def parted(error: Exception) -> EngineStoppedError | None:
    """Return the error that stops an engine if processes of its model are lost, else None.

    None if an error is about something else. Its cause is a `RankFailedError` that says which
    process failed, or a `DisagreementError`.
    """
    try:
        with collective():
            raise error
    except (RankFailedError, DisagreementError) as found:
        stopped = EngineStoppedError(f"the processes that hold the model cannot go on: {found}")
        stopped.__cause__ = found
        return stopped
    except Exception:
        return None
    finally:
        # Its frames would hold it, and what a step had made.
        del error

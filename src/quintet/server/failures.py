"""Error responses in OpenAI's format."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from quintet.errors import (
    ContextLengthError,
    DeadlineError,
    DoesNotFitError,
    EngineStoppedError,
    InputError,
    ModelNotFoundError,
    NonFiniteError,
    QueueFullError,
    QuintetError,
    StepFailedError,
    TokenizerError,
)

# No error tells more than that, whatever was sent.
LONGEST = 2000
RETRY_AFTER = 1


@dataclass(eq=False)
class ApiError(Exception):
    """An error response.

    Attributes:
        status: of HTTP.
        message: what is wrong, and what to do.
        type: the class of errors, as OpenAI names them.
        code: what a program may tell it by.
        param: the field of the request, as `messages[3].content`.
        headers: to be sent with it.
    """

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.status, self.code)

    def body(self) -> dict[str, Any]:
        """Return the body in OpenAI's format."""
        return {
            "error": {
                "message": bounded(self.message),
                "type": self.type,
                "param": None if self.param is None else bounded(self.param, 200),
                "code": self.code,
            }
        }


# Writes an error as the protocol of a route has it.
ErrorBody = Callable[[ApiError], dict[str, Any]]


def invalid(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """Return the error of an invalid request."""
    return ApiError(400, message, code=code, param=param)


def bounded(text: str, most: int = LONGEST) -> str:
    """Shorten a text, and make it valid UTF-8."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= most else f"{text[: most - 1]}…"


def error_response(error: ApiError, write: ErrorBody = ApiError.body) -> Response:
    """Return the response for an error."""
    return Response(
        json.dumps(write(error), ensure_ascii=False).encode(),
        error.status,
        dict(error.headers),
        media_type="application/json",
    )


def error_of(error: BaseException) -> ApiError | None:
    """Convert an exception to an error response; None for unexpected ones.

    What is wrong with a request is told in its words; what is wrong with this server is not.
    """
    match error:
        case ApiError():
            return error
        case ContextLengthError():
            return invalid(str(error), code="context_length_exceeded")
        case QueueFullError():
            return unavailable("too many requests wait already; try again", "queue_full")
        case DeadlineError():
            return ApiError(
                504,
                "the time for an answer was over before it was complete; ask for fewer tokens",
                "timeout_error",
                "deadline_exceeded",
                headers={"x-should-retry": "false"},
            )
        case NonFiniteError():
            return ApiError(
                500,
                "what the model made of this request holds numbers that are none; ask otherwise",
                "server_error",
                error.code,
                headers={"x-should-retry": "false"},
            )
        case StepFailedError():
            return unavailable("a step of the model failed; try again", error.code)
        case EngineStoppedError():
            return unavailable(
                "the model answers no more, as the server ends or it has failed; try again, or ask "
                "another one",
                "server_shutdown",
            )
        case DoesNotFitError() | MemoryError():
            return unavailable("there is not enough memory now; try again", "out_of_memory")
        case ModelNotFoundError():
            return ApiError(404, str(error), code="model_not_found", param="model")
        case InputError() | TokenizerError():
            return invalid(str(error))
        case QuintetError():
            return None
    return None


def unavailable(message: str, code: str, seconds: float = RETRY_AFTER) -> ApiError:
    """Return the error of a temporary condition."""
    return ApiError(
        503,
        message,
        "server_error",
        code,
        headers={"Retry-After": str(max(1, math.ceil(seconds)))},
    )


def internal(request_id: str) -> ApiError:
    """Return the error for an unexpected exception, with the id of its log entry."""
    return ApiError(
        500,
        f"something went wrong here; the log has it as request {request_id}",
        "server_error",
        "internal_error",
    )

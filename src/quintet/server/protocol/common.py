"""Common parts of request bodies: every field is used, warned about, or refused.

A known field that asks for nothing (null, false, empty) may stand anywhere; of one that is not
known, only null is known to ask for nothing.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quintet.errors import shown
from quintet.server.failures import ApiError, invalid
from quintet.server.sampling import Sampling
from quintet.server.settings import Settings

B = TypeVar("B", bound="Body")
# A message says what is wrong first, not everything.
MOST_REASONS = 3
MOST_WARNINGS = 20
MAX_STOP_IDS = 300
_ID = re.compile(r"[0-9]{1,10}")
_OBJECT = re.compile(r"a valid dictionary( or instance of \w+)?")

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
# Not a literal: true is equal to it.
One = Annotated[int, Field(ge=1, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopString = Annotated[str, Field(min_length=1)]


class Body(BaseModel):
    """An object of a request; values are what they are: no text is a number, and true is none.

    Class attributes:
        IDLE: fields that are taken and have no effect here.
        REFUSED: fields that cannot be had here, and what to do instead.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)

    IDLE: ClassVar[frozenset[str]] = frozenset()
    REFUSED: ClassVar[Mapping[str, str]] = {}


class SamplingFields(Body):
    """Sampling fields in OpenAI's names."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    logit_bias: dict[str, float] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_IDS, fail_fast=True)] | None = (
        None
    )
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: bool | None = None
    n: Count | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    speculate: Literal["off", "lookup", "mtp"] | None = None

    def sampling(self, settings: Settings, vocab_size: int) -> Sampling:
        """Return the sampling parameters, for a vocabulary size.

        Raises:
            ApiError: more than the server takes, or an id that is none of the model's.
        """
        within("n", self.n or 1, settings.choices)
        within("stop", len(self.stops), settings.stops, "texts")
        for index, stop in enumerate(self.stops):
            name = "stop" if isinstance(self.stop, str) else f"stop[{index}]"
            within(name, len(stop), settings.stop_length, "characters")
        within("logit_bias", len(self.logit_bias or {}), settings.biases, "ids")
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            # -1 is taken for all, as elsewhere.
            top_k=None if self.top_k is None else max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=_biases(self.logit_bias or {}, vocab_size),
            seed=self.seed,
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            stop_token_ids=_ids(self.stop_token_ids or [], vocab_size),
            speculate=self.speculate,
        )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def parse(kind: type[B], data: object, *, strict: bool) -> tuple[B, list[str]]:
    """Parse a body; return it with warnings about fields without effect.

    Args:
        kind: what it is.
        data: as JSON has it.
        strict: refuse fields that are not known, rather than tell of them.

    Raises:
        ApiError: a value breaks its rule, or a field cannot be had here.
    """
    if not isinstance(data, Mapping):
        raise invalid(f"the body has to be a JSON object, not {shown(data)}")
    try:
        body = kind.model_validate(data)
    except ValidationError as error:
        raise _first(error, data) from None
    warnings = []
    for path, name, owner in _beside(body, ""):
        param = f"{path}{name}"
        if name in owner.REFUSED:
            raise unsupported(param, owner.REFUSED[name])
        if name in owner.IDLE:
            warnings.append(f"{plain(param)} has no effect here")
        elif strict:
            raise ApiError(
                400,
                f"there is no parameter {shown(param)}; leave it out (the server was started with "
                "--strict)",
                "invalid_request_error",
                "unknown_parameter",
                param[:128],
            )
        else:
            warnings.append(f"{plain(param)} is not known and has no effect")
    return body, warnings


def within(name: str, value: int, most: int, unit: str = "") -> None:
    """Check a number against a limit.

    Raises:
        ApiError: it is more.
    """
    if value > most:
        amount = f"{value} {unit}" if unit else str(value)
        raise invalid(f"{name} has {amount}; at most {most} are taken", name)


def unsupported(param: str, remedy: str) -> ApiError:
    """Return the error for an unsupported field."""
    message = f"{param} cannot be had here; {remedy}"
    return ApiError(400, message, "invalid_request_error", "unsupported_parameter", param)


def warnings_header(warnings: list[str]) -> dict[str, str]:
    """Return the header that lists warnings, or none."""
    if not warnings:
        return {}
    more = len(warnings) - MOST_WARNINGS
    shown = [*warnings[:MOST_WARNINGS], *([f"and {more} more"] if more > 0 else [])]
    return {"warnings": "; ".join(shown).encode("ascii", "replace").decode()}


def plain(name: str) -> str:
    """Sanitise a name for a header."""
    return re.sub(r"[^\x21-\x7e]|[;,]", "?", name[:64]) or "''"


# -- within ----------------------------------------------------------------------------------------


def _beside(body: Body, path: str) -> Iterator[tuple[str, str, type[Body]]]:
    """Yield undeclared fields that would have an effect."""
    kind = type(body)
    for name, value in (body.model_extra or {}).items():
        known = name in kind.IDLE or name in kind.REFUSED
        has_effect = value is not False and value not in ("", [], {})
        if value is not None and (has_effect or not known):
            yield path, name, kind
    for name in kind.model_fields:
        value = body.__dict__[name]
        if isinstance(value, Body):
            yield from _beside(value, f"{path}{name}.")
        elif isinstance(value, list):
            for index, one in enumerate(value):
                if isinstance(one, Body):
                    yield from _beside(one, f"{path}{name}[{index}].")


def _first(error: ValidationError, data: Any) -> ApiError:
    """Describe the first validation error."""
    found: dict[str, list[str]] = {}
    deepest: dict[str, int] = {}
    for one in error.errors(include_url=False, include_context=False, include_input=False):
        path, depth = _path(one["loc"], data, missing=one["type"] == "missing")
        reasons = found.setdefault(path, [])
        deepest[path] = depth
        rule = _rule(one["msg"])
        if rule not in reasons and len(reasons) < MOST_REASONS:
            reasons.append(rule)
    root = next(iter(found)).split(".")[0].split("[")[0]
    related = [path for path in found if path.split(".")[0].split("[")[0] == root]
    path = max(related, key=deepest.__getitem__)
    rules = " or ".join(found[path])
    value = _value(error, path, data)
    return invalid(f"{shown(path)[1:-1] or 'the body'}: {rules}{value}", path[:128] or None)


def _rule(message: str) -> str:
    """Return a rule in the words of the protocol, which knows of no classes and no exceptions."""
    text = _OBJECT.sub("a valid object", message.removeprefix("Value error, "))
    return text[0].lower() + text[1:]


def _path(loc: tuple[int | str, ...], data: Any, *, missing: bool) -> tuple[str, int]:
    """Format a location as in requests."""
    path, depth, node = "", 0, data
    for place, part in enumerate(loc):
        if isinstance(part, int):
            if isinstance(node, list) and part < len(node):
                path, node, depth = f"{path}[{part}]", node[part], depth + 1
        elif isinstance(node, Mapping) and (part in node or (missing and place == len(loc) - 1)):
            path, node, depth = f"{path}.{part}" if path else part, node.get(part), depth + 1
    return path, depth


def _value(error: ValidationError, path: str, data: Any) -> str:
    for one in error.errors(include_url=False, include_context=False):
        missing = one["type"] == "missing"
        if _path(one["loc"], data, missing=missing)[0] == path:
            return "" if missing else f", not {shown(one['input'])}"
    return ""


def _biases(given: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    biases = {}
    for key, bias in given.items():
        if not _ID.fullmatch(key) or int(key) >= vocab_size:
            raise invalid(
                f"logit_bias has the key {shown(key)}; keys are ids of tokens, 0 to "
                f"{vocab_size - 1}",
                "logit_bias",
            )
        if not -100 <= bias <= 100:
            raise invalid(f"logit_bias[{key}] is {bias}; it is from -100 to 100", "logit_bias")
        biases[int(key)] = bias
    return biases


def _ids(given: list[int], vocab_size: int) -> tuple[int, ...]:
    for index, token in enumerate(given):
        if not 0 <= token < vocab_size:
            raise invalid(
                f"stop_token_ids[{index}] is {shown(token)}; ids are from 0 to {vocab_size - 1}",
                f"stop_token_ids[{index}]",
            )
    return tuple(given)

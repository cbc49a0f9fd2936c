"""Options of a request besides those of `generate()`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

from quintet.errors import InputError, shown
from quintet.serving.checks import check_count, check_duration

Speculation = Literal["off", "mtp", "lookup"]
# How many tokens are looked up at once.
LOOKUP = 3
_ASKING = ("use_mtp", "prompt_lookup_num_tokens", "assistant_model")


def check_speculation(speculate: str | None) -> None:
    """Check a drafting mode.

    Raises:
        InputError: there is no such way.
    """
    if speculate is not None and speculate not in get_args(Speculation):
        raise InputError(
            f"speculate={shown(speculate)} has to be one of {', '.join(get_args(Speculation))}"
        )


def drafting(
    own: Speculation | None, given: Mapping[str, Any], default: Speculation
) -> dict[str, Any]:
    """Return the `generate()` options for a drafting mode.

    A request that says otherwise how it drafts, or draws by a generator of its own, which drafts
    would use in another way, has no default.
    """
    requested = any(given.get(name) is not None for name in _ASKING)
    if own is not None and requested:
        raise InputError(
            f"speculate={own!r} and {', '.join(name for name in _ASKING if name in given)} both "
            "say how to draft; give one of them"
        )
    if own is None and (requested or given.get("generator") is not None):
        return {}
    method = default if own is None else own
    if method == "mtp":
        return {"use_mtp": True}
    return {"prompt_lookup_num_tokens": LOOKUP} if method == "lookup" else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """The serving options of a request; keyword arguments of `Engine.generate` and `answer`.

    Attributes:
        scope: whose request it is. Scopes take turns, and only within one is gone on from what was
            read before.
        salt: within a scope, only requests of the same salt share what was read before.
        priority: the higher are the last to give their row back.
        timeout: how many seconds the whole answer may take.
        stable: how many tokens of the prompt later prompts will begin with, too, or several such
            numbers: where a system prompt ends, where a conversation goes on. Recurrent states
            are kept there.
        logprobs: say how probable each token was, and as many likely ones in its place; None to
            say nothing.
        prompt_logprobs: the same of the tokens of the prompt, all of which are then run over.
        stop: strings that end the answer, which they are no part of; not within its first
            `min_new_tokens`.
        keep_special: have special tokens in the text; one that ends it never is.
        speculate: draft tokens by the model's prediction layers ("mtp"), from the text itself
            ("lookup"), or not ("off"); None for what the engine does, and what other options say.

    Raises:
        InputError: a value that cannot be used.
    """

    scope: str = ""
    salt: str = ""
    priority: int = 0
    timeout: float | None = None
    stable: int | tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    keep_special: bool = False
    speculate: Speculation | None = None

    def __post_init__(self) -> None:
        for name, text in (("scope", self.scope), ("salt", self.salt)):
            if not isinstance(text, str):
                raise InputError(f"{name}={shown(text)} has to be a text")
        check_count("priority", self.priority)
        if self.timeout is not None:
            check_duration("timeout", self.timeout)
        if not isinstance(self.keep_special, bool):
            raise InputError(f"keep_special={shown(self.keep_special)} has to be true or false")
        check_speculation(self.speculate)

    @classmethod
    def split(cls, options: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """Split options into these and those of `generate()`."""
        own = {field.name for field in fields(cls)}
        for name in ("streamer", "tokenizer"):
            if name in options:
                raise InputError(
                    f"{name} is the engine's own affair: it reads and writes with its tokenizer, "
                    "and what it makes comes from this iterator"
                )
        ours = {name: value for name, value in options.items() if name in own}
        return cls(**ours), {name: value for name, value in options.items() if name not in own}

    def stops(self, prompt: int) -> tuple[int, ...]:
        """Return the stable lengths of a prompt, in order.

        Raises:
            InputError: not within it.
        """
        given = tuple(self.stable) if isinstance(self.stable, tuple | list) else (self.stable,)
        if not all(type(at) is int and 0 <= at < prompt for at in given):
            raise InputError(
                f"stable={shown(self.stable)} has to be less than the {prompt} tokens of the prompt"
            )
        return tuple(sorted({at for at in given if at}))

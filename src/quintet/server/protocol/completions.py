"""OpenAI's completions of text: the fields of a request, and its prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from quintet.server.conversation import too_long
from quintet.server.failures import invalid
from quintet.server.protocol.chat import BEAMS, FORMATS, StreamOptions, check_stream
from quintet.server.protocol.common import SamplingFields, unsupported, within
from quintet.server.protocol.formats import ResponseFormat, field_of, format_of
from quintet.server.protocol.prompts import checked, fitting, listed, placed
from quintet.server.questions import Ask
from quintet.server.settings import Settings
from quintet.tokenization import PreTrainedTokenizer
from quintet.tokenization.stream import IncrementalDecoder

# Tokens of an answer, where nobody says.
ANSWER = 16
# What stands before, between and behind the two sides of a hole.
HOLES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)


class CompletionRequest(SamplingFields):
    """The body of a request to continue texts."""

    IDLE: ClassVar = frozenset({"user", "metadata", "prompt_cache_key", "safety_identifier"})
    REFUSED: ClassVar = {
        "messages": "use /v1/chat/completions",
        "tools": "use /v1/chat/completions",
        "use_beam_search": BEAMS,
        "length_penalty": BEAMS,
        "guided_json": FORMATS,
        "guided_regex": FORMATS,
        "guided_choice": FORMATS,
        "guided_grammar": FORMATS,
        "structured_outputs": FORMATS,
        "prompt_logprobs": "use echo with logprobs",
        "include_stop_str_in_output": "a stop string is never part of an answer",
        "truncate_prompt_tokens": "send as much of the prompt as fits",
    }

    model: Annotated[str, Field(min_length=1, max_length=512)]
    prompt: str | list[Any]
    suffix: str | None = None
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    grammar: Annotated[str, Field(min_length=1)] | None = None

    def check(self, settings: Settings) -> None:
        """Check that the fields go together.

        Raises:
            ApiError: a value breaks its rule, or fields contradict each other.
        """
        check_stream(self.stream, self.stream_options)
        within("logprobs", self.logprobs or 0, settings.top_logprobs)
        if self.best_of not in (None, self.n or 1):
            raise unsupported("best_of", BEAMS)
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens: it is at least 1, or 0 with echo", "max_tokens")
        if self.suffix and (self.echo or not isinstance(self.prompt, str)):
            raise invalid("suffix: it goes with one prompt of text, without echo", "suffix")

    def question(
        self, ids: tuple[int, ...], where: str, settings: Settings, vocab_size: int, scope: str
    ) -> Ask:
        """Return the request of each prompt, with its place in the body, for a user.

        Raises:
            ApiError: a value breaks its rule.
        """
        form = format_of(self.response_format, self.regex, self.grammar, settings)
        return Ask(
            prompt=ids,
            where=where,
            sampling=self.sampling(settings, vocab_size),
            max_tokens=ANSWER if self.max_tokens is None else self.max_tokens,
            stop=self.stops,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
            n=self.n or 1,
            response_format=form,
            form_where=field_of(form),
            scope=scope,
            salt=self.cache_salt or "",
            priority=self.priority or 0,
            timeout=settings.deadline,
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """A prompt.

    Attributes:
        where: it stands in the request.
        ids: its tokens.
        text: what it says.
        offsets: where in the text each of its tokens begins.
    """

    where: str
    ids: tuple[int, ...]
    text: str
    offsets: tuple[int, ...]


def pieces(
    body: CompletionRequest,
    tokenizer: PreTrainedTokenizer,
    settings: Settings,
    context: int,
    vocab_size: int,
) -> list[Piece]:
    """Read the prompts of a request.

    Raises:
        ApiError: too many, none, one that is longer than the context, or what is neither text nor
            ids.
    """
    prompt = body.prompt
    if isinstance(prompt, str) and body.suffix:
        with placed("prompt"):
            return [_around(prompt, body.suffix, tokenizer, context)]
    found = []
    for where, one in listed(prompt, "prompt", settings.prompts):
        with placed(where):
            if isinstance(one, str):
                found.append(_text(one, where, tokenizer, context))
            else:
                found.append(_ids(one, where, tokenizer, context, vocab_size))
    return found


def _text(text: str, where: str, tokenizer: PreTrainedTokenizer, context: int) -> Piece:
    too_long(tokenizer, text, context)
    read = tokenizer(text, return_offsets_mapping=True)
    ids = tuple(read["input_ids"])
    if not ids:
        raise invalid(f"{where}: it has no tokens, and an answer needs one to begin with", where)
    offsets = tuple(start for start, _ in read["offset_mapping"])
    return Piece(where, fitting(ids, context), text, offsets)


def _ids(
    given: Sequence[Any], where: str, tokenizer: PreTrainedTokenizer, context: int, vocab_size: int
) -> Piece:
    ids = checked(given, where, context, vocab_size)
    decoder, offsets, text = IncrementalDecoder(tokenizer), [], []
    length = 0
    for one in ids:
        offsets.append(length)
        text.append(decoder.push(one))
        length += len(text[-1])
    return Piece(where, ids, "".join(text) + decoder.flush(), tuple(offsets))


def _around(before: str, behind: str, tokenizer: PreTrainedTokenizer, context: int) -> Piece:
    """Return a prompt for the text between two texts, which are encoded apart."""
    for marks in HOLES:
        ids = [tokenizer.convert_tokens_to_ids(mark) for mark in marks]
        added = tokenizer.added_tokens_decoder
        if all(one is not None and one in added for one in ids):
            break
    else:
        raise unsupported("suffix", "the model has no tokens for a hole in a text; leave it out")
    too_long(tokenizer, before + behind, context)
    sides = [
        tokenizer.encode(side, add_special_tokens=False, split_special_tokens=True)
        for side in (before, behind)
    ]
    first, hole, last = (one for one in ids if one is not None)
    whole = (first, *sides[0], hole, *sides[1], last)
    start = tokenizer.encode("", add_special_tokens=True)[:1]
    return Piece("prompt", fitting((*start, *whole), context), before, ())

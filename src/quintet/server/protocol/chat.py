"""OpenAI's chat completions: the fields of a request."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from quintet.server.failures import invalid
from quintet.server.protocol.common import Body, Count, SamplingFields, unsupported, within
from quintet.server.protocol.formats import ResponseFormat, field_of, format_of
from quintet.server.protocol.turns import (
    Message,
    Tool,
    ToolChoice,
    choice_of,
    conversation_of,
    tools_of,
)
from quintet.server.questions import Ask, Conversation
from quintet.server.settings import Settings

BEAMS = "answers are drawn one token at a time; use n, temperature and top_p"
FORMATS = "use response_format, regex or grammar"


class StreamOptions(Body):
    """The options of a stream."""

    IDLE: ClassVar = frozenset({"include_obfuscation"})

    include_usage: bool | None = None


class ChatRequest(SamplingFields):
    """A question in a conversation."""

    IDLE: ClassVar = frozenset(
        [
            *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "user"),
            *("safety_identifier", "metadata", "service_tier", "verbosity"),
        ]
    )
    REFUSED: ClassVar = {
        "store": "nothing is kept here; send the whole conversation each time",
        "audio": "answers are text",
        "web_search_options": "nothing is fetched here; offer a tool",
        "prediction": "use speculate='lookup', which drafts from the prompt",
        "moderation": "ask a model for it",
        "functions": "use tools",
        "function_call": "use tool_choice",
        "best_of": BEAMS,
        "use_beam_search": BEAMS,
        "length_penalty": BEAMS,
        "guided_json": FORMATS,
        "guided_regex": FORMATS,
        "guided_choice": FORMATS,
        "guided_grammar": FORMATS,
        "structured_outputs": FORMATS,
        "echo": "use /v1/completions",
        "prompt_logprobs": "use /v1/completions with echo",
        "include_stop_str_in_output": "a stop string is never part of an answer",
    }

    model: Annotated[str, Field(min_length=1, max_length=512)]
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[str], Field(fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    grammar: Annotated[str, Field(min_length=1)] | None = None

    def question(self, settings: Settings, vocab_size: int, scope: str) -> Ask:
        """Return the request, for a user.

        Raises:
            ApiError: a value breaks its rule, or fields contradict each other.
        """
        check_stream(self.stream, self.stream_options)
        if self.modalities not in (None, [], ["text"]):
            raise unsupported("modalities", "answers are text")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs: it needs logprobs=true", "top_logprobs")
        within("top_logprobs", self.top_logprobs or 0, settings.top_logprobs)
        tools = tools_of(self.tools or [], settings)
        choice, tools = choice_of(self.tool_choice, tools)
        form = format_of(self.response_format, self.regex, self.grammar, settings)
        messages = conversation_of(self.messages, settings)
        if self.continue_final_message and messages[-1]["role"] != "assistant":
            raise invalid(
                "continue_final_message: the last message has to be the assistant's",
                "continue_final_message",
            )
        effort = self.reasoning_effort
        return Ask(
            prompt=Conversation(
                messages=messages,
                tools=tools,
                template_kwargs=self.chat_template_kwargs or {},
                thinking=None if effort is None else effort not in ("none", "minimal"),
                continued=bool(self.continue_final_message),
            ),
            where="messages",
            sampling=self.sampling(settings, vocab_size),
            max_tokens=self._most(),
            usual_tokens=settings.answer,
            stop=self.stops,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            n=self.n or 1,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            response_format=form,
            form_where=field_of(form),
            scope=scope,
            salt=self.cache_salt or "",
            priority=self.priority or 0,
            timeout=settings.deadline,
        )

    def _most(self) -> int | None:
        """Return the maximum number of tokens of an answer."""
        given = [one for one in (self.max_completion_tokens, self.max_tokens) if one is not None]
        if len(set(given)) > 1:
            raise invalid(
                f"max_tokens: it is {given[1]} and max_completion_tokens, which is the same, is "
                f"{given[0]}; leave one out",
                "max_tokens",
            )
        return given[0] if given else None


def check_stream(stream: bool | None, options: StreamOptions | None) -> None:
    """Check that options of a stream are for one.

    Raises:
        ApiError: there is none.
    """
    if options is not None and not stream:
        raise invalid("stream_options: they need stream=true", "stream_options")

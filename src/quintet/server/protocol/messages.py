"""The bodies of `/v1/messages`: Anthropic's fields, and their translation."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from quintet.server.failures import ApiError, bounded
from quintet.server.protocol.common import Body, Count, One, SamplingFields, within
from quintet.server.protocol.message_blocks import (
    Texts,
    Turn,
    messages_of,
    text_of,
)
from quintet.server.protocol.tools import Name, Offered, chosen, offered
from quintet.server.questions import Ask, Conversation
from quintet.server.settings import Settings

Wire = dict[str, Any]


class Tool(Body):
    """A tool the assistant may call."""

    IDLE = frozenset(
        {
            "allowed_callers",
            "cache_control",
            "defer_loading",
            "eager_input_streaming",
            "input_examples",
        }
    )

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(Body):
    """Whether tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _a_tool_has_a_name(self) -> "ToolChoice":
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("name goes with the type 'tool', and with no other")
        return self


class Thinking(Body):
    """Whether the assistant thinks before it answers."""

    # How long it thinks is up to the model.
    IDLE = frozenset({"budget_tokens"})

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    display: Literal["summarized", "omitted"] | None = None

    @property
    def wanted(self) -> bool | None:
        """Whether to think; None for the model's default."""
        return {"enabled": True, "disabled": False}.get(self.type)


class JsonFormat(Body):
    """A schema that the answer keeps to."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Body):
    """The required form of the answer."""

    IDLE = frozenset({"effort"})

    format: JsonFormat | None = None


class CountTokensRequest(Body):
    """The parts of a prompt whose tokens are counted."""

    IDLE = frozenset(
        {"cache_control", "context_management", "speed", "user_profile_id", "workspace_id"}
    )
    REFUSED: ClassVar[Mapping[str, str]] = {
        "mcp_servers": "call the tools of such servers yourself",
    }

    model: str
    messages: Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    system: Texts | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def conversation(self, settings: Settings) -> tuple[str, Conversation]:
        """Return the tools that may be called, and the conversation so far.

        An answer that was begun is to be gone on with.

        Raises:
            ApiError: more than the server takes, or a tool is chosen that is not there.
        """
        within("messages", len(self.messages), settings.messages, "messages")
        choice, tools = self._tools_and_choice(settings)
        messages = messages_of(self.messages)
        last = messages[-1]
        if self.system:
            messages.insert(0, {"role": "system", "content": text_of(self.system)})
        conversation = Conversation(
            messages=tuple(messages),
            tools=tools,
            template_kwargs=self.chat_template_kwargs or {},
            thinking=None if self.thinking is None else self.thinking.wanted,
            continued=last["role"] == "assistant" and "tool_calls" not in last,
        )
        return choice, conversation

    def _tools_and_choice(self, settings: Settings) -> tuple[str, tuple[Mapping[str, Any], ...]]:
        tools = offered(
            (
                Offered(
                    f"tools[{index}]", tool.name, tool.description, tool.input_schema, tool.strict
                )
                for index, tool in enumerate(self.tools or ())
            ),
            settings,
        )
        choice = self.tool_choice
        if choice is None:
            return chosen("auto", None, tools)
        if choice.name is not None:
            return chosen("named", [choice.name], tools)
        return chosen({"any": "required"}.get(choice.type, choice.type), None, tools)


StopSequence = Annotated[str, Field(min_length=1)]


class MessagesRequest(CountTokensRequest, SamplingFields):
    """The body of a request for a message."""

    IDLE = CountTokensRequest.IDLE | {"metadata", "service_tier"}
    REFUSED: ClassVar[Mapping[str, str]] = {
        **CountTokensRequest.REFUSED,
        "container": "there are no containers here",
        "diagnostics": "nothing is stored here to compare with",
        "inference_geo": "this server is where it is",
    }

    max_tokens: Count
    stream: bool | None = None
    stop_sequences: Annotated[list[StopSequence], Field(fail_fast=True)] | None = None
    n: One | None = None

    def ask(self, settings: Settings, vocab_size: int, scope: str) -> Ask:
        """Return the question, to a model of so many ids.

        Raises:
            ApiError: more than the server takes, or an id that is none of the model's.
        """
        self._check_stops(settings)
        choice, conversation = self.conversation(settings)
        return Ask(
            prompt=conversation,
            where="messages",
            sampling=self.sampling(settings, vocab_size),
            max_tokens=self.max_tokens,
            usual_tokens=settings.answer,
            stop=self.stops,
            tool_choice=choice,
            parallel_tool_calls=self.tool_choice is None
            or not self.tool_choice.disable_parallel_tool_use,
            response_format=self._format(settings),
            form_where="output_config.format.schema",
            scope=scope,
            salt=self.cache_salt or "",
            priority=self.priority or 0,
            timeout=settings.deadline,
        )

    def _format(self, settings: Settings) -> Wire | None:
        format = None if self.output_config is None else self.output_config.format
        if format is None:
            return None
        size = len(json.dumps(format.schema_))
        within("output_config.format.schema", size, settings.schema, "bytes")
        return {"type": "json_schema", "schema": format.schema_}

    def _check_stops(self, settings: Settings) -> None:
        stops = self.stop_sequences or []
        within("stop_sequences", len(stops), settings.stops, "texts")
        for index, stop in enumerate(stops):
            within(f"stop_sequences[{index}]", len(stop), settings.stop_length, "characters")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, under either name."""
        return (*super().stops, *(self.stop_sequences or ()))

    @property
    def silent(self) -> bool:
        """Whether thoughts are not to be shown."""
        return self.thinking is not None and self.thinking.display == "omitted"


_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(error: ApiError) -> Wire:
    """Return the body of an error in Anthropic's shape.

    It has no place for the field that is to blame, which is therefore named in the message.
    """
    kind = _TYPES.get(error.status, "api_error" if error.status >= 500 else _TYPES[400])
    message = bounded(error.message)
    if error.param is not None and error.param not in message:
        message = f"{bounded(error.param, 200)}: {message}"
    return {"type": "error", "error": {"type": kind, "message": message}}

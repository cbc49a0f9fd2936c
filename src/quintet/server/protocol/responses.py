"""The body of `/v1/responses`: its fields, and their translation."""

import json
import time
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from quintet.server.failures import invalid
from quintet.server.protocol.common import Body, Count, One, SamplingFields, unsupported, within
from quintet.server.protocol.ids import new_id
from quintet.server.protocol.response_items import InputItem, messages_of
from quintet.server.protocol.tools import Name, Offered, chosen, offered
from quintet.server.questions import Ask, Conversation
from quintet.server.settings import Settings

Wire = dict[str, Any]
_LOGPROBS = "message.output_text.logprobs"
Key = Annotated[str, Field(max_length=64)]
Noted = Annotated[str, Field(max_length=512)]


class FunctionTool(Body):
    """A tool that the client can call."""

    IDLE = frozenset({"allowed_callers", "async", "defer_loading", "output_schema"})

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class OtherTool(Body):
    """A tool of an unsupported kind; it is left out, with a warning."""

    type: str


class NamedChoice(Body):
    """A function that has to be called."""

    type: Literal["function"]
    name: Name


class AllowedChoice(Body):
    """The functions that may be called, or one of which has to be."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(min_length=1, fail_fast=True)]


class TextFormat(Body):
    """Any text, JSON, or JSON that keeps to a schema."""

    IDLE = frozenset({"description"})

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _a_schema_goes_with_its_type(self) -> "TextFormat":
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("schema goes with the type 'json_schema', and with no other")
        return self

    def constraint(self, settings: Settings) -> Wire | None:
        """Return the constraint of the answer, or None.

        Raises:
            ApiError: a schema that is too large.
        """
        if self.type == "text":
            return None
        if self.schema_ is None:
            return {"type": self.type}
        within("text.format.schema", len(json.dumps(self.schema_)), settings.schema, "bytes")
        return {"type": self.type, "schema": self.schema_}

    def wire(self) -> Wire:
        """Return it as a Response has it."""
        if self.type != "json_schema":
            return {"type": self.type}
        named = {"name": self.name or "schema", "schema": self.schema_, "strict": self.strict}
        return {"type": self.type, **named}


class TextConfig(Body):
    """The required form of the answer's text."""

    IDLE = frozenset({"verbosity"})

    format: TextFormat | None = None


class Reasoning(Body):
    """The amount of reasoning before the answer."""

    IDLE = frozenset({"context", "generate_summary", "mode", "summary"})

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


def _tool_kind(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else vars(tool)["type"]
    return "/function" if kind == "function" else "/other"


def _an_object(tool: Any) -> Any:
    if not isinstance(tool, dict):
        raise ValueError("a tool has to be an object")
    return tool


Tool = Annotated[
    Annotated[FunctionTool, Tag("/function")] | Annotated[OtherTool, Tag("/other")],
    Discriminator(_tool_kind),
    BeforeValidator(_an_object),
]


class ResponsesRequest(SamplingFields):
    """The body of a request for a response."""

    IDLE = frozenset(
        {
            "access_programs",
            "image",
            "max_tool_calls",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "stream_options",
            "user",
        }
    )
    REFUSED: ClassVar[Mapping[str, str]] = {
        "background": "answers are made while you wait",
        "background_options": "answers are made while you wait",
        "context_management": "send the conversation as it is to be read",
        "conversation": "nothing is stored here; send the whole conversation as input",
        "moderation": "nothing is moderated here",
        "previous_response_id": "nothing is stored here; send the whole conversation as input",
        "prompt": "nothing is stored here; send the prompt itself",
        "store": "nothing is stored here; send false, or leave it out",
    }

    model: str
    input: str | Annotated[list[InputItem], Field(min_length=1, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    include: Annotated[list[str], Field(max_length=64, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Annotated[dict[Key, Noted], Field(max_length=16)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    n: One | None = None

    def ask(self, settings: Settings, vocab_size: int, scope: str) -> Ask:
        """Return the question, to a model of so many ids.

        Raises:
            ApiError: more than the server takes, or an id that is none of the model's.
        """
        if not isinstance(self.input, str):
            within("input", len(self.input), settings.messages, "items")
        within("top_logprobs", self.top_logprobs or 0, settings.top_logprobs)
        if self.truncation == "auto":
            raise unsupported("truncation", "send a shorter input, and leave it out")
        choice, tools = self._tools_and_choice(settings)
        format = None if self.text is None else self.text.format
        return Ask(
            prompt=self._conversation(tools),
            where="input",
            sampling=self.sampling(settings, vocab_size),
            max_tokens=self.max_output_tokens,
            usual_tokens=settings.answer,
            stop=self.stops,
            logprobs=self._logprobs,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            response_format=None if format is None else format.constraint(settings),
            form_where="text.format.schema",
            scope=scope,
            salt=self.cache_salt or "",
            priority=self.priority or 0,
            timeout=settings.deadline,
        )

    def warnings(self) -> list[str]:
        """Return the fields of the request that have no effect, besides fields of its own."""
        left_out = [
            f"tools[{index}] is of a type that is not here and is left out"
            for index, tool in enumerate(self.tools or ())
            if isinstance(tool, OtherTool)
        ]
        idle = [
            f"include[{index}] has no effect here"
            for index, name in enumerate(self.include or ())
            if name != _LOGPROBS
        ]
        return left_out + idle

    def response(self) -> Wire:
        """Return the Response as it begins: whole, and without output."""
        format = None if self.text is None else self.text.format
        choice = self.tool_choice or "auto"
        return {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": None,
            "model": self.model,
            "output": [],
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {
                "effort": None if self.reasoning is None else self.reasoning.effort,
                "summary": None,
            },
            "service_tier": "default",
            "store": False,
            "temperature": self.temperature,
            "text": {"format": {"type": "text"} if format is None else format.wire()},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [
                {"parameters": None, "strict": None} | tool.model_dump(exclude_none=True)
                for tool in self.tools or ()
                if isinstance(tool, FunctionTool)
            ],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": self.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": None,
            "metadata": self.metadata or {},
        }

    # -- parts -------------------------------------------------------------------------------------

    @property
    def _logprobs(self) -> int | None:
        if self.top_logprobs or _LOGPROBS in (self.include or ()):
            return self.top_logprobs or 0
        return None

    def _conversation(self, tools: tuple[Mapping[str, Any], ...]) -> Conversation:
        given = self.input
        if isinstance(given, str):
            messages: list[Wire] = [{"role": "user", "content": given}]
        else:
            messages = messages_of(given)
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        if not messages:
            raise invalid("input has nothing that anybody said; send a message", "input")
        effort = None if self.reasoning is None else self.reasoning.effort
        return Conversation(
            messages=tuple(messages),
            tools=tools,
            template_kwargs=self.chat_template_kwargs or {},
            thinking=None if effort is None else effort not in ("none", "minimal"),
        )

    def _tools_and_choice(self, settings: Settings) -> tuple[str, tuple[Mapping[str, Any], ...]]:
        tools = offered(
            (
                Offered(
                    f"tools[{index}]", tool.name, tool.description, tool.parameters, tool.strict
                )
                for index, tool in enumerate(self.tools or ())
                if isinstance(tool, FunctionTool)
            ),
            settings,
        )
        choice = self.tool_choice
        if isinstance(choice, NamedChoice):
            return chosen("named", [choice.name], tools)
        if isinstance(choice, AllowedChoice):
            return chosen(choice.mode, [tool.name for tool in choice.tools], tools)
        return chosen(choice or "auto", None, tools)

"""The messages of a conversation and the tools it may call, as in OpenAI's chat."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from quintet.server.failures import invalid
from quintet.server.protocol.common import Body, unsupported, within
from quintet.server.protocol.tools import Arguments, Name, Offered, chosen, offered
from quintet.server.settings import Settings

TEXT_ONLY = "messages hold text; models here read nothing else, and nothing is fetched"


class Part(Body):
    """A part of a message."""

    IDLE: ClassVar = frozenset({"annotations", "cache_control"})

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Body):
    """The name and arguments of a called function."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: Arguments | dict[str, Any] | None = None


class Call(Body):
    """A call of a tool that was made before."""

    IDLE: ClassVar = frozenset({"index"})

    id: Annotated[str, Field(max_length=256)] | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class Message(Body):
    """A message of a conversation: a text, an answer, calls or a result."""

    IDLE: ClassVar = frozenset({"name", "refusal", "annotations", "id"})
    REFUSED: ClassVar = {
        "audio": TEXT_ONLY,
        "function_call": "say it as tool_calls",
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[Call], Field(fail_fast=True)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None

    def plain(self, where: str) -> dict[str, Any]:
        """Return it as templates read it.

        Raises:
            ApiError: it says nothing, or what is not text.
        """
        calls = self.tool_calls or []
        if calls and self.role != "assistant":
            raise invalid(f"{where}.tool_calls: only an assistant calls", f"{where}.tool_calls")
        thought = self.reasoning_content or self.reasoning
        if self.content is None and not calls and not (self.role == "assistant" and thought):
            raise invalid(
                f"{where}.content: there has to be text; it may be null beside tool_calls alone",
                f"{where}.content",
            )
        plain: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self._text(f"{where}.content"),
        }
        if plain["content"] is None and not calls:
            plain["content"] = ""
        if thought:
            plain["reasoning_content"] = thought
        if calls:
            plain["tool_calls"] = [
                {
                    "type": "function",
                    **({} if call.id is None else {"id": call.id}),
                    "function": {
                        "name": call.function.name,
                        "arguments": call.function.arguments or "{}",
                    },
                }
                for call in calls
            ]
        if self.tool_call_id is not None:
            plain["tool_call_id"] = self.tool_call_id
        return plain

    def _text(self, where: str) -> str | None:
        if not isinstance(self.content, list):
            return self.content
        texts = []
        for index, part in enumerate(self.content):
            text = {"text": part.text, "refusal": part.refusal}.get(part.type)
            if part.type not in ("text", "refusal"):
                raise unsupported(f"{where}[{index}].type", TEXT_ONLY)
            if text is None:
                place = f"{where}[{index}].{part.type}"
                raise invalid(f"{place}: a part of text needs it", place)
            texts.append(text)
        return "\n".join(texts)


class Function(Body):
    """A function that may be called."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that may be called."""

    REFUSED: ClassVar = {"custom": "offer a function"}

    type: str
    function: Function | None = None


class ChosenFunction(Body):
    """The name of one."""

    name: Name


class ChosenTool(Body):
    """One of the tools."""

    type: Literal["function"] | None = None
    function: ChosenFunction


class AllowedTools(Body):
    """The tools, of those given, that may be called now."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenTool], Field(min_length=1, max_length=128, fail_fast=True)]


class ToolChoice(Body):
    """The tool to call, or the tools that may be called."""

    type: str
    function: ChosenFunction | None = None
    allowed_tools: AllowedTools | None = None


def conversation_of(messages: list[Message], settings: Settings) -> tuple[Mapping[str, Any], ...]:
    """Return a conversation as templates read it.

    Raises:
        ApiError: it is too long, or a message says nothing, or what is not text.
    """
    within("messages", len(messages), settings.messages, "messages")
    return tuple(one.plain(f"messages[{index}]") for index, one in enumerate(messages))


def tools_of(tools: list[Tool], settings: Settings) -> tuple[Mapping[str, Any], ...]:
    """Return tools as templates read them.

    Raises:
        ApiError: too many, too large, of another kind, or two of one name.
    """
    functions = []
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if tool.type != "function":
            raise unsupported(f"{where}.type", "tools are functions: {'type': 'function', …}")
        one = tool.function
        if one is None:
            raise invalid(f"{where}.function: it is missing", f"{where}.function")
        functions.append(
            Offered(f"{where}.function", one.name, one.description, one.parameters, one.strict)
        )
    return offered(functions, settings)


def choice_of(
    choice: str | ToolChoice | None, tools: tuple[Mapping[str, Any], ...]
) -> tuple[str, tuple[Mapping[str, Any], ...]]:
    """Return "auto", "none", "required" or a name, and the tools that may be called.

    Raises:
        ApiError: another choice, or a tool that was not offered.
    """
    if choice is None or isinstance(choice, str):
        if choice not in (None, "auto", "none", "required"):
            raise invalid("tool_choice: it is auto, none, required or an object", "tool_choice")
        return chosen(choice or "auto", None, tools)
    if choice.type == "function" and choice.function is not None:
        return chosen("named", [choice.function.name], tools)
    if choice.type == "allowed_tools" and choice.allowed_tools is not None:
        names = [one.function.name for one in choice.allowed_tools.tools]
        return chosen(choice.allowed_tools.mode, names, tools)
    raise unsupported("tool_choice.type", "it is function or allowed_tools, with what it names")

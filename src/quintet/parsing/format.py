"""The format of tool calls in a model's chat template."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from quintet.errors import ChatTemplateError
from quintet.tokenization import PreTrainedTokenizer
from quintet.tokenization.rendering import render_chat

THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Format:
    """The format of tool calls in a text.

    Two calls are `begin before_name NAME before_arguments ARGUMENTS after_arguments between
    before_name NAME before_arguments ARGUMENTS after_arguments end`; then nothing but the end of
    the turn follows. `written` writes that. A grammar made of these parts gives what the model
    was trained to write; the parser takes much else besides.

    Attributes:
        style: "json" has the name and the arguments as members of one object, "header" the name
            before the arguments.
        begin: once, before the first call; what it begins with, or else `before_name`, is the
            marker by which one knows that the model calls.
        before_name: at each call; in style "json" the name follows as the inside of a JSON string.
        before_arguments: between a name and its arguments, which are a JSON object.
        after_arguments: ends a call.
        between: between two calls.
        end: once, after the last call.
        text_before: whether the template writes a text and calls in one turn.
        arguments: whether the template takes the arguments as the JSON text or as a mapping.
        opens: the markers that begin a call, or all of them.
        closes: those behind a call.
        invents: those that begin the result of a call, which is not the model's to write.
        tokens: those of all markers, and of those of reasoning, that are tokens of the vocabulary:
            their ids.
        bare: whether an object without any marker is a call, too.
    """

    style: Literal["json", "header"]
    before_name: str
    before_arguments: str
    after_arguments: str
    opens: tuple[str, ...]
    closes: tuple[str, ...]
    invents: tuple[str, ...]
    begin: str = ""
    between: str = ""
    end: str = ""
    text_before: bool = True
    arguments: Literal["text", "mapping"] = "text"
    tokens: Mapping[str, int] = field(default_factory=dict, hash=False)
    bare: bool = False

    @property
    def trigger(self) -> str:
        """The marker that begins calls."""
        start = self.begin or self.before_name
        return next(marker for marker in self.opens if start.startswith(marker))

    def written(self, calls: Sequence[tuple[str, str]]) -> str:
        """Write calls, each a name and JSON text."""
        texts = []
        for name, arguments in calls:
            inside = json.dumps(name, ensure_ascii=False)[1:-1] if self.style == "json" else name
            texts.append(
                self.before_name + inside + self.before_arguments + arguments + self.after_arguments
            )
        return self.begin + self.between.join(texts) + self.end

    def pieces(self, text: str) -> list[str | int]:
        """Split a part at its markers into texts and token ids."""
        pieces: list[str | int] = []
        while text:
            places = [(text.find(marker), marker) for marker in self.tokens if marker in text]
            place, marker = min(places, default=(len(text), ""))
            if place:
                pieces.append(text[:place])
            if marker:
                pieces.append(self.tokens[marker])
            text = text[place + len(marker) :]
        return pieces


HERMES = Format(
    style="json",
    before_name='<tool_call>\n{"name": "',
    before_arguments='", "arguments": ',
    after_arguments="}\n</tool_call>",
    between="\n",
    opens=("<tool_call>",),
    closes=("</tool_call>",),
    invents=("<tool_response>",),
    arguments="mapping",
)
# What Qwen2.5-Coder writes although its template says otherwise.
CODER = replace(
    HERMES,
    before_name='<tools>\n{"name": "',
    after_arguments="}\n</tools>",
    opens=("<tools>", "<tool_call>"),
    closes=("</tools>", "</tool_call>"),
    bare=True,
)
DEEPSEEK_V3 = Format(
    style="header",
    begin="<｜tool▁calls▁begin｜>",
    before_name="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    before_arguments="\n```json\n",
    after_arguments="\n```<｜tool▁call▁end｜>",
    between="\n",
    end="<｜tool▁calls▁end｜>",
    opens=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    closes=("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    invents=("<｜tool▁outputs▁begin｜>", "<｜tool▁output▁begin｜>"),
    text_before=False,
)
SEPARATOR = "<｜tool▁sep｜>"
DEEPSEEK_V31 = replace(
    DEEPSEEK_V3,
    before_name="<｜tool▁call▁begin｜>",
    before_arguments=SEPARATOR,
    after_arguments="<｜tool▁call▁end｜>",
    between="",
    text_before=True,
)
_KNOWN = (HERMES, DEEPSEEK_V3)

_NAMES = ("probe_first", "probe_second")


def format_of(tokenizer: PreTrainedTokenizer) -> Format | None:
    """Derive the format from a chat template, or return None.

    The template is asked, by having it write two calls; nothing goes by the name of a model.
    """
    try:
        template = tokenizer.get_chat_template(tools=[{}])
    except ChatTemplateError:
        return None
    found = _probed(template, json.dumps(tokenizer.special_tokens_map, default=str))
    return found and replace(found, tokens=marker_ids(tokenizer, found))


def marker_ids(tokenizer: PreTrainedTokenizer, used: Format | None) -> Mapping[str, int]:
    """Return the ids of markers that are special tokens."""
    markers = [THINK, END_THINK]
    if used is not None:
        markers += [*used.opens, *used.closes, *used.invents]
        markers += [SEPARATOR] if used.style == "header" else []
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    return MappingProxyType({text: added[text] for text in markers if text in added})


@functools.lru_cache(maxsize=32)
def _probed(template: str, special_tokens: str) -> Format | None:
    # Imported here: jinja2 is what takes longest to import.
    from quintet.tokenization.sandbox import CompiledTemplate

    compiled = CompiledTemplate(template)

    def write(arguments: Sequence[Any], content: str | None) -> str | None:
        calls = [
            {"id": name, "type": "function", "function": {"name": name, "arguments": value}}
            for name, value in zip(_NAMES, arguments, strict=True)
        ]
        question = {"role": "user", "content": "probe"}
        answered = {"role": "assistant", "content": content, "tool_calls": calls}
        seen: dict[str, Any] = {"messages": [question, answered], "tools": None, "documents": None}
        seen |= {"add_generation_prompt": False, **json.loads(special_tokens)}
        try:
            return render_chat(compiled, seen).text
        except ChatTemplateError:
            return None

    mappings = [{f"key_of_{name}": "value"} for name in _NAMES]
    texts = [json.dumps(mapping) for mapping in mappings]
    tight = [json.dumps(mapping, separators=(",", ":")) for mapping in mappings]
    tried: list[tuple[Literal["text", "mapping"], Sequence[Any], list[list[str]]]] = [
        ("text", tight, [tight]),
        ("mapping", mappings, [texts, tight]),
    ]
    for kind, given, spellings in tried:
        written = write(given, None)
        for spelling in spellings if written is not None else ():
            if found := _read(written or "", spelling):
                beside = write(given, "probe text") is not None
                return replace(found, arguments=kind, text_before=beside)
    # It has no place for calls of the past, but may tell the model how to write them.
    return next((known for known in _KNOWN if known.trigger in template), None)


def _read(text: str, arguments: Sequence[str]) -> Format | None:
    """Return the format of a text with two known calls, or None."""
    ends: list[tuple[int, int]] = []
    place = 0
    for part in (_NAMES[0], arguments[0], _NAMES[1], arguments[1]):
        place = text.find(part, place)
        if place < 0:
            return None
        ends.append((place, place := place + len(part)))
    (name, name_end), (argument, argument_end), (second, _), (_, last) = ends
    for known in _KNOWN:
        opener, closer = known.opens[-1], known.closes[0]
        start, joint = text.rfind(opener, 0, name), text[argument_end:second]
        if start < 0 or closer not in joint or opener not in joint:
            continue
        after = joint[: joint.index(closer) + len(closer)]
        rest = text[last:].removeprefix(after)
        return replace(
            known,
            begin=known.begin if text.endswith(known.begin, 0, start) else "",
            before_name=text[start:name],
            before_arguments=text[name_end:argument],
            after_arguments=after,
            between=joint[len(after) : joint.rindex(opener)],
            end=known.end if rest.startswith(known.end) else "",
        )
    return None

"""Finds the model's own turns in a conversation rendered by its chat template.

An answer is what stands behind the prompt that asks for it: the messages before it, written with
`add_generation_prompt`. That holds for every template, and is what the model goes on from when it
is used. Where a template writes an answer otherwise once others follow, as those do that cut
thoughts out of the past, one text cannot hold both; then there are several.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quintet.parsing.format import END_THINK, THINK
from quintet.training.data.records import Bad

Message = dict[str, Any]
# What is kept of the thoughts in a message whose template has no place for them: the thoughts
# with the space around them, and the space behind their end.
THOUGHT, GAP = "thought", "gap"


@dataclass(frozen=True, slots=True)
class Written:
    """A text, and the parts of it that are learned."""

    text: str
    spans: tuple[tuple[int, int], ...]


def apart(message: Mapping[str, Any], template: str) -> Message:
    """Return a message with its thoughts split off, as its template keeps them.

    A template that looks for the end of thoughts in what was said would cut them off.
    """
    one = {name: value for name, value in message.items() if value is not None}
    one.setdefault("content", None)
    if one["role"] != "assistant":
        return one
    content, thought, gap = one["content"], one.pop("reasoning_content", None), ""
    written = END_THINK in template or THINK in template
    if thought is None and written and isinstance(content, str) and END_THINK in content:
        before, _, rest = content.partition(END_THINK)
        thought = before.lstrip().removeprefix(THINK)
        one["content"] = rest.lstrip("\n")
        gap = rest[: len(rest) - len(one["content"])]
    elif thought is not None:
        thought, gap = f"\n{thought.strip()}\n", "\n\n"
    if thought is not None and "reasoning_content" in template:
        one["reasoning_content"] = thought.strip("\n")
    elif thought is not None:
        one[THOUGHT], one[GAP] = thought, gap
    return one


class Turns:
    """Writes conversations of one template.

    Args:
        write: writes messages, and what asks for the next answer if the second argument is true.
        closings: the tokens that can end a turn.
        end: the token that closes an answer which the template leaves open; None to refuse it.
        calls_end: what the model writes behind its last call, where a template may forget it.
    """

    def __init__(
        self,
        write: Callable[[Sequence[Message], bool], str],
        closings: Sequence[str],
        end: str | None,
        calls_end: str,
    ) -> None:
        self._write, self._closings = write, tuple(closings)
        self._end, self._calls_end = end, calls_end

    def written(self, messages: Sequence[Message], first: int, *, last: bool) -> list[Written]:
        """Return texts that hold each answer once, behind its prompt.

        Args:
            messages: with thoughts `apart`.
            first: the first message that may be an answer to learn.
            last: whether only the last answer is learned.

        Raises:
            Bad: nothing in it is an answer, or the template leaves out a part of one.
        """
        # Nothing asks for what is said first.
        places = [
            place
            for place, message in enumerate(messages)
            if message["role"] == "assistant" and place >= max(first, 1)
        ]
        if not places:
            raise Bad("no answer to learn", "the assistant says nothing that was asked for")
        found = []
        for place in places[-1:] if last else places:
            prompt, answer = self._answer(messages, place)
            found.append((len(prompt), len(answer.rstrip()), prompt + answer))
        *earlier, (start, length, whole) = found
        check_written(messages[: places[-1]], whole)
        spans, others = [], []
        for begin, size, text in earlier:
            span = (begin, begin + size)
            if whole.startswith(text):
                spans.append(span)
            else:
                others.append(Written(text, (span,)))
        return [*others, Written(whole, (*spans, (start, start + length)))]

    def _answer(self, messages: Sequence[Message], place: int) -> tuple[str, str]:
        """Return the prompt of an answer, and the answer up to the text behind it."""
        message = messages[place]
        prompt = self._write(_plain(messages[:place]), True)
        conversation = _plain(messages[: place + 1])
        thinks = prompt.rstrip().endswith(THINK)
        if THOUGHT in message:
            return prompt, self._closed(message, self._thought(prompt, message, conversation))
        whole = self._write(conversation, False)
        if thinks and not whole.startswith(prompt):
            raise Bad(
                "an answer without thoughts",
                f"the chat template begins answers with {THINK}; write thoughts before it, or "
                f"{THINK}\\n\\n{END_THINK}\\n\\n for none",
            )
        if not whole.startswith(prompt):
            raise Bad(
                "an answer the template does not ask for",
                "what the chat template writes of it does not begin as its prompt for answers "
                "ends, so that the model would learn what it is never asked",
            )
        answer = whole[len(prompt) :]
        check_written([message], answer)
        return prompt, self._closed(message, answer)

    def _thought(self, prompt: str, message: Message, conversation: list[Message]) -> str:
        """Return an answer with the thoughts that the template would cut off."""
        thought, gap = message[THOUGHT], message[GAP]
        opened = prompt.rstrip().endswith(THINK)
        if not opened and prompt.rstrip().endswith(END_THINK):
            raise Bad(
                "thoughts where none are asked for",
                f"the chat template ends them before the answer; set its switch, as in "
                f"data.template = {{ thinking = true }}, or leave what is before {END_THINK} out",
            )
        if opened:
            # The space that the prompt ends with is not said again.
            thought = thought.removeprefix(prompt[len(prompt.rstrip()) :])
        tag = f"end{secrets.token_hex(8)}"
        marked = self._write([*conversation[:-1], {**conversation[-1], "content": tag}], False)
        _, found, rest = marked.rpartition(tag)
        if not found:
            raise Bad("an answer the template leaves out", "its content is not in the text")
        opening = "" if opened else THINK
        return f"{opening}{thought}{END_THINK}{gap}{conversation[-1]['content'] or ''}{rest}"

    def _closed(self, message: Message, answer: str) -> str:
        """Return an answer that ends where the turn does."""
        if answer.rstrip().endswith(self._closings):
            return answer
        if self._end is None:
            raise Bad(
                "an answer without an end",
                "the chat template does not close it, and the tokenizer has no end-of-text token",
            )
        closed = answer.rstrip()
        if message.get("tool_calls") and not closed.endswith(self._calls_end):
            closed += self._calls_end
        return closed + self._end


def _plain(messages: Sequence[Message]) -> list[Message]:
    """Return messages as the template sees them."""
    own = (THOUGHT, GAP)
    return [{k: v for k, v in one.items() if k not in own} for one in messages]


def check_written(messages: Sequence[Message], text: str) -> None:
    """Refuse a text that lacks a part of its messages.

    Raises:
        Bad: it is.
    """
    for place, message in enumerate(messages):
        # Results of tools may be written in other forms.
        if message["role"] not in ("system", "user", "assistant"):
            continue
        content = message["content"]
        parts = content if isinstance(content, list) else [{"text": content}]
        for part in parts:
            own_text = part.get("text")
            if isinstance(own_text, str) and own_text.strip() not in text:
                raise Bad(
                    "a message the chat template leaves out",
                    f"messages[{place}] of the {message['role']} is not in what it writes",
                )

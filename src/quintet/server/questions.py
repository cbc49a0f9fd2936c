"""Protocol-independent questions, and the events of their answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quintet.parsing.events import Event
from quintet.server.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The messages so far.

    Attributes:
        messages: as chat templates know them: role, content (a string or None), tool_calls,
            tool_call_id, name, reasoning_content. Arguments of calls may be a string or a mapping.
        tools: {"type": "function", "function": {"name", "description", "parameters"}}.
        template_kwargs: what else the template is to see.
        thinking: think before the answer, or not; None for what the template does.
        continued: go on with the last message rather than begin one.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    thinking: bool | None = None
    continued: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A question to a model.

    Attributes:
        prompt: a conversation, or ids, whose continuation is all content.
        where: the field of the request that has it.
        sampling: how tokens are chosen.
        max_tokens: how many an answer has at the most; None for what there is room for, up to
            `usual_tokens`.
        usual_tokens: how many it has where nobody says.
        stop: texts that end an answer and are not part of it.
        logprobs: how many of the likeliest tokens to tell beside each; 0 for the token alone, None
            for none.
        prompt_logprobs: the same for the tokens of the prompt.
        n: how many answers.
        tool_choice: "auto", "none", "required" or the name of a tool.
        parallel_tool_calls: whether there may be more than one call.
        response_format: {"type": "json_object"}, {"type": "json_schema", "schema": …}, {"type":
            "regex", "pattern": …} or {"type": "grammar", "grammar": …}; None for any text.
        form_where: the field of the request that has it.
        scope: whose question it is.
        salt: only questions of the same one share what was read before.
        priority: the higher are the last to give their row back.
        timeout: how many seconds it may take.
    """

    prompt: Conversation | tuple[int, ...]
    where: str = "prompt"
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    usual_tokens: int = 4096
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    response_format: Mapping[str, Any] | None = None
    form_where: str = "response_format"
    scope: str = ""
    salt: str = ""
    priority: int = 0
    timeout: float | None = None

    def scores(self, context: int) -> int:
        """Return the maximum number of token scores of the answers, for a context."""
        count = 0
        if self.logprobs is not None:
            tokens = self.usual_tokens if self.max_tokens is None else self.max_tokens
            count += self.n * min(tokens, context) * (1 + self.logprobs)
        if self.prompt_logprobs is not None and not isinstance(self.prompt, Conversation):
            count += len(self.prompt) * (1 + self.prompt_logprobs)
        return count

    @property
    def binding(self) -> str:
        """The name of the request's field that sets the answer's form."""
        tools = isinstance(self.prompt, Conversation) and bool(self.prompt.tools)
        return "tools" if tools and self.tool_choice != "none" else self.form_where


@dataclass(frozen=True, slots=True)
class TokenScore:
    """The log-probability of a token under the raw logits.

    Attributes:
        id: of the token.
        text: as it is spelt; half of a character is U+FFFD.
        raw: its bytes.
        logprob: its logarithm; None for the first of a prompt, before which nothing is.
        top: the likeliest tokens in its place, without a `top` of their own.
    """

    id: int
    text: str
    raw: bytes
    logprob: float | None
    top: tuple["TokenScore", ...] = ()


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token counts.

    Attributes:
        prompt: of the prompt, which all answers share.
        cached: of these, those that were read before.
        completion: that were generated, for this answer.
        reasoning: of these, those of what was thought.
    """

    prompt: int
    cached: int
    completion: int
    reasoning: int


@dataclass(frozen=True, slots=True)
class Start:
    """The question was accepted; the first event, index 0.

    Attributes:
        prompt: how many tokens it has.
        warnings: what of it has no effect here.
    """

    prompt: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompted:
    """The prompt was read; sent if its scores were requested."""


@dataclass(frozen=True, slots=True)
class Finish:
    """An answer is complete; its last event.

    Attributes:
        reason: "stop", "length" or "tool_calls".
        usage: how many tokens it took.
        stop: the stop string that ended it, if one did.
    """

    reason: str
    usage: Tokens
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class AnswerEvent:
    """An event of an answer.

    Attributes:
        index: of which, from 0.
        event: what it is.
        scores: of the tokens it was written in, where they were asked for.
    """

    index: int
    event: Event | Start | Prompted | Finish
    scores: tuple[TokenScore, ...] = ()

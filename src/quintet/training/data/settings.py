"""The `[data]` table: the files, the kind of their records, and the making of rows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from quintet.training.schedules import Number
from quintet.training.settings import SettingError
from quintet.training.spans import span

# Tokens of a batch at most: more of them than memory has bytes for is a slip.
MOST = 2**31 - 1

Format = Literal["text", "lines", "jsonl", "parquet", "arrow"]
Kind = Literal["text", "chat", "completion", "pairs"]
Packing = Literal["stream", "whole", "padded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldNames:
    """The names of a record's fields.

    Attributes:
        text: of a document.
        messages: of a conversation.
        tools: what may be called in a conversation.
        prompt: what is answered.
        completion: the answer to it.
        chosen: the preferred of two answers.
        rejected: the other.
    """

    text: str = "text"
    messages: str = "messages"
    tools: str = "tools"
    prompt: str = "prompt"
    completion: str = "completion"
    chosen: str = "chosen"
    rejected: str = "rejected"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSettings:
    """Files that belong together.

    Attributes:
        paths: files, folders, and patterns of them, where `**` is any folders.
        exclude: patterns of paths that are left out, where `*` is any characters.
        format: "text" for files that are a document each, "lines" for files of which each line
            is one, "jsonl", "parquet" or "arrow"; None to tell by the endings of the names.
        kind: what a record holds: a "text", a "chat" of messages, a prompt and its "completion",
            or "pairs" of a better and a worse answer; None to tell by the fields of the first.
        fields: how these fields are called.
        weight: which share of the rows comes from here, a number or a schedule; None for as much as
            there is, of this source and all others.
        undecodable: "bad" to treat a text that is no UTF-8 as a bad sample, "replace" to read it
            with marks where bytes mean nothing.
    """

    paths: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    format: Format | None = None
    kind: Kind | None = None
    fields: FieldNames = field(default_factory=FieldNames)
    weight: Number | None = None
    undecodable: Literal["bad", "replace"] = "bad"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextPhase:
    """A stretch of a training with rows of one length.

    Attributes:
        until: where it ends, from the beginning on: a share, "2000 steps" or "1B tokens".
        context: how many tokens a row has.
    """

    until: float | str
    context: int

    def __post_init__(self) -> None:
        span(self.until, "until")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """The data, and how rows are made of it.

    Attributes:
        sources: where texts come from.
        context: how many tokens a row has, or phases of a training in which they differ.
        batch_tokens: how many tokens a step reads: rows times context.
        batch_rows: how many rows a step reads, instead; of pairs, how many pairs.
        packing: "stream" for documents end to end in full rows, "whole" for as many whole
            documents in a row as fit, "padded" for one in a row; None for "stream" of texts,
            "whole" of conversations and completions, "padded" of pairs.
        windows: "epochs" to read everything once before anything twice, "random" for rows that
            begin anywhere.
        borders: whether documents in a row do not see each other.
        end: what closes a text: true for the tokenizer's end-of-text token, or the name of another,
            or false for nothing.
        control_tokens: whether control tokens that are written in a plain text are read as such; in
            conversations they never are.
        template: what else the chat template asks for, by name, such as thinking = false.
        train_on: what of conversations is learned: what the "assistant" says, only the "last"
            time it speaks, or "all"; of completions "all" is the prompt, too.
        too_long: what becomes of a document that does not fit into a row, but in a stream: it is
            "cut", left out ("drop"), or a bad sample ("bad").
        on_bad: whether a bad sample is an error ("stop"), or left out and counted ("skip").
        held_out: the share of documents that is not learned from but measured by; a text's
            own hash decides.
        held_out_sources: files to measure by, instead.
        seed: what the order follows from.
        cache: the folder where ids are kept, so that texts are encoded once; None for the user's.
    """

    sources: tuple[SourceSettings, ...]
    context: int | tuple[ContextPhase, ...] = 1024
    batch_tokens: int | None = None
    batch_rows: int | None = None
    packing: Packing | None = None
    windows: Literal["epochs", "random"] = "epochs"
    borders: bool = True
    end: bool | str = True
    control_tokens: bool = False
    template: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    train_on: Literal["assistant", "last", "all"] = "assistant"
    too_long: Literal["cut", "drop", "bad"] = "cut"
    on_bad: Literal["stop", "skip"] = "stop"
    held_out: float = 0.0
    held_out_sources: tuple[SourceSettings, ...] = ()
    seed: int = 0
    cache: str | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise SettingError("sources", ": name at least one, with its paths")
        given = [k for k in ("batch_tokens", "batch_rows") if getattr(self, k) is not None]
        if len(given) != 1:
            problem = "both are set" if given else "neither is set"
            raise SettingError("batch_tokens", f" and batch_rows: {problem}; set one of them")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise SettingError(
                f"sources.{weighted.index(False)}.weight",
                ": is missing, and others have one; give every source a weight, or none",
            )
        fixed = [w for source in self.sources if isinstance(w := source.weight, int | float)]
        if any(not 0 <= weight < math.inf for weight in fixed) or (
            len(fixed) == len(self.sources) and not sum(fixed)
        ):
            raise SettingError(
                "sources", f": the weights are {fixed}; they have to be 0 or more, and not all 0"
            )
        if not 0 <= self.held_out < 1:
            raise SettingError.value("held_out", self.held_out, "has to be a share, 0 to below 1")
        if self.held_out and self.held_out_sources:
            raise SettingError(
                "held_out", " and held_out_sources say two things; leave one of them out"
            )
        if not self.phases:
            raise SettingError("context", ": name at least one phase, or a number")
        for phase in self.phases:
            self._check(phase.context)

    @property
    def phases(self) -> tuple[ContextPhase, ...]:
        """The contexts in their order; one where it stays."""
        if isinstance(self.context, int):
            return (ContextPhase(until=1.0, context=self.context),)
        return self.context

    def _check(self, context: int) -> None:
        if context < 2:
            raise SettingError.value(
                "context", context, "has to be 2 or more: a token is predicted from one before it"
            )
        tokens, rows = self.batch_tokens, self.batch_rows
        if tokens is not None and (tokens < context or tokens % context):
            raise SettingError.value(
                "batch_tokens", tokens, f"has to be a multiple of the context, {context}"
            )
        if rows is not None and rows < 1:
            raise SettingError.value("batch_rows", rows, "has to be 1 or more")
        if (tokens or (rows or 0) * context) > MOST:
            raise SettingError.value(
                "batch_rows" if tokens is None else "batch_tokens",
                rows if tokens is None else tokens,
                f"a batch may have {MOST:,} tokens; train.batches makes a step of several",
            )

"""Many prompts from JSON Lines to JSON Lines: one line each, in order, errors in their place."""

import contextlib
import difflib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import click
import torch

from quintet.cli.options import Opened, with_default_length
from quintet.cli.results import draft_counts, finish_reason, speculation_of
from quintet.cli.settings import LARGEST_SEED, applied, drawn, seed_of
from quintet.cli.terminal import Waiting, note
from quintet.errors import InputError, QuintetError, shown
from quintet.generation.config import GenerationConfig

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS = ("prompt", "messages")
# As the command line and other programs call them.
SHORT = {"stop": "stop_strings", "max_tokens": "max_new_tokens"}
# What a line holds beside options comes back with its result, unless it is this near to one.
MISTYPED = 0.85


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the file.

    Attributes:
        index: its number, from 0.
        other: what else it holds, which comes back with the result.
        options: of generate(), for this line alone.
        seed: of its draws; None for that of the command and the line's number.
        ids: the prompt.
        error: what is wrong with it.
    """

    index: int
    other: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    ids: list[int] | None = None
    error: QuintetError | None = None


def run(
    opened: Opened,
    config: GenerationConfig,
    lines: Sequence[str],
    *,
    seed: int,
    batch_size: int,
    quiet: bool,
) -> None:
    """Continue each line and print its result; the exit code is 1 if one of them failed.

    A line's text depends on the seed and its number alone, not on what it runs beside.
    """
    started, tokens, failed = time.perf_counter(), 0, 0
    parsed = (_read(opened, index, line) for index, line in enumerate(lines) if line.strip())
    total, done = sum(bool(line.strip()) for line in lines), 0
    with Waiting(f"0 of {total:,} lines", quiet) as waiting:
        while group := list(islice(parsed, batch_size)):
            for result in _results(opened, config, group, seed):
                failed += "error" in result
                tokens += result.get("new_tokens", 0)
                click.echo(json.dumps(result, ensure_ascii=False))
            done += len(group)
            waiting.text = f"{done:,} of {total:,} lines"
    seconds = time.perf_counter() - started
    note(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s", quiet)
    if failed:
        note(f"{failed} lines failed; their errors are in their places", quiet)
        raise SystemExit(1)


def _results(
    opened: Opened, config: GenerationConfig, group: Sequence[Line], seed: int
) -> Iterator[dict[str, Any]]:
    good = [line for line in group if line.error is None]
    done: dict[int, dict[str, Any]] = {}
    while good:
        alike = [line for line in good if line.options == good[0].options]
        good = [line for line in good if line not in alike]
        # One of them may be to blame: then each alone, so that the others are answered.
        with contextlib.suppress(QuintetError):
            results = _generate(opened, config, alike, seed)
            done |= {line.index: result for line, result in zip(alike, results, strict=True)}
    for line in group:
        error = line.error
        if error is None and line.index not in done:
            try:
                (done[line.index],) = _generate(opened, config, [line], seed)
            except QuintetError as raised:
                error = raised
        if error is not None:
            message = {"type": type(error).__name__, "message": str(error)}
            yield {"index": line.index, **line.other, "error": message}
        else:
            yield {"index": line.index, **line.other, **done[line.index]}


def _generate(
    opened: Opened, config: GenerationConfig, lines: Sequence[Line], seed: int
) -> list[dict[str, Any]]:
    tokenizer = opened.tokenizer
    config = applied(config, drawn(lines[0].options))
    rows = tokenizer.pad(
        {"input_ids": [line.ids for line in lines]}, padding_side="left", return_tensors="pt"
    )
    width = rows["input_ids"].shape[1]
    config = with_default_length(opened, config, width)
    device = opened.model.device
    output = opened.generator_model.generate(
        rows,
        config,
        tokenizer=tokenizer,
        generator=[
            torch.Generator(device).manual_seed(
                (seed + line.index) & LARGEST_SEED if line.seed is None else line.seed
            )
            for line in lines
        ]
        if config.do_sample
        else None,
        return_dict_in_generate=True,
    )
    speculation, results = speculation_of(output), []
    for index, (line, row) in enumerate(zip(lines, output.sequences[:, width:], strict=True)):
        new = _without_padding(row, config)
        result: dict[str, Any] = {
            "text": tokenizer.decode(new, skip_special_tokens=True),
            "finish_reason": finish_reason(config, new),
            "prompt_tokens": len(line.ids or ()),
            "new_tokens": new.numel(),
        }
        results.append(
            result if speculation is None else result | draft_counts(*speculation.of_row(index))
        )
    return results


def _without_padding(row: "Tensor", config: GenerationConfig) -> "Tensor":
    """Return a row up to the token that ends it."""
    ends = [i for i, token in enumerate(row.tolist()) if token in config.eos_token_ids]
    return row[: ends[0] + 1] if ends else row


def _read(opened: Opened, index: int, text: str) -> Line:
    other: dict[str, Any] = {}
    options: dict[str, Any] = {}
    try:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the line is not JSON: {error}") from error
        if isinstance(value, str):
            value = {"prompt": value}
        if not isinstance(value, dict) or sum(name in value for name in PROMPTS) != 1:
            raise InputError("a line has to be a text, or an object with prompt or messages")
        known = {option.name for option in fields(GenerationConfig)}
        value = {SHORT.get(name, name): v for name, v in value.items()}
        options = {name: v for name, v in value.items() if name in known}
        other = {name: v for name, v in value.items() if name not in {*PROMPTS, *known}}
        for name in other:
            if near := difflib.get_close_matches(name, known, n=1, cutoff=MISTYPED):
                raise InputError(f"there is no option {shown(name)}; did you mean {near[0]!r}?")
        return Line(index, other, options, seed_of(other.get("seed")), _ids(opened, value))
    except QuintetError as error:
        return Line(index, other, error=error)


def _ids(opened: Opened, value: dict[str, Any]) -> list[int]:
    if "messages" in value:
        ids = opened.tokenizer.apply_chat_template(value["messages"], add_generation_prompt=True)
    else:
        if not isinstance(value["prompt"], str):
            raise InputError(f"the prompt is {shown(value['prompt'])}; it has to be a text")
        ids = opened.tokenizer.encode(value["prompt"])
    if not ids:
        raise InputError("the prompt is empty")
    room = opened.model.config.max_position_embeddings
    if len(ids) >= room:
        raise InputError(f"the prompt has {len(ids)} tokens and the model's context is {room}")
    return cast("list[int]", ids)

"""`pipeline("text-generation")`: texts continued, chats answered."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from quintet.errors import InputError
from quintet.generation.config import GenerationConfig
from quintet.generation.plan import read_config
from quintet.generation.streamers import Streamer
from quintet.pipelines.base import Pipeline, replaced

if TYPE_CHECKING:
    from quintet.generation.mixin import GenerationMixin

Message = Mapping[str, Any]
Chat = Sequence[Message]
# What holds where neither the checkpoint nor the caller says otherwise, as in Transformers.
NEW_TOKENS = 256
TEMPERATURE = 0.7
# Of generate()'s output: what has a value for every row, and which of it for every step.
STEPWISE = frozenset({"scores", "logits"})
BY_ROW = STEPWISE | {"sequences", "sequences_scores", "beam_indices"}
# What generate() is given of a batch, which is made here.
ROWS = ("inputs", "input_ids", "attention_mask")
NESTED = ("output_attentions", "output_hidden_states")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of text generation, beside those of `generate()`.

    Attributes:
        return_full_text: with the prompt in front, or for a chat the messages before.
        return_text: the other name of `return_full_text=True`, for symmetry with the next.
        return_tensors: the ids (`generated_token_ids`) in place of a text.
        clean_up_tokenization_spaces: as in `tokenizer.decode`.
        skip_special_tokens: leave tokens that are not text out of it.
        prefix: written before every text, and not returned.
        add_special_tokens: those the tokenizer puts around a text.
        truncation: cut longer prompts at the tokenizer's `truncation_side`.
        max_length: of prompt and answer together, as in `generate()`; also of what is cut.
        handle_long_generation: "hole" cuts the prompt from the left such that the answer fits.
        tokenizer_encode_kwargs: further options of `tokenizer(...)` or `apply_chat_template`.
        continue_final_message: go on with a chat's last message; so by default where that is
            the assistant's.
        tools: for the chat template.
        documents: for the chat template.
        stop_sequence: a string, or several, after which an answer ends.
        streamer: gets the tokens of a single input as they are made.
        generator: the source of randomness.
        generation_config: as for `generate()`.
        generation: the other options of `generate()`, by name.
    """

    return_full_text: bool | None = None
    return_text: bool | None = None
    return_tensors: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    skip_special_tokens: bool = True
    prefix: str = ""
    add_special_tokens: bool | None = None
    truncation: bool | str | None = None
    max_length: int | None = None
    handle_long_generation: str | None = None
    tokenizer_encode_kwargs: Mapping[str, Any] = field(default_factory=dict)
    continue_final_message: bool | None = None
    tools: Sequence[Any] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    stop_sequence: str | Sequence[str] | None = None
    streamer: Streamer | None = None
    generator: torch.Generator | None = None
    generation_config: GenerationConfig | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ways = {
            name: value
            for name in ("return_full_text", "return_text", "return_tensors")
            if (value := getattr(self, name)) is not None
        }
        if len(ways) > 1:
            raise InputError(f"{' and '.join(ways)} say the same thing twice; give one of them")
        if self.handle_long_generation not in (None, "hole"):
            raise InputError(
                f"handle_long_generation={self.handle_long_generation!r} has to be 'hole' or None"
            )


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt: a text or a chat, and its ids."""

    item: str | Chat
    ids: list[int]
    continues: bool = False


@dataclass(frozen=True, slots=True)
class Output:
    """The sequences generated for a prompt.

    Attributes:
        prompt: the length of the batch's prompts.
        rows: (copies, …) by the names of `generate()`'s output: sequences and what else there is.
    """

    prompt: int
    rows: Mapping[str, Tensor]


class TextGenerationPipeline(Pipeline):
    """Continues texts, and answers chats with the model's chat template.

    For one input a list of `{"generated_text": …}`, one for each returned sequence; for a list of
    inputs a list of those. The text of a chat is its messages with the answer appended, or with
    `return_full_text=False` the answer's text.
    """

    task = "text-generation"
    suffix = "ForCausalLM"
    options_class = Options

    def __call__(  # type: ignore[override]  # the name is that of Transformers
        self, text_inputs: Any, *, batch_size: int | None = None, **options: Any
    ) -> Any:
        """Continue one text or chat, a list, or a stream of them.

        Args:
            text_inputs: a text; a chat, as a list of messages with role and content; a list or a
                stream of either.
            batch_size: how many run at once.
            **options: see `Options`, and those of `generate()`; `max_new_tokens` is 256 where
                nothing sets a length, or as many as the context has room for, and the answer is
                drawn with temperature 0.7 where neither the checkpoint nor the call says how.

        Raises:
            InputError: an empty text, or an option that does not exist.
            ChatTemplateError: a chat, and the tokenizer has no template for it.
        """
        options = _without_rows(options)
        several = isinstance(text_inputs, list | tuple) and not _is_chat(text_inputs)
        if options.get("streamer") is not None and several and len(text_inputs) > 1:
            raise InputError(f"a streamer takes one input, not {len(text_inputs)}")
        return super().__call__(text_inputs, batch_size=batch_size, **options)

    def with_options(self, base: Any, given: Mapping[str, Any]) -> Options:
        """Return the options, with those that are not ours in `generation`."""
        own = {f.name for f in fields(Options)} - {"generation"}
        mine = {name: value for name, value in given.items() if name in own}
        rest = {name: value for name, value in given.items() if name not in own}
        rest = _without_rows(rest)
        assistant = rest.get("assistant_model")
        if isinstance(assistant, str | os.PathLike):
            raise InputError(
                f"assistant_model={assistant!r} would be loaded at every call; give its name to "
                "pipeline(), or a loaded model"
            )
        nested = [name for name in NESTED if rest.get(name)]
        if nested:
            raise InputError(
                f"{nested[0]} are nested by step and layer, and a result here is flat; call "
                "model.generate() for them"
            )
        if mine.get("generation_config") is not None:
            mine["generation_config"] = read_config(mine["generation_config"])
        changed: Options = replaced(base, mine, self.task)
        return replace(changed, generation={**base.generation, **rest})

    def is_single(self, inputs: Any, options: Options) -> bool:
        """Return whether this is one text or one chat."""
        return isinstance(inputs, str) or _is_chat(inputs)

    def preprocess(self, item: Any, options: Options) -> Sequence[Prompt]:
        """Return the ids of a prompt."""
        if isinstance(item, str):
            part = Prompt(item, self._ids_of_text(item, options))
        elif _is_chat(item):
            part = self._chat(item, options)
        else:
            raise InputError(
                "the input has to be a text, a chat (a list of messages with role and content), "
                f"or several of either, not {type(item).__name__}"
            )
        if options.handle_long_generation == "hole":
            new = self._config(len(part.ids), options).max_new_tokens or NEW_TOKENS
            room = self.model.config.max_position_embeddings - new
            if room < 1:
                raise InputError(
                    f"max_new_tokens={new} leaves no room for a prompt in a context of {room + new}"
                )
            part = replace(part, ids=part.ids[-room:])
        return [part]

    def forward(self, parts: list[Prompt], options: Options) -> list[Output]:
        """Generate a continuation of each prompt."""
        if options.streamer is not None and len(parts) > 1:
            raise InputError(f"a streamer takes one input, not {len(parts)}")
        rows = self.rows([part.ids for part in parts], side="left")
        prompt = rows.input_ids.shape[1]
        more = dict(options.generation)
        tokenizer = more.pop("tokenizer", None) or self.tokenizer
        if options.stop_sequence is not None:
            given = options.stop_sequence
            more["stop_strings"] = [given] if isinstance(given, str) else list(given)
        generated = cast("GenerationMixin", self.model).generate(
            rows.input_ids,
            generation_config=self._config(prompt, options),
            attention_mask=rows.attention_mask,
            tokenizer=tokenizer,
            streamer=options.streamer,
            generator=options.generator,
            **more,
        )
        by_row = {"sequences": generated}
        if isinstance(generated, Mapping):
            by_row = {name: value for name, value in generated.items() if name in BY_ROW}
            # Of every step, (steps, rows, …): the rows come first.
            for name in STEPWISE & by_row.keys():
                by_row[name] = torch.stack(by_row[name], dim=1)
        generated = by_row["sequences"]
        copies = len(generated) // len(parts)
        # The scores of a beam search are those of its beams, not of what it returns.
        split = {
            name: torch.split(value.cpu(), copies)
            for name, value in by_row.items()
            if len(value) == len(generated)
        }
        return [
            Output(prompt, {name: rows[index] for name, rows in split.items()})
            for index in range(len(parts))
        ]

    def postprocess(
        self, parts: Sequence[Prompt], outputs: list[Output], options: Options
    ) -> list[dict[str, Any]]:
        """Return a text, a chat or ids for each sequence, and its requested extras."""
        ((part, output),) = zip(parts, outputs, strict=True)
        prompt = output.prompt
        others = {name: rows.tolist() for name, rows in output.rows.items() if name != "sequences"}
        sequences = output.rows["sequences"]
        if options.return_tensors:
            start = prompt - len(part.ids)
            return [{"generated_token_ids": row[start:].tolist()} for row in sequences]
        answers = self.tokenizer.batch_decode(
            sequences[:, prompt:],
            skip_special_tokens=options.skip_special_tokens,
            clean_up_tokenization_spaces=options.clean_up_tokenization_spaces,
        )
        full = options.return_full_text is not False
        return [
            {
                "generated_text": _joined(part, answer, full),
                **{name: rows[index] for name, rows in others.items()},
            }
            for index, answer in enumerate(answers)
        ]

    def _ids_of_text(self, text: str, options: Options) -> list[int]:
        encode: dict[str, Any] = {**self._encode_options(options)}
        if options.add_special_tokens is not None:
            encode["add_special_tokens"] = options.add_special_tokens
        encode |= options.tokenizer_encode_kwargs
        ids = self.tokenizer.encode(options.prefix + text, **encode)
        if not ids:
            raise InputError("the text is empty; give at least one character to start from")
        return ids

    def _chat(self, chat: Chat, options: Options) -> Prompt:
        continues = options.continue_final_message
        if continues is None:
            # Two messages of the assistant after each other are nothing a model was trained on.
            continues = chat[-1].get("role") == "assistant"
        ids = self.tokenizer.apply_chat_template(
            [dict(message) for message in chat],
            tools=options.tools,
            documents=options.documents,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            **{**self._encode_options(options), **options.tokenizer_encode_kwargs},
        )
        return Prompt(chat, ids, continues)

    def _encode_options(self, options: Options) -> dict[str, Any]:
        if not options.truncation:
            return {}
        longest = options.max_length or self.longest
        return {"truncation": options.truncation, "max_length": longest}

    def _config(self, prompt: int, options: Options) -> GenerationConfig:
        """Return the generation config, with a pipeline's defaults for unset options."""
        config = self.model.generation_config
        if options.generation_config is not None:
            config = options.generation_config.over(config)
        given = options.generation
        if config.do_sample is None and given.get("do_sample") is None:
            config = config.replace(do_sample=True)
            if config.temperature is None and given.get("temperature") is None:
                config = config.replace(temperature=TEMPERATURE)
        if options.max_length is not None:
            config = config.replace(max_length=options.max_length)
        elif given.get("max_new_tokens") is not None:
            config = config.replace(max_new_tokens=given["max_new_tokens"])
        elif not (config.max_new_tokens or config.max_length):
            # Half the context at most: a model with a small one needs room for the prompt.
            context = self.model.config.max_position_embeddings
            new = max(1, min(NEW_TOKENS, context // 2, context - prompt))
            config = config.replace(max_new_tokens=new)
        return config


def _without_rows(options: Mapping[str, Any]) -> dict[str, Any]:
    for name in ROWS:
        if options.get(name) is not None:
            raise InputError(f"{name} is made of the input; call model.generate() for it")
    return {name: value for name, value in options.items() if name not in ROWS}


def _is_chat(item: Any) -> bool:
    is_list = isinstance(item, Sequence) and not isinstance(item, str)
    return is_list and bool(item) and all(isinstance(m, Mapping) and "role" in m for m in item)


def _joined(part: Prompt, answer: str, full: bool) -> str | list[Message]:
    if not full:
        return answer
    if isinstance(part.item, str):
        return part.item + answer
    if part.continues:
        *before, last = part.item
        return [*before, {**last, "content": last["content"] + answer}]
    return [*part.item, {"role": "assistant", "content": answer}]

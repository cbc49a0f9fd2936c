"""`pipeline(task)`: from text to text in one call."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from quintet.auto import AutoModelForCausalLM, AutoTokenizer
from quintet.errors import InputError
from quintet.generation.mixin import GenerationMixin
from quintet.hub import demo_model
from quintet.modeling.placement import single_device

if TYPE_CHECKING:
    from quintet.generation.streamers import Streamer
    from quintet.modeling.base import PreTrainedModel
    from quintet.modeling.placement import DeviceMap
    from quintet.tokenization import PreTrainedTokenizer

__all__ = ["TextGenerationPipeline", "pipeline"]

Message = Mapping[str, Any]
Chat = Sequence[Message]
DEFAULT_NEW_TOKENS = 256


class TextGenerationPipeline:
    """Continues texts, and answers chats with the model's chat template."""

    task = "text-generation"

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizer") -> None:
        if not isinstance(model, GenerationMixin):
            raise InputError(
                f"{type(model).__name__} has no language-modelling head; "
                "load it with AutoModelForCausalLM"
            )
        self.model = model
        self.tokenizer = tokenizer

    def __call__(
        self,
        text_inputs: str | Chat | Sequence[str] | Sequence[Chat],
        *,
        return_full_text: bool = True,
        batch_size: int = 1,
        streamer: "Streamer | None" = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> list[Any]:
        """Generate for one text or chat, or for a list of them.

        Args:
            text_inputs: a text; a chat, as a list of messages with role and content; or a list of
                either.
            return_full_text: with the prompt in front, or for a chat the messages before.
            batch_size: how many run at once.
            streamer: gets the tokens of a single text or chat as they are made.
            generator: the source of randomness.
            **options: as for `generate()`; `max_new_tokens` is 256 where nothing sets a length,
                or as many as the context has room for.

        Returns:
            For one input a list of `{"generated_text": …}`, one for each returned sequence; for a
            list of inputs a list of those. The text of a chat is its messages with the answer
            appended, or with `return_full_text=False` the answer's text.

        Raises:
            InputError: an empty text, or an option that does not exist.
            ChatTemplateError: a chat, and the tokenizer has no template for it.
        """
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} has to be at least 1")
        inputs, is_single = _as_list(text_inputs)
        if streamer is not None and len(inputs) > 1:
            raise InputError(f"a streamer takes one input, not {len(inputs)}")
        results: list[list[dict[str, Any]]] = []
        for start in range(0, len(inputs), batch_size):
            batch = inputs[start : start + batch_size]
            results += self._run(batch, return_full_text, streamer, generator, options)
        return results[0] if is_single else results

    def _default_length(self, prompt: int, options: Mapping[str, Any]) -> int | None:
        """Return how many tokens to make where nobody says so, None where somebody does."""
        for config in (self.model.generation_config, options.get("generation_config")):
            if config is not None and (config.max_new_tokens or config.max_length):
                return None
        if options.get("max_length") is not None:
            return None
        # Half the context at most: a model with a small one needs room for the prompt.
        context = self.model.config.max_position_embeddings
        return max(1, min(DEFAULT_NEW_TOKENS, context // 2, context - prompt))

    def _run(
        self,
        batch: list[str | Chat],
        return_full_text: bool,
        streamer: "Streamer | None",
        generator: torch.Generator | None,
        options: Mapping[str, Any],
    ) -> list[list[dict[str, Any]]]:
        prompts = [self._prompt(item) for item in batch]
        encoded = [
            self.tokenizer.encode(prompt, add_special_tokens=isinstance(item, str))
            for prompt, item in zip(prompts, batch, strict=True)
        ]
        longest = max(len(ids) for ids in encoded)
        options = {"max_new_tokens": self._default_length(longest, options), **options}
        pad = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0
        generated = cast("GenerationMixin", self.model).generate(
            torch.tensor([[pad] * (longest - len(ids)) + ids for ids in encoded]),
            attention_mask=torch.tensor(
                [[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded]
            ),
            streamer=streamer,
            generator=generator,
            **options,
        )
        answers = self.tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
        copies = len(answers) // len(batch)
        return [
            [
                {"generated_text": _joined(item, answer, return_full_text)}
                for answer in answers[index * copies : (index + 1) * copies]
            ]
            for index, item in enumerate(batch)
        ]

    def _prompt(self, item: str | Chat) -> str:
        if isinstance(item, str):
            if not item:
                raise InputError("the text is empty; give at least one character to start from")
            return item
        rendered = self.tokenizer.apply_chat_template(
            [dict(message) for message in item], tokenize=False, add_generation_prompt=True
        )
        return cast("str", rendered)


def pipeline(
    task: str | None = None,
    model: "str | os.PathLike[str] | PreTrainedModel | None" = None,
    *,
    tokenizer: "str | os.PathLike[str] | PreTrainedTokenizer | None" = None,
    dtype: str | torch.dtype = "auto",
    torch_dtype: str | torch.dtype | None = None,
    device: str | int | torch.device | None = None,
    device_map: "DeviceMap" = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
) -> TextGenerationPipeline:
    """Load what a task needs and return it as one callable.

    Args:
        task: "text-generation".
        model: a name, a directory or a loaded model; the packaged demo model if not given.
        tokenizer: likewise; the model's own if not given.
        dtype: of the weights.
        torch_dtype: the older name of `dtype`.
        device: where the model runs.
        device_map: the other name of `device`.
        revision: branch, tag or commit of a hub id.
        token: for private repositories.
        trust_remote_code: accepted, without effect: no code of a repository is ever run.
        model_kwargs: further arguments of `from_pretrained`.

    Raises:
        InputError: an unknown task, a loaded model without its tokenizer, or with an option that
            says how to load it.
    """
    if task not in (None, "text-generation"):
        raise InputError(f"task={task!r} is not one of ['text-generation']")
    if device is not None and device_map is not None:
        raise InputError("device and device_map are two names of the same choice; give one")
    source = demo_model() if model is None else model
    if isinstance(source, str | os.PathLike):
        loaded = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype if torch_dtype is None else torch_dtype,
            device_map=device_map if device is None else device,
            revision=revision,
            token=token,
            **(model_kwargs or {}),
        )
        tokenizer = source if tokenizer is None else tokenizer
    else:
        _refuse_for_loaded(
            dtype=None if dtype == "auto" else dtype,
            torch_dtype=torch_dtype,
            device_map=device_map,
            model_kwargs=model_kwargs,
        )
        loaded = source if device is None else source.to(single_device(device))
    if tokenizer is None:
        raise InputError("a loaded model needs its tokenizer: pipeline(task, model, tokenizer=…)")
    if isinstance(tokenizer, str | os.PathLike):
        places = ("cache_dir", "local_files_only", "subfolder")
        where = {key: value for key, value in (model_kwargs or {}).items() if key in places}
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer, revision=revision, token=token, **where
        )
    return TextGenerationPipeline(loaded, tokenizer)


def _refuse_for_loaded(**options: Any) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise InputError(
            f"the model is loaded already, so {', '.join(given)} would have no effect; "
            "pass it to from_pretrained"
        )


def _as_list(inputs: Any) -> tuple[list[str | Chat], bool]:
    """Return the inputs as a list, and whether there was only one."""
    if isinstance(inputs, str) or _is_chat(inputs):
        return [inputs], True
    items = [] if isinstance(inputs, Mapping) or not isinstance(inputs, Iterable) else list(inputs)
    if not items or not all(isinstance(item, str) or _is_chat(item) for item in items):
        raise InputError(
            "the input has to be a text, a chat (a list of messages with role and content), "
            "or a list of either that is not empty"
        )
    return items, False


def _is_chat(item: Any) -> bool:
    is_list = isinstance(item, Sequence) and not isinstance(item, str)
    return is_list and bool(item) and all(isinstance(message, Mapping) for message in item)


def _joined(item: str | Chat, answer: str, full: bool) -> str | list[Message]:
    if not full:
        return answer
    if isinstance(item, str):
        return item + answer
    return [*item, {"role": "assistant", "content": answer}]

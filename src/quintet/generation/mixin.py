"""`generate()`: from arguments and config to the decode loop."""

import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from quintet.cache import Cache, StaticCache
from quintet.configuration.base import PreTrainedConfig
from quintet.errors import ContextLengthError, InputError
from quintet.generation.config import GenerationConfig
from quintet.generation.decode import LanguageModel, Prompt, decode
from quintet.generation.healing import heal
from quintet.generation.processors import Chooser
from quintet.generation.streamers import Streamer
from quintet.ops.token_ids import check_token_ids
from quintet.tokenization import PreTrainedTokenizer

__all__ = ["GenerationMixin"]


class GenerationMixin:
    """Adds `generate()` to a model with a language-modelling head."""

    config: PreTrainedConfig
    generation_config: GenerationConfig

    def new_cache(self) -> Cache:
        """Return an empty cache of the kind the model grows."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | Mapping[str, Tensor] | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        tokenizer: PreTrainedTokenizer | None = None,
        streamer: Streamer | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue each row of a prompt and return prompt and continuation, (B, T + new).

        Rows that end early are filled with the pad token.

        Args:
            inputs: (B, T) ids, or what the tokenizer returns.
            generation_config: how to generate; what it does not set is as in the model's own.
            input_ids: the other name of `inputs`.
            attention_mask: (B, T), 0 for padding, on either side; without it, nothing is.
            tokenizer: what `token_healing` needs to know which tokens begin alike.
            streamer: gets the prompt and then every token as it is made.
            generator: the source of randomness; a seeded one makes sampling repeatable.
            **options: fields of `GenerationConfig` that go before both configs.

        Raises:
            InputError: no prompt, an unknown option, or a value that breaks its rule.
            ContextLengthError: the prompt fills the model's context.
        """
        ids, mask = _prompt(inputs, input_ids, attention_mask)
        check_token_ids(ids, self.config.vocab_size)
        ids = ids.to(self._device())
        mask = None if mask is None else mask.to(ids.device)
        config = self.generation_config
        if generation_config is not None:
            if not isinstance(generation_config, GenerationConfig):
                raise InputError(
                    f"generation_config is a {type(generation_config).__module__}."
                    f"{type(generation_config).__name__}; it has to be quintet's GenerationConfig"
                )
            config = generation_config.over(config)
        config = config.replace(**options)
        _warn_of_idle(config, options)
        _check_generator(generator, ids.device)
        copies = config.num_return_sequences or 1
        if copies > 1:
            if not config.do_sample:
                raise InputError(
                    f"num_return_sequences={copies} without sampling would be "
                    "the same text each time; set do_sample=True"
                )
            ids = ids.repeat_interleave(copies, dim=0)
            if mask is not None:
                mask = mask.repeat_interleave(copies, dim=0)
        room = self._room(ids.shape[1], config)
        _check_least(config, room, self.config.vocab_size)
        prompt = Prompt.left_padded(ids, mask)
        first = None
        if config.token_healing:
            if tokenizer is None:
                raise InputError("token_healing=True needs the tokenizer: generate(tokenizer=…)")
            prompt, first = heal(prompt, tokenizer, self.config.vocab_size)
            if first is not None:
                ids, room = prompt.ids, room + 1
        eos = torch.tensor(config.eos_token_ids, dtype=torch.long, device=ids.device)

        if streamer is not None:
            streamer.put(ids.cpu())
        tokens = []
        for token in decode(
            cast("LanguageModel", self),
            prompt,
            Chooser.from_config(config, first=first, generator=generator),
            cache=self._cache_for(config, ids.shape[1] + room),
            max_new_tokens=room,
            eos=eos,
            pad=_pad_token(config),
        ):
            tokens.append(token)
            if streamer is not None:
                streamer.put(token.cpu())
        if streamer is not None:
            streamer.end()
        return torch.cat((ids, *(token[:, None] for token in tokens)), dim=1)

    def _device(self) -> torch.device:
        return next(cast("torch.nn.Module", self).parameters()).device

    def _cache_for(self, config: GenerationConfig, length: int) -> Cache | None:
        if config.use_cache is False:
            return None
        if config.cache_implementation == "static":
            return StaticCache(self.config, max_cache_len=length)
        return self.new_cache()

    def _room(self, length: int, config: GenerationConfig) -> int:
        """Return how many tokens to make at the most."""
        context = self.config.max_position_embeddings
        if length >= context:
            raise ContextLengthError(
                f"the prompt has {length} tokens and the model's context is {context} "
                "(max_position_embeddings), with none left to generate; shorten the prompt"
            )
        if config.max_new_tokens is not None:
            wanted = config.max_new_tokens
        elif config.max_length is not None:
            wanted = config.max_length - length
            if wanted < 1:
                raise InputError(
                    f"the prompt has {length} tokens and max_length={config.max_length} counts "
                    "them; set max_new_tokens, or a larger max_length"
                )
        else:
            wanted = 20
        if length + wanted > context:
            warnings.warn(
                f"a prompt of {length} and {wanted} new tokens do not fit the model's context of "
                f"{context}; at most {context - length} are made",
                stacklevel=4,
            )
        return min(wanted, context - length)


def _prompt(
    inputs: Tensor | Mapping[str, Tensor] | None,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    if inputs is not None and input_ids is not None:
        raise InputError("inputs and input_ids are two names of the same argument; give one")
    given = input_ids if inputs is None else inputs
    if isinstance(given, Mapping):
        unknown = set(given) - {"input_ids", "attention_mask"}
        if "input_ids" not in given or unknown:
            raise InputError(
                f"a mapping as inputs has {sorted(given)}; it has to have input_ids, "
                "and may have attention_mask"
            )
        if attention_mask is None:
            attention_mask = given.get("attention_mask")
        given = given["input_ids"]
    if given is None:
        raise InputError("there is no prompt; give inputs, for example tokenizer(text)")
    if not isinstance(given, Tensor):
        raise InputError(
            f"input_ids is a {type(given).__name__}, not a tensor; "
            "call the tokenizer with return_tensors='pt'"
        )
    if given.ndim != 2 or given.numel() == 0:
        raise InputError(
            f"the prompt has shape {tuple(given.shape)}; it has to be (batch, tokens) with at "
            "least one token (is it empty?)"
        )
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor):
            raise InputError(
                f"attention_mask is a {type(attention_mask).__name__}, not a tensor; "
                "call the tokenizer with return_tensors='pt'"
            )
        if attention_mask.shape != given.shape:
            raise InputError(
                f"attention_mask has shape {tuple(attention_mask.shape)} and input_ids "
                f"{tuple(given.shape)}; they have to be the same"
            )
        if not bool(attention_mask.any(dim=1).all()):
            raise InputError("attention_mask leaves a row without a single token")
    return given, attention_mask


def _warn_of_idle(config: GenerationConfig, options: Mapping[str, Any]) -> None:
    if config.do_sample:
        return
    usual = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
    for name in usual:
        if (value := options.get(name)) is not None and value != usual[name]:
            warnings.warn(f"{name}={value} has no effect without do_sample=True", stacklevel=4)


def _check_least(config: GenerationConfig, room: int, vocab_size: int) -> None:
    """Check what `min_new_tokens` needs: room for them, and ends that can be forbidden."""
    if config.min_new_tokens is None:
        return
    if config.min_new_tokens > room:
        raise InputError(
            f"min_new_tokens={config.min_new_tokens} and there is room for {room} new tokens; "
            "raise max_new_tokens, or lower min_new_tokens"
        )
    if any(token >= vocab_size for token in config.eos_token_ids):
        raise InputError(
            f"eos_token_id={config.eos_token_id} is outside of the vocabulary, 0 to "
            f"{vocab_size - 1}"
        )


def _check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    if generator is not None and generator.device.type != device.type:
        raise InputError(
            f"the generator is on {generator.device} and the model on {device}; "
            f"make it with torch.Generator('{device}')"
        )


def _pad_token(config: GenerationConfig) -> int:
    if config.pad_token_id is not None:
        return config.pad_token_id
    return config.eos_token_ids[0] if config.eos_token_ids else 0

"""`generate()`: from arguments and config to the decode loop."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from quintet.cache import Cache
from quintet.configuration.base import PreTrainedConfig
from quintet.errors import ContextLengthError, InputError
from quintet.generation.caches import Request, open_cache
from quintet.generation.config import GenerationConfig
from quintet.generation.decode import Forward, LanguageModel, decode
from quintet.generation.healing import HealedTokenLogitsProcessor, heal
from quintet.generation.outputs import GenerateDecoderOnlyOutput, Record
from quintet.generation.processors.assemble import Processor, Setting, assemble
from quintet.generation.processors.base import LogitsProcessor
from quintet.generation.processors.words import PrefixAllowedTokens
from quintet.generation.prompt import Prompt, read_prompt
from quintet.generation.sampler import Generators, Sampler, row_generators
from quintet.generation.stopping import (
    Criterion,
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    Stopping,
    StoppingCriteriaList,
    StopStringCriteria,
)
from quintet.generation.streamers import Streamer
from quintet.generation.text import Text
from quintet.tokenization import PreTrainedTokenizer

__all__ = ["GenerationMixin"]

# What a checkpoint may set without a need, and the value that asks for nothing.
_SAMPLING = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
_BEAMS = {"early_stopping": False, "length_penalty": 1.0}
_OUTPUTS = {
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}


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
        logits_processor: Sequence[Processor] | None = None,
        stopping_criteria: Sequence[Criterion] | None = None,
        prefix_allowed_tokens_fn: PrefixAllowedTokens | None = None,
        *,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        tokenizer: PreTrainedTokenizer | None = None,
        streamer: Streamer | None = None,
        generator: Generators | None = None,
        **options: Any,
    ) -> Any:
        """Continue each row of a prompt and return prompt and continuation, (B, T + new).

        Rows that end early are filled with the pad token.

        Args:
            inputs: (B, T) ids, or what the tokenizer returns.
            generation_config: how to generate; what it does not set is as in the model's own.
            logits_processor: further processors, behind those that the options ask for.
            stopping_criteria: what else ends a row.
            prefix_allowed_tokens_fn: the ids that may come next, from a row's index and its ids.
            input_ids: the other name of `inputs`.
            inputs_embeds: (B, T, C) to run over in place of the ids; without ids, what is
                returned begins behind it.
            attention_mask: (B, T), 0 for padding, on either side; without it, nothing is.
            past_key_values: the cache of an earlier call that has run over the beginning of these
                rows; or, with an attention_mask of all, over what comes before them.
            negative_prompt_ids: (B, T) what `guidance_scale` leads away from; the last token of
                the prompt if not given.
            negative_prompt_attention_mask: (B, T), 0 for padding.
            tokenizer: what `stop_strings` and `token_healing` need.
            streamer: gets the prompt and then every token as it is made.
            generator: the source of randomness, one or one for each row; seeded, it makes
                sampling repeatable, each row whatever the others are.
            **options: fields of `GenerationConfig` that go before both configs.

        Returns:
            The ids; or with `return_dict_in_generate` a `GenerateDecoderOnlyOutput`, of beams a
            `GenerateBeamDecoderOnlyOutput`.

        Raises:
            InputError: no prompt, an unknown option, or a value that breaks its rule.
            ContextLengthError: the prompt fills the model's context.
        """
        config = self._configured(generation_config, options)
        device = self._device()
        prompt = read_prompt(
            inputs,
            input_ids,
            inputs_embeds,
            attention_mask,
            past_key_values,
            vocab_size=self.config.vocab_size,
            device=device,
        )
        copies = _copies(config)
        own = list(stopping_criteria or ())
        held = past_key_values.get_seq_length() if past_key_values and prompt.all_new else 0
        room = self._room(prompt, held, config, StoppingCriteriaList(own).max_length)
        _check_least(config, room, self.config.vocab_size)

        text = Text(prompt.ids, prompt.text_padding())
        given, first = prompt.given, []
        if config.token_healing:
            if tokenizer is None:
                raise InputError("token_healing=True needs the tokenizer: generate(tokenizer=…)")
            text, allowed = heal(text, tokenizer, self.config.vocab_size)
            if allowed is not None:
                prompt = Prompt(text.ids, text.ids, text.ids, text.padding, prompt.all_new)
                given, room = prompt.given, room + 1
                first.append(HealedTokenLogitsProcessor(allowed, _lengths(text)))
        text = Text(text.ids, text.padding, room=room)

        record = Record.of(config)
        cache = self._cache_for(config, past_key_values, held + prompt.width + room)
        forward = Forward(
            cast("LanguageModel", self),
            cache,
            record=record,
            outlives=past_key_values is not None or record.asked,
        )
        if streamer is not None:
            streamer.put(given.repeat_interleave(copies, dim=0).cpu())
        made = forward.prefill(
            prompt.inputs, prompt.padding, all_new=prompt.all_new, chunk=config.prefill_chunk_size
        )
        forward.repeat(copies)
        text.select(torch.arange(len(given), device=device).repeat_interleave(copies))
        setting = Setting(
            prompt=text.cut(len(text)),
            room=room,
            vocab_size=self.config.vocab_size,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            first=cast("list[LogitsProcessor]", first),
        )
        sampler = Sampler(
            assemble(config, setting, logits_processor or ()),
            do_sample=bool(config.do_sample),
            generators=row_generators(generator, len(given), copies, device),
        )
        decode(
            forward,
            made.repeat(copies),
            text,
            sampler,
            _stopping(config, own, tokenizer, device),
            room=room,
            pad=_pad_token(config),
            record=record,
            streamer=streamer,
        )
        if streamer is not None:
            streamer.end()
        given = given.repeat_interleave(copies, dim=0)
        sequences = torch.cat((given, text.ids[:, given.shape[1] :]), dim=1)
        if not record.asked:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            past_key_values=forward.cache,
            **cast("dict[str, Any]", record.fields()),
        )

    def _configured(
        self, given: GenerationConfig | None, options: Mapping[str, Any]
    ) -> GenerationConfig:
        config = self.generation_config
        if given is not None:
            if not isinstance(given, GenerationConfig):
                raise InputError(
                    f"generation_config is a {type(given).__module__}."
                    f"{type(given).__name__}; it has to be quintet's GenerationConfig"
                )
            config = given.over(config)
        config = config.replace(**options)
        _warn_of_idle(config, options)
        return config

    def _device(self) -> torch.device:
        return next(cast("torch.nn.Module", self).parameters()).device

    def _cache_for(self, config: GenerationConfig, past: Cache | None, length: int) -> Cache | None:
        if past is not None:
            return past
        if config.use_cache is False:
            return None
        length = config.max_cache_len or length
        request = Request(
            config=self.config, grown=self.new_cache, length=length, nbits=config.cache_bits
        )
        return open_cache(config.cache_kind, request)

    def _room(
        self, prompt: Prompt, held: int, config: GenerationConfig, max_length: int | None
    ) -> int:
        """Return how many tokens to make at the most."""
        context, length = self.config.max_position_embeddings, held + prompt.width
        if length >= context:
            raise ContextLengthError(
                f"the prompt has {length} tokens and the model's context is {context} "
                "(max_position_embeddings), with none left to generate; shorten the prompt"
            )
        if max_length is None and config.max_new_tokens is None:
            max_length = config.max_length
        if max_length is not None:
            wanted = max_length - prompt.width
            if wanted < 1:
                raise InputError(
                    f"the prompt has {prompt.width} tokens and max_length={max_length} counts "
                    "them; set max_new_tokens, or a larger max_length"
                )
        else:
            wanted = config.max_new_tokens or 20
        if length + wanted > context:
            warnings.warn(
                f"a prompt of {length} and {wanted} new tokens do not fit the model's context of "
                f"{context}; at most {context - length} are made",
                stacklevel=4,
            )
        return min(wanted, context - length)


def _copies(config: GenerationConfig) -> int:
    copies = config.num_return_sequences or 1
    if copies > 1 and not config.do_sample:
        raise InputError(
            f"num_return_sequences={copies} without sampling would be "
            "the same text each time; set do_sample=True, or num_beams"
        )
    return copies


def _lengths(text: Text) -> int | Tensor:
    return len(text) if text.padding is None else text.lengths()


def _stopping(
    config: GenerationConfig,
    own: list[Criterion],
    tokenizer: PreTrainedTokenizer | None,
    device: torch.device,
) -> Stopping:
    """Return what ends rows; one of the caller's takes the place of one of the same class."""
    asked: list[Criterion] = []
    if config.max_time is not None:
        asked.append(MaxTimeCriteria(config.max_time))
    if config.stop_strings is not None:
        if tokenizer is None:
            raise InputError(
                f"stop_strings={config.stop_strings!r} needs the tokenizer: generate(tokenizer=…)"
            )
        asked.append(StopStringCriteria(tokenizer, config.stop_strings))
    kinds = {type(criterion) for criterion in own}
    ends = [] if EosTokenCriteria in kinds else config.eos_token_ids
    criteria = [criterion for criterion in asked if type(criterion) not in kinds]
    # Its length is that of the loop already.
    criteria += [criterion for criterion in own if type(criterion) is not MaxLengthCriteria]
    eos = torch.tensor(ends, dtype=torch.long, device=device)
    return Stopping(eos, StoppingCriteriaList(criteria))


def _warn_of_idle(config: GenerationConfig, options: Mapping[str, Any]) -> None:
    for applies, names, needed in (
        (config.do_sample, _SAMPLING, "do_sample=True"),
        ((config.num_beams or 1) > 1, _BEAMS, "num_beams above 1"),
        (config.return_dict_in_generate, _OUTPUTS, "return_dict_in_generate=True"),
    ):
        for name, usual in names.items() if not applies else ():
            if (value := options.get(name)) is not None and value != usual:
                warnings.warn(f"{name}={value} has no effect without {needed}", stacklevel=5)


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


def _pad_token(config: GenerationConfig) -> int:
    if config.pad_token_id is not None:
        return config.pad_token_id
    return config.eos_token_ids[0] if config.eos_token_ids else 0

"""The options of `generate()`, and their rules."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, get_type_hints, runtime_checkable

from quintet.configuration.constraints import (
    Bounds,
    Count,
    NonNegative,
    NonNegativeFloat,
    Positive,
    check,
)
from quintet.errors import InputError, shown
from quintet.generation.cache_choice import CACHE_BITS, CACHES, CacheChoice, choose_cache
from quintet.generation.conflicts import idle
from quintet.generation.modes import GenerationMode
from quintet.generation.sequence_bias import read_biases
from quintet.generation.watermarking import WatermarkingConfig

SCHEDULES = ("constant", "heuristic", "heuristic_transient")


@runtime_checkable
class _Dictable(Protocol):
    """Transformers' object for a mapping."""

    def to_dict(self) -> dict[str, Any]: ...


Share = Annotated[float, Bounds(0, 1)]
# What a tensor of ids holds.
TokenId = Annotated[int, Bounds(0, 2**31 - 1)]
Ids = list[TokenId]
# -1 is taken for none.
EndId = Annotated[int, Bounds(-1, 2**31 - 1)]
# What float32 holds, with room to compute.
Number = Annotated[float, Bounds(-1e30, 1e30)]
# The length of any text to this power is a number.
Power = Annotated[float, Bounds(-30, 30)]
# Every row has memory set aside: what nobody can mean is refused before.
Beams = Annotated[int, Bounds(1, 10_000)]
Copies = Annotated[int, Bounds(1, 100_000)]


@dataclass(kw_only=True)
class Options:
    """The options of `generate()`; None means not set.

    Attributes:
        max_new_tokens: how many tokens to add at the most; goes before `max_length`.
        max_length: how many tokens there are at the most, the prompt included. With neither set,
            20 are added.
        min_new_tokens: no end of sequence before that many; goes before `min_length`.
        min_length: no end of sequence before that many, the prompt included.
        max_time: seconds after which no further token is begun.
        stop_strings: texts that end a row; needs `generate(tokenizer=…)`.
        do_sample: draw from the distribution; otherwise (not set) take the most likely token.
        num_beams: how many continuations are followed at once; 1.
        length_penalty: beams are ranked by their log-probability over length to this power, -30
            to 30; 1.
        early_stopping: end a beam search as soon as there are `num_beams` ends (true), when a
            better one is unlikely (false), or only when there can be none ("never"); false.
        temperature: the logits are divided by it; 1.
        top_k: draw among that many most likely tokens; 50, and 0 for all.
        top_p: draw among the most likely tokens that together have this probability; 1.
        min_p: draw among tokens at least this share as likely as the most likely one.
        top_h: draw among the most likely tokens that hold this share of the entropy.
        typical_p: draw among the tokens of this probability whose information is most typical; 1.
        epsilon_cutoff: draw among tokens of at least this probability; 0.
        eta_cutoff: draw among tokens above a bar that falls with the entropy; 0.
        repetition_penalty: logits of tokens that occurred are divided (or, below zero,
            multiplied) by it (arXiv:1909.05858, §4.1); 1.
        encoder_repetition_penalty: above 1, it makes tokens of the prompt more likely; 1.
        presence_penalty: taken off the logit of every token that was generated; 0.
        frequency_penalty: taken off as often as it was generated; 0.
        no_repeat_ngram_size: no n tokens in a row occur twice; 0 for any.
        encoder_no_repeat_ngram_size: no n tokens of the prompt occur again; 0 for any.
        bad_words_ids: sequences of ids that are never completed.
        sequence_bias: what is added to the logit that completes a sequence of ids.
        suppress_tokens: ids that never come; `begin_suppress_tokens`, that never come first.
        forced_bos_token_id: what follows a prompt of one token; `forced_eos_token_id`, what the
            last possible token is.
        exponential_decay_length_penalty: (start, factor): the end becomes ever more likely from
            `start` new tokens on.
        guidance_scale: how far to go from what `negative_prompt_ids` makes likely; 1.
        renormalize_logits: give scores as log-probabilities, after all else; false.
        remove_invalid_values: take NaN for 0 and infinities for the largest numbers; false.
        watermarking_config: mark the text.
        num_return_sequences: how many continuations of each prompt; 1.
        return_dict_in_generate: return an output with `sequences` and the `output_…` asked for:
            scores, logits, attentions and hidden states; false.
        use_mtp: draft tokens by the model's own layers of multi-token prediction, and check
            several in a step; false.
        prompt_lookup_num_tokens: draft that many tokens from the text itself.
        max_matching_ngram_size: how many tokens at the end of a text are looked up in it; 2.
        num_assistant_tokens: how many tokens an assistant model, or `use_mtp`, drafts; as the
            assistant's config says, or else 5, and as many as there are prediction layers.
        num_assistant_tokens_schedule: "constant", or "heuristic", which drafts two more after all
            were accepted and one less after not; "constant".
        assistant_confidence_threshold: a draft ends with a token less probable than that; 0.
        use_cache: keep what the next step needs, rather than run over the whole text; true.
        cache_implementation: "dynamic" grows, "static" is preallocated, "quantized" grows in few
            bits, "offloaded" grows in the host's memory; "dynamic".
        cache_dtype: of a quantized cache, "int8", "int6" or "int4"; "int8".
        cache_config: the same as {"nbits": 8}, the way Transformers asks for it.
        max_cache_len: how many tokens a preallocated cache has room for; as many as are asked for.
        prefill_chunk_size: read the prompt in pieces of so many tokens; all at once.
        compile: run every step but the first as one compiled program, with a preallocated cache
            (docs/guides/caches.md says when that pays); false.
        compile_config: the same, with a `CompileConfig` that says how.
        disable_compile: taken and without effect: nothing is compiled unasked.
        token_healing: take the prompt's last token off and let the model choose one that begins
            with its text; needs `generate(tokenizer=…)`; false.
    """

    max_new_tokens: Count | None = None
    max_length: Count | None = None
    min_new_tokens: NonNegative | None = None
    min_length: NonNegative | None = None
    max_time: NonNegativeFloat | None = None
    stop_strings: str | list[str] | None = None
    do_sample: bool | None = None
    num_beams: Beams | None = None
    length_penalty: Power | None = None
    early_stopping: bool | str | None = None
    temperature: Positive | None = None
    top_k: NonNegative | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    top_h: Share | None = None
    typical_p: Share | None = None
    epsilon_cutoff: Share | None = None
    eta_cutoff: Share | None = None
    repetition_penalty: Positive | None = None
    encoder_repetition_penalty: Positive | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    no_repeat_ngram_size: NonNegative | None = None
    encoder_no_repeat_ngram_size: NonNegative | None = None
    bad_words_ids: list[Ids] | None = None
    sequence_bias: list[Any] | dict[Any, Any] | None = None
    suppress_tokens: Ids | None = None
    begin_suppress_tokens: Ids | None = None
    forced_bos_token_id: TokenId | None = None
    forced_eos_token_id: TokenId | Ids | None = None
    exponential_decay_length_penalty: list[Number] | None = None
    guidance_scale: Number | None = None
    renormalize_logits: bool | None = None
    remove_invalid_values: bool | None = None
    watermarking_config: WatermarkingConfig | None = None
    num_return_sequences: Copies | None = None
    return_dict_in_generate: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    use_mtp: bool | None = None
    prompt_lookup_num_tokens: Count | None = None
    max_matching_ngram_size: Count | None = None
    num_assistant_tokens: Count | None = None
    num_assistant_tokens_schedule: str | None = None
    assistant_confidence_threshold: Share | None = None
    use_cache: bool | None = None
    cache_implementation: str | None = None
    cache_dtype: str | None = None
    cache_config: dict[str, Any] | None = None
    max_cache_len: Count | None = None
    prefill_chunk_size: Count | None = None
    compile: bool | None = None
    compile_config: Any = None
    disable_compile: bool | None = None
    token_healing: bool | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: EndId | list[EndId] | None = None
    pad_token_id: TokenId | None = None

    def __post_init__(self) -> None:
        mark: Any = self.watermarking_config
        if not isinstance(mark, WatermarkingConfig) and isinstance(mark, _Dictable):
            mark = mark.to_dict()
        if isinstance(mark, dict):
            self.watermarking_config = WatermarkingConfig.from_dict(mark)
        self.validate()

    def validate(self, strict: bool = False) -> None:
        """Check every option that is set.

        Args:
            strict: refuse options that have no effect beside the others, too.

        Raises:
            InputError: one breaks its rule.
        """
        for name, value, needed in self.idle(vars(self)) if strict else ():
            raise InputError(
                f"GenerationConfig: {name}={shown(value)} has no effect without {needed}; set "
                "that, or leave it out"
            )
        kind: Any = type(self)
        for key, annotation in _constraints(kind).items():
            try:
                check(type(self).__name__, key, getattr(self, key), annotation)
            except ValueError as error:
                raise InputError(str(error)) from None
        for key in ("top_p", "top_h", "typical_p"):
            if getattr(self, key) == 0:
                raise InputError(
                    f"GenerationConfig: {key}=0 leaves no token; it is above 0, up to 1"
                )
        for key in ("epsilon_cutoff", "eta_cutoff"):
            if getattr(self, key) == 1:
                raise InputError(
                    f"GenerationConfig: {key}=1 leaves no token; it is from 0, below 1"
                )
        _one_of("cache_implementation", self.cache_implementation, (None, *CACHES))
        schedule = self.num_assistant_tokens_schedule
        _one_of("num_assistant_tokens_schedule", schedule, (None, *SCHEDULES))
        _one_of("cache_dtype", self.cache_dtype, (None, *CACHE_BITS))
        self.cache  # noqa: B018 - raises where the options contradict each other
        _one_of("early_stopping", self.early_stopping, (None, True, False, "never"))
        if self.sequence_bias:
            read_biases(self.sequence_bias)
        decay = self.exponential_decay_length_penalty
        if decay is not None and len(decay) != 2:
            raise InputError(
                f"GenerationConfig: exponential_decay_length_penalty={shown(decay)} has to be a "
                "start and a factor"
            )

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end a sequence, as a list."""
        if self.eos_token_id is None:
            return []
        ids = [self.eos_token_id] if isinstance(self.eos_token_id, int) else self.eos_token_id
        # One that is named twice ends a text no sooner; -1 is no token, and ends none.
        return [token for token in dict.fromkeys(ids) if token >= 0]

    def idle(self, options: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
        """Yield options without effect: name, value, requirement."""
        return idle(
            options,
            samples=bool(self.do_sample),
            beams=(self.num_beams or 1) > 1,
            returns_dict=bool(self.return_dict_in_generate),
        )

    def get_generation_mode(self, assistant_model: object = None) -> GenerationMode:
        """Return the generation mode of these options."""
        if (self.num_beams or 1) > 1:
            return GenerationMode.BEAM_SAMPLE if self.do_sample else GenerationMode.BEAM_SEARCH
        if assistant_model is not None or self.use_mtp or self.prompt_lookup_num_tokens is not None:
            return GenerationMode.ASSISTED_GENERATION
        return GenerationMode.SAMPLE if self.do_sample else GenerationMode.GREEDY_SEARCH

    @property
    def cache(self) -> CacheChoice:
        """The kind of cache that the options name."""
        return choose_cache(
            self.cache_implementation, self.cache_dtype, self.cache_config, compiles=self.compiles
        )

    @property
    def compiles(self) -> bool:
        """Whether to compile the decode step."""
        return bool(self.compile) or self.compile_config is not None


@functools.cache
def _constraints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        named = " or ".join(repr(choice) for choice in choices if choice is not None)
        raise InputError(f"GenerationConfig: {name}={shown(value)} has to be {named}")

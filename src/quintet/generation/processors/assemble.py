"""The processors of a config, in Transformers' order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from quintet.errors import InputError
from quintet.generation.config import GenerationConfig
from quintet.generation.processors import lengths, repetition, warpers, words
from quintet.generation.processors.base import LogitsProcessor, LogitsProcessorList
from quintet.generation.token_buffer import TokenBuffer

# What takes (ids, scores) and returns scores, a `LogitsProcessor` or any function.
Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The generation that processors are made for.

    Attributes:
        prompt: the rows that are continued, each as often as it is.
        max_new_tokens: how many tokens are added at the most, to all rows or to each (B,).
        vocab_size: V.
        num_beams: how many rows belong to one prompt.
        prefix_allowed_tokens_fn: which tokens may come next.
        first: what goes before all others.
    """

    prompt: TokenBuffer
    max_new_tokens: int | Tensor
    vocab_size: int
    num_beams: int = 1
    prefix_allowed_tokens_fn: words.PrefixAllowedTokens | None = None
    first: Sequence[LogitsProcessor] = ()


def assemble(
    config: GenerationConfig, setting: Setting, own: Sequence[Processor] = ()
) -> LogitsProcessorList:
    """Return a config's processors followed by the caller's.

    One of the caller takes the place of one of the same class that the config asks for.
    """
    configured = LogitsProcessorList(setting.first)
    configured += _constraints(config, setting)
    merged = LogitsProcessorList()
    for processor in configured:
        merged.append(next((one for one in own if type(one) is type(processor)), processor))
    merged += [one for one in own if all(one is not other for other in merged)]
    if config.do_sample:
        merged += _warpers(config, setting)
    if config.watermarking_config is not None:
        from quintet.generation.processors.watermark import WatermarkLogitsProcessor

        mark = config.watermarking_config.to_dict()
        device = setting.prompt.ids.device
        merged.append(WatermarkLogitsProcessor(setting.vocab_size, device, **mark))
    if config.renormalize_logits:
        merged.append(warpers.LogitNormalization())
    return merged


def _constraints(config: GenerationConfig, setting: Setting) -> list[LogitsProcessor]:
    """Return the processors that may change the most likely token."""
    processors: list[LogitsProcessor] = []
    prompt, ends = setting.prompt, config.eos_token_ids
    length = len(prompt) if prompt.padding is None else prompt.lengths()
    padding, device = prompt.padding, prompt.ids.device

    if config.sequence_bias:
        processors.append(words.SequenceBiasLogitsProcessor(config.sequence_bias))
    if config.encoder_repetition_penalty not in (None, 1):
        penalty = _known(config.encoder_repetition_penalty)
        processors.append(
            repetition.EncoderRepetitionPenaltyLogitsProcessor(penalty, prompt.ids, padding=padding)
        )
    if config.repetition_penalty not in (None, 1):
        penalty = _known(config.repetition_penalty)
        processors.append(repetition.RepetitionPenaltyLogitsProcessor(penalty))
    if config.presence_penalty:
        processors.append(
            repetition.PresencePenaltyLogitsProcessor(config.presence_penalty, length)
        )
    if config.frequency_penalty:
        processors.append(
            repetition.FrequencyPenaltyLogitsProcessor(config.frequency_penalty, length)
        )
    if config.no_repeat_ngram_size:
        processors.append(repetition.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if size := config.encoder_no_repeat_ngram_size:
        processors.append(
            repetition.EncoderNoRepeatNGramLogitsProcessor(size, prompt.ids, padding=padding)
        )
    if config.bad_words_ids:
        processors.append(words.NoBadWordsLogitsProcessor(config.bad_words_ids, ends))
    if config.min_new_tokens and ends:
        least = config.min_new_tokens
        processors.append(lengths.MinNewTokensLengthLogitsProcessor(length, least, ends, device))
    elif config.min_length and ends:
        # As `max_length` does, it counts the columns of the batch.
        short = config.min_length if padding is None else (config.min_length - padding).clamp(min=0)
        processors.append(lengths.MinLengthLogitsProcessor(short, ends, device))
    if setting.prefix_allowed_tokens_fn is not None:
        allowed = setting.prefix_allowed_tokens_fn
        processors.append(
            words.PrefixConstrainedLogitsProcessor(allowed, setting.num_beams, padding=padding)
        )
    if config.forced_bos_token_id is not None:
        processors.append(lengths.ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        forced, last = config.forced_eos_token_id, length + setting.max_new_tokens
        processors.append(lengths.ForcedEOSTokenLogitsProcessor(last, forced, device))
    if config.remove_invalid_values:
        processors.append(warpers.InfNanRemoveLogitsProcessor())
    if config.exponential_decay_length_penalty is not None:
        decay = config.exponential_decay_length_penalty
        if not ends:
            raise InputError(
                f"exponential_decay_length_penalty={decay} makes the end more likely, and there "
                "is no eos_token_id"
            )
        processors.append(lengths.ExponentialDecayLengthPenalty(decay, ends, length))
    if config.suppress_tokens:
        processors.append(words.SuppressTokensLogitsProcessor(config.suppress_tokens, device))
    if config.begin_suppress_tokens:
        begin = length
        if config.forced_bos_token_id is not None:
            # What follows a prompt of one token is forced, and the text begins behind it.
            begin = length + (length == 1)
        suppressed = config.begin_suppress_tokens
        processors.append(lengths.SuppressTokensAtBeginLogitsProcessor(suppressed, begin, device))
    return processors


def _warpers(config: GenerationConfig, setting: Setting) -> list[LogitsProcessor]:
    """Return the warpers of the sampling distribution."""
    processors: list[LogitsProcessor] = []
    # A beam search needs a token to go on with beside all that end it.
    least = 1 if setting.num_beams == 1 else max(len(config.eos_token_ids), 1) + 1
    if config.temperature not in (None, 1):
        processors.append(warpers.TemperatureLogitsWarper(_known(config.temperature)))
    if config.top_h is not None:
        processors.append(warpers.TopHLogitsWarper(config.top_h))
    if config.top_k:
        processors.append(warpers.TopKLogitsWarper(config.top_k, min_tokens_to_keep=least))
    if config.top_p not in (None, 1):
        processors.append(warpers.TopPLogitsWarper(_known(config.top_p), min_tokens_to_keep=least))
    if config.min_p:
        processors.append(warpers.MinPLogitsWarper(config.min_p, min_tokens_to_keep=least))
    if config.typical_p not in (None, 1):
        processors.append(
            warpers.TypicalLogitsWarper(_known(config.typical_p), min_tokens_to_keep=least)
        )
    if config.epsilon_cutoff:
        processors.append(
            warpers.EpsilonLogitsWarper(config.epsilon_cutoff, min_tokens_to_keep=least)
        )
    if config.eta_cutoff:
        processors.append(warpers.EtaLogitsWarper(config.eta_cutoff, min_tokens_to_keep=least))
    return processors


def _known(value: float | None) -> float:
    assert value is not None
    return value

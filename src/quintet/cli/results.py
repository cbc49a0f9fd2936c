"""Figures of a generation, as text and JSON."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from quintet.generation.config import GenerationConfig
    from quintet.generation.outputs import Speculation

# A loop shows itself in so many tokens.
REPEATED = 24


def finish_reason(config: "GenerationConfig", ids: "Tensor") -> str:
    """Return "stop" if a row of new ids ends by itself, "length" if it was cut off."""
    ended = ids.numel() > 0 and int(ids[-1]) in config.eos_token_ids
    return "stop" if ended or ids.numel() < (config.max_new_tokens or 0) else "length"


def cut(config: "GenerationConfig", ids: "Tensor", room: int) -> str | None:
    """Return a remark that a text was cut off, or None if it ended.

    Args:
        config: how the text was made.
        ids: the new ids.
        room: how many tokens the model's context had left for them.
    """
    if finish_reason(config, ids) != "length":
        return None
    if ids.numel() >= room:
        return "cut: the context is full"
    text = f"cut at {counted(ids.numel())}; -n sets more"
    return f"{text}, repetition_penalty=1.1 less of the same" if _repeats(ids.tolist()) else text


def _repeats(ids: list[int]) -> bool:
    """Return whether a text ends in at least three repetitions, over a line or more."""
    for period in range(1, len(ids) // 3 + 1):
        length = max(3 * period, REPEATED)
        end = ids[-length:]
        if len(end) == length and end[period:] == end[:-period]:
            return True
    return False


def speculation_of(output: Any) -> "Speculation | None":
    """Return an output's record of speculation, or None for a beam search or an interruption."""
    from quintet.generation.outputs import GenerateDecoderOnlyOutput

    return output.speculation if isinstance(output, GenerateDecoderOnlyOutput) else None


def draft_counts(drafted: int, accepted: int) -> dict[str, int]:
    """Return the fields of a JSON result that count a row's drafted tokens."""
    return {"drafted_tokens": drafted, "accepted_tokens": accepted}


def draft_summary(speculation: "Speculation | None") -> str:
    """Return the share of drafted tokens that were taken, as words, or "" without a draft."""
    if speculation is None or not speculation.drafted_tokens:
        return ""
    return f", {speculation.acceptance:.0%} of {speculation.drafted_tokens} drafted tokens taken"


def counted(tokens: int) -> str:
    """Return a number of tokens in words."""
    return "1 token" if tokens == 1 else f"{tokens:,} tokens"

"""Chooses the parser for a tokenizer and prompt."""

from quintet.parsing.events import OutputParser
from quintet.parsing.format import END_THINK, THINK, Format, format_of, marker_ids
from quintet.parsing.parser import Opening, StreamParser
from quintet.tokenization import PreTrainedTokenizer


def parser_for(
    tokenizer: PreTrainedTokenizer,
    prompt_text: str,
    *,
    tools: bool,
    reasoning: bool = True,
    parallel: bool = True,
    written: Format | None = None,
) -> OutputParser:
    """Return a new parser for the text after a prompt.

    How calls are written is what the tokenizer's chat template says, and whether the text begins
    inside of a thought is what the end of the prompt says.

    Args:
        tokenizer: that of the model.
        prompt_text: the text the model continues, special tokens included.
        tools: tell calls of tools from content.
        reasoning: tell thoughts from content.
        parallel: take more than one call; otherwise `done` is true after the first.
        written: how calls are written, where the template is not to say it, such as `CODER`.
    """
    used = (written or format_of(tokenizer)) if tools else None
    opening = opening_of(tokenizer, prompt_text) if reasoning else "content"
    return StreamParser(marker_ids(tokenizer, used), used, opening, parallel)


def opening_of(tokenizer: PreTrainedTokenizer, prompt_text: str) -> Opening:
    """Return whether the text starts inside, after, or possibly before reasoning.

    A thought is open at the end of a prompt, or where a turn is gone on with that has begun one.
    """
    end = prompt_text[-64:].rstrip()
    if end.endswith(THINK):
        return "reasoning"
    if end.endswith(END_THINK):
        return "content"
    _, begun, thought = prompt_text.rpartition(THINK)
    if not begun or END_THINK in thought or THINK not in _templates(tokenizer):
        return "unknown"
    # Where a marker of the template follows, somebody else has said it.
    markers = (token.content for token in tokenizer.added_tokens_decoder.values())
    ended = any(marker in thought for marker in markers if marker.strip())
    return "unknown" if ended else "reasoning"


def _templates(tokenizer: PreTrainedTokenizer) -> str:
    source = tokenizer.chat_template or ""
    return source if isinstance(source, str) else "\n".join(source.values())

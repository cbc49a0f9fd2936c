"""The parser that fits a tokenizer and the text its model continues."""

from quintet.parsing.events import OutputParser
from quintet.parsing.format import END_THINK, THINK, Format, format_of, marker_ids
from quintet.parsing.parser import Opening, StreamParser
from quintet.tokenization import PreTrainedTokenizer

__all__ = ["parser_for"]


def parser_for(
    tokenizer: PreTrainedTokenizer,
    prompt_text: str,
    *,
    tools: bool,
    reasoning: bool = True,
    parallel: bool = True,
    written: Format | None = None,
) -> OutputParser:
    """Return a parser for what follows a prompt; each text needs one of its own.

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
    return StreamParser(
        marker_ids(tokenizer, used),
        used,
        _opening(prompt_text) if reasoning else "content",
        parallel,
    )


def _opening(prompt: str) -> Opening:
    end = prompt[-64:].rstrip()
    if end.endswith(THINK):
        return "reasoning"
    return "content" if end.endswith(END_THINK) else "unknown"

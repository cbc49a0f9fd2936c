"""`quintet quantize`: a model's weights in fewer bits, written as a checkpoint."""

from typing import TYPE_CHECKING, Any

import click

from quintet.cli.convert import run, writing_options
from quintet.cli.settings import COUNT
from quintet.cli.texts import text_of_file
from quintet.errors import InputError
from quintet.hub import TOKENIZER_PATTERNS, locate

if TYPE_CHECKING:
    from torch import Tensor

# Of compressed-tensors, by the names its writers give them.
WORDS = {"w8a16": 8, "w4a16": 4}
METHODS = ("int8", "int4", "nf4", "fp8", *WORDS)
FOUR_BITS = ("int4", "nf4", "w4a16")
CALIBRATED = ("int4", "w4a16")
# How many tokens the model reads of a text at once, to be calibrated.
WINDOW = 512
# And how many in all, unless it is said.
TOKENS = 16384
CAUTION = (
    "note: four bits cost a model some of what it knows, a small one more than a large one; --to "
    "int8 costs next to nothing (what was measured: docs/guides/quantization.md)"
)


@click.command("quantize")
@click.option("--to", "method", type=click.Choice(METHODS), default="int8", show_default=True)
@click.option(
    "--keep",
    multiple=True,
    help="A module to leave as it is, for example lm_head; may be given several times.",
)
@click.option(
    "--calibrate",
    "text",
    type=click.Path(),
    metavar="FILE",
    help="Of int4 and w4a16: round with a text in view like those that the model is for. Takes "
    "minutes, and the memory of the whole model.",
)
@click.option(
    "--calibrate-tokens",
    "tokens",
    type=COUNT,
    show_default=str(TOKENS),
    help="How much of the text is read.",
)
@writing_options
def command(
    model: str,
    directory: str,
    method: str,
    keep: tuple[str, ...],
    text: str | None,
    tokens: int | None,
    **options: Any,
) -> None:
    """Write MODEL in fewer bits into DIRECTORY, whole or not at all.

    Experts and prediction layers are quantised too. int8 and int4 are Quintet's own; nf4 is what
    bitsandbytes has, fp8 what DeepSeek-V3 is released in, and w8a16 and w4a16 are integers
    with scales, packed as compressed-tensors has them, for vLLM and Transformers. The weights
    go through one by one, so that a model may be larger than the memory.
    """
    if text is not None:
        if method not in CALIBRATED:
            raise InputError(
                f"--calibrate is for --to {' and '.join(CALIBRATED)}; {method} has nothing to "
                "gain by a text, leave it out"
            )
        where = {name: options[name] for name in ("local_files_only", "cache_dir", "revision")}
        most = tokens or TOKENS
        options["calibrate"] = _batches(model, text_of_file(text, first=16 * most), most, where)
    elif tokens is not None:
        raise InputError(
            f"--calibrate-tokens {tokens} says how much is read of a text; give that with "
            "--calibrate FILE, or leave it out"
        )
    if method in WORDS:
        from quintet.quantization import PackedConfig

        words = PackedConfig(bits=WORDS[method], modules_to_not_convert=list(keep) or None)
        run(model, directory, quantize=None, config=words, **options)
    elif keep:
        from quintet.quantization.request import SHORT

        chosen = SHORT[method]
        assert chosen is not None
        key = "llm_int8_skip_modules" if method == "nf4" else "modules_to_not_convert"
        config = {**chosen.to_dict(), key: list(keep)}
        run(model, directory, quantize=None, config=config, **options)
    else:
        run(model, directory, quantize=method, config=None, **options)
    if method in FOUR_BITS and not options["quiet"]:
        click.echo(CAUTION, err=True)


def _batches(model: str, text: str, tokens: int, where: dict[str, Any]) -> "list[Tensor]":
    """Return the ids (1, T) of a text, a window each."""
    from quintet.auto import AutoConfig, AutoTokenizer

    locate(model, TOKENIZER_PATTERNS, **where)
    window = min(WINDOW, AutoConfig.from_pretrained(model, **where).max_position_embeddings)
    tokenizer = AutoTokenizer.from_pretrained(model, **where)
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    if not ids.numel():
        raise InputError("the text of --calibrate is empty; give one that the model would read")
    return list(ids[:, :tokens].split(window, dim=1))

"""`quintet convert`: the same weights in another dtype, in other shards, or as plain numbers."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quintet.cli.options import source_options, warnings_as_notes
from quintet.errors import InputError
from quintet.hub import CONFIG_PATTERNS, TOKENIZER_PATTERNS, locate, locate_weights

if TYPE_CHECKING:
    from torch import Tensor

    from quintet.conversion import Converted
    from quintet.quantization import QuantizationConfig

WHOLE = "5GB"
Command = TypeVar("Command", bound=Callable[..., Any])


def writing_options(command: Command) -> Command:
    """Add the options that `convert` and `quantize` share: source, target, and shards."""
    for decorate in (
        click.option("--quiet", "-q", is_flag=True, help="Say nothing when it is done."),
        source_options,
        click.option(
            "--max-shard-size",
            default=WHOLE,
            show_default=True,
            help="The most a file holds, and about what this needs of memory.",
        ),
        click.option(
            "--dtype",
            default="auto",
            show_default=True,
            help="Of what is not quantised; auto is the one the weights have.",
        ),
        click.argument("directory", type=click.Path()),
        click.argument("model"),
    ):
        command = decorate(command)
    return command


@click.command("convert")
@click.option(
    "--to",
    "form",
    type=click.Choice(["gguf", "compressed-tensors"]),
    help="gguf: write one file FILE.gguf for llama.cpp; then --dtype may be F32, F16, BF16, Q8_0, "
    "Q4_0. compressed-tensors: a model in integers as vLLM and Transformers read it.",
)
@click.option("--dequantize", is_flag=True, help="Turn quantised weights into plain numbers.")
@writing_options
def command(model: str, directory: str, form: str | None, dequantize: bool, **options: Any) -> None:
    """Write MODEL into DIRECTORY, whole or not at all.

    Names become those of a release, with an entry for each expert. The weights go through one by
    one, so that a model may be larger than the memory. With --to gguf, DIRECTORY is a file.
    """
    if form == "compressed-tensors":
        from quintet.quantization import PackedConfig

        if dequantize:
            raise InputError("--dequantize leaves no integers for --to compressed-tensors")
        run(model, directory, quantize=None, config=PackedConfig(), **options)
        return
    if form is not None:
        _to_gguf(model, directory, dequantize=dequantize, **options)
        return
    run(model, directory, quantize="none" if dequantize else None, config=None, **options)


def run(
    model: str,
    directory: str,
    *,
    quantize: str | None,
    config: "dict[str, Any] | QuantizationConfig | None",
    dtype: str,
    max_shard_size: str,
    quiet: bool,
    calibrate: "Sequence[Tensor]" = (),
    **where: Any,
) -> None:
    """Convert a model and print the result on standard error."""
    from quintet.conversion import convert

    locate(model, (*CONFIG_PATTERNS, *TOKENIZER_PATTERNS), **where)
    root = locate_weights(model, **where)
    with warnings_as_notes(quiet=quiet):
        done = convert(
            root,
            directory,
            quantize=quantize,
            quantization_config=config,
            dtype=dtype,
            max_shard_size=max_shard_size,
            calibrate=calibrate,
        )
    _report(done, model, directory, quiet)


def _to_gguf(
    model: str,
    file: str,
    *,
    dequantize: bool,
    dtype: str,
    max_shard_size: str,
    quiet: bool,
    **where: Any,
) -> None:
    from quintet.exporting import export_gguf

    if dequantize or max_shard_size != WHOLE:
        raise InputError(
            "--dequantize and --max-shard-size have no effect on one file of GGUF, whose weights "
            "are as --dtype says; leave them out"
        )
    locate(model, (*CONFIG_PATTERNS, *TOKENIZER_PATTERNS), **where)
    root = locate_weights(model, **where)
    with warnings_as_notes(quiet=quiet):
        done = export_gguf(root, file, dtype=dtype)
    _report(done, model, file, quiet)


def _report(done: "Converted", model: str, target: str, quiet: bool) -> None:
    if not quiet:
        if done.left_out:
            names = ", ".join(done.left_out[:5])
            more = ", …" if len(done.left_out) > 5 else ""
            click.echo(f"note: left out, as the model has no place for it: {names}{more}", err=True)
        share = done.written / max(done.read, 1)
        bits = f", {8 * done.written / done.numbers:.2f} bits a weight" if done.numbers else ""
        click.echo(
            f"{target}: {done.written:,} bytes of weights{bits}, {share:.2f} of the {done.read:,} "
            f"in {model}",
            err=True,
        )

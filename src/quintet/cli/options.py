"""Options that several commands share, and how a model is opened with them."""

import functools
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from quintet.cli.adapters import put_adapters
from quintet.cli.output import size_of
from quintet.cli.settings import COUNT, LARGEST_SEED, THREADS, applied, drawn, parse, seed_of
from quintet.cli.terminal import note
from quintet.errors import InputError, ModelNotFoundError
from quintet.folder import AdapterFolderError

if TYPE_CHECKING:
    import torch

    from quintet.generation.config import GenerationConfig
    from quintet.generation.mixin import GenerationMixin
    from quintet.modeling.base import PreTrainedModel
    from quintet.quantization import WeightFormat
    from quintet.tokenization import PreTrainedTokenizer

# Below so many parameters, threads cost more than they give (docs/lab-notes.md), and on a machine
# that is busy they wait for each other many times longer than they compute.
SMALL = 20_000_000
_OF_GENERATE = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
DIVIDED = "Under torchrun: among so many processes"
Command = TypeVar("Command", bound=Callable[..., Any])


def source_options(command: Command) -> Command:
    """Add the options that say where a model comes from, named as `from_pretrained` names them."""
    for option in (
        click.option("--offline", "local_files_only", is_flag=True, help="Never use the network."),
        click.option("--cache-dir", help="Where downloads are kept."),
        click.option("--revision", help="Branch, tag or commit of a hub id."),
    ):
        command = option(command)
    return command


def model_options(command: Command) -> Command:
    """Add the options of the model, its device, and its adapters."""
    adapter = click.option(
        "--adapter",
        "adapters",
        multiple=True,
        metavar="[NAME=]PATH",
        help="Put an adapter, of PEFT or in GGUF, on it; may be repeated, and they add up.",
    )
    return adapter(weight_options(command))


def weight_options(command: Command) -> Command:
    """Add the options that say where a model comes from and how it is held."""
    for option in (
        click.option("--quiet", "-q", is_flag=True, help="Nothing but the result."),
        source_options,
        click.option(
            "--attn-implementation",
            type=click.Choice(["eager", "sdpa", "flash_attention_2"]),
            help="How attention is computed.",
        ),
        click.option("--pp", type=COUNT, help=f"{DIVIDED} the layers."),
        click.option("--ep", type=COUNT, help=f"{DIVIDED} the experts."),
        click.option("--tp", type=COUNT, help=f"{DIVIDED} heads and matrices."),
        click.option("--threads", type=THREADS, help="Of the CPU."),
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …"),
        click.option("--quantize", help="Hold the weights in fewer bits: int8, int4, …"),
        click.option("--dtype", default="auto", show_default=True, help="Of the weights."),
    ):
        command = option(command)
    return command


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say how tokens are chosen; those of the checkpoint hold otherwise.

    The command gets the seed, and a mapping `sampling` of options of `generate()`.
    """

    @functools.wraps(command)
    def collecting(**given: Any) -> None:
        mtp, draft, stop = (given.pop(name) for name in ("mtp", "draft", "stop"))
        if draft is not None and not mtp:
            raise InputError(f"--draft {draft} has no effect without --mtp; give both or neither")
        sampling = {name: given.pop(name) for name in _OF_GENERATE}
        sampling |= {"use_mtp": mtp or None, "num_assistant_tokens": draft}
        command(sampling={**sampling, "stop_strings": list(stop) or None}, **given)

    for option in (
        click.option(
            "--seed", type=click.IntRange(0, LARGEST_SEED), help="Makes sampling repeatable."
        ),
        click.option("--draft", type=COUNT, help="With --mtp, so many tokens at once."),
        click.option("--mtp", is_flag=True, help="Guess ahead with the model's prediction layers."),
        click.option("--stop", multiple=True, help="A text that ends the answer; may be repeated."),
        click.option("--repetition-penalty", type=float, help="Above 1: fewer repetitions."),
        click.option("--min-p", type=float, help="Least share of the likeliest token."),
        click.option("--top-p", type=float, help="Draw from this much probability."),
        click.option("--top-k", type=int, help="Draw from that many tokens; 0 for all."),
        click.option("--temperature", "-t", type=float, help="0 always takes the likeliest token."),
        click.option("--max-new-tokens", "--max-tokens", "-n", type=COUNT),
    ):
        collecting = option(collecting)
    return collecting


@contextmanager
def warnings_as_notes(quiet: bool) -> Iterator[None]:
    """Show warnings and log records as one line each on standard error."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        note(f"warning: {message}", quiet)

    handler = _Notes(quiet)
    log = logging.getLogger("quintet")
    log.addHandler(handler)
    log.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = show
            yield
    finally:
        log.removeHandler(handler)
        log.propagate = True


class _Notes(logging.Handler):
    """Shows log records as notes."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(logging.WARNING)
        self._quiet = quiet

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage(), self._quiet)


@dataclass(frozen=True, slots=True)
class Opened:
    """A model and its tokenizer, ready to run."""

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizer"
    seconds: float

    @property
    def generator_model(self) -> "GenerationMixin":
        """The model as something that generates."""
        return cast("GenerationMixin", self.model)

    @property
    def unread(self) -> bool:
        """Whether nobody reads what is made here, in a group beside that of the first process.

        It takes part for its experts alone.
        """
        return self.model.world is not None and self.model.world.share[0] > 0

    def describe(self) -> str:
        """Describe the model in a line."""
        millions = self.model.num_parameters() / 1e6
        size = f"{millions / 1000:.2f} B" if millions >= 1000 else f"{millions:.1f} M"
        return (
            f"{self.model.config.model_type}, {size} parameters{divided(self.model)}, "
            f"{kind_of(self.model)} on {devices_of(self.model)}, loaded in {self.seconds:.2f} s"
        )


def devices_of(model: "PreTrainedModel") -> str:
    """Return a model's devices, in the order of a forward, with the bytes on each of several."""
    nbytes: dict[torch.device, int] = {}
    for part in model.parameters():
        nbytes[part.device] = nbytes.get(part.device, 0) + part.nbytes
    if len(nbytes) < 2:
        return str(model.device)
    return ", ".join(f"{device} ({size_of(size)})" for device, size in nbytes.items())


def divided(model: "PreTrainedModel") -> str:
    """Describe the division of a model among processes, behind this process's part."""
    if model.world is None:
        return ""
    degrees = model.world.degrees
    parts = [f"{axis} {degrees.of(axis)}" for axis in ("pp", "tp", "ep") if degrees.of(axis) > 1]
    return f" in each of {degrees.size} processes ({', '.join(parts)})"


def quantized_format(model: "PreTrainedModel") -> "WeightFormat | None":
    """Return the format of most weights of the layers; None for numbers."""
    from quintet.quantization import Quantized

    counts: Counter[WeightFormat] = Counter()
    for module in model.base_model.get_submodule("layers").modules():
        if isinstance(module, Quantized):
            for weight_format, count in module.weight_counts():
                counts[weight_format] += count
    return max(counts, key=lambda weight_format: counts[weight_format], default=None)


def has_kernels(weight_format: "WeightFormat") -> bool:
    """Return whether a CPU's kernels read the parts of a format as they are."""
    import torch

    from quintet.kernels.matrix import integers, kind_of
    from quintet.quantization.ordered import OrderedFormat

    own_format = weight_format
    if isinstance(weight_format, OrderedFormat):
        own_format = weight_format.inner
    # Of any size that all formats have.
    rows, columns = 256, 256
    parts = {
        suffix: torch.empty(part.shape, dtype=part.dtype, device="meta")
        for suffix, part in own_format.parts((rows, columns)).items()
    }
    matrix = own_format.matrix(parts)
    return matrix is not None and integers(matrix, kind_of(matrix), columns) is not None


def kind_of(model: "PreTrainedModel") -> str:
    """Return the format and dtype of a model in words."""
    dtype, weight_format = str(model.dtype).removeprefix("torch."), quantized_format(model)
    return dtype if weight_format is None else f"{weight_format.name} and {dtype}"


def open_model(
    name: str,
    *,
    dtype: str,
    device: str,
    attn_implementation: str | None,
    threads: int | None,
    quantize: str | None = None,
    adapters: Sequence[str] = (),
    tp: int | None = None,
    ep: int | None = None,
    pp: int | None = None,
    quiet: bool = False,
    **where: Any,
) -> Opened:
    """Load a language model and its tokenizer, from where `source_options` say.

    Kernels that were never compiled are compiled first, not in the middle of the first answer.

    Raises:
        QuintetError: whatever keeps either from loading.
    """
    import torch

    from quintet.auto import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from quintet.cli.compiling import have_kernels
    from quintet.cli.offers import meant
    from quintet.cli.together import several
    from quintet.modeling.placement import first_device

    given = {"attn_implementation": attn_implementation, "quantize": quantize}
    overrides: dict[str, Any] = {k: value for k, value in given.items() if value is not None}
    sizes = {"tp_size": tp, "ep_size": ep, "pp_size": pp}
    degrees = {key: value for key, value in sizes.items() if value is not None}
    if degrees or several():
        overrides["distributed_config"] = degrees
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    except ModelNotFoundError as error:
        if (near := meant(name)) is None or near == name:
            raise
        raise type(error)(f"{error}; did you mean {near!r}?") from error
    with suppress(AdapterFolderError):  # which is loaded as its model with it
        AutoConfig.from_pretrained(name, **where)
    if first_device(device).type == "cpu":
        # Not before it is known that the model is one for us; files may be read by them, too.
        have_kernels(quiet)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, device_map=device, **where, **overrides
    )
    put_adapters(model, adapters, **where)
    if threads is None and model.num_parameters() < SMALL:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)
    seconds = time.perf_counter() - started
    if model.device.type == "cpu":
        weight_format = quantized_format(model)
        if weight_format is not None and not has_kernels(weight_format):
            warnings.warn(
                f"{weight_format.name} is turned into numbers at every step on a CPU, many times "
                "slower "
                "than int8 and int4, which have kernels: --quantize int8",
                stacklevel=2,
            )
    return Opened(name, model, tokenizer, seconds)


def check_options(options: Mapping[str, Any], words: Iterable[str]) -> None:
    """Refuse options that `choose` would refuse, before a model is loaded for nothing.

    Raises:
        InputError: a word that sets nothing, or an option that breaks a rule.
    """
    from quintet.generation.config import GenerationConfig

    given = drawn({**options, **parse(words)})
    seed_of(given.pop("seed", None))
    applied(GenerationConfig(), given)


def stored_system_message(name: str, quiet: bool, where: Mapping[str, Any]) -> str | None:
    """Return the message that a program which keeps the model begins conversations with."""
    from quintet.sources import find_gguf

    places = ("revision", "cache_dir", "local_files_only")
    found = find_gguf(name, **{place: where[place] for place in places})
    if found is None or found.system is None:
        return None
    note(f"system message, as Ollama has it: {found.system}", quiet)
    return found.system


def choose(
    device: "torch.device", seed: int | None, options: Mapping[str, Any], words: Iterable[str]
) -> tuple[dict[str, Any], "torch.Generator", int]:
    """Return generate()'s options, a seeded generator on the model's device, and the seed.

    Args:
        device: the model's.
        seed: of the generator; drawn where it is None.
        options: as the command line's own options say; None for what nobody asked for.
        words: NAME=VALUE, which go before them, `seed` too.

    Raises:
        InputError: a word that sets nothing, or a seed that is none.
    """
    import torch

    given = {name: value for name, value in options.items() if value is not None}
    given = drawn({**given, **parse(words)})
    seed = seed_of(given.pop("seed", seed))
    seed = torch.seed() & LARGEST_SEED if seed is None else seed
    return given, torch.Generator(device).manual_seed(seed), seed


def with_default_length(
    opened: Opened, config: "GenerationConfig", prompt: int, most: int = 256
) -> "GenerationConfig":
    """Limit the new tokens to `most` and the context's rest, unless the options limit them.

    Where nobody reads them, to one.
    """
    if opened.unread:
        return config.overridden(max_new_tokens=1, min_new_tokens=None, min_length=None)
    if config.max_new_tokens is not None or config.max_length is not None:
        return config
    room = opened.model.config.max_position_embeddings - prompt
    return config.replace(max_new_tokens=max(1, min(most, room)))


def read_stdin() -> str | None:
    """Read standard input to its end, or return None at a terminal.

    Raises:
        InputError: it is not UTF-8.
    """
    if sys.stdin is None or sys.stdin.isatty():
        return None
    try:
        text = sys.stdin.read()
        # Bytes that are no text may have come in as halves of surrogate pairs.
        text.encode()
    except UnicodeError:
        raise InputError(
            "what is piped in is not UTF-8 text; convert it, e.g. with iconv"
        ) from None
    return text

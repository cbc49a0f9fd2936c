"""`quintet bench`: prompts and steps, timed, beside what this machine would allow."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from quintet.cli.compiling import have_kernels
from quintet.cli.dispatching import DispatchingCommand
from quintet.cli.options import kind_of, source_options, warnings_as_notes
from quintet.cli.settings import COUNT, COUNT_OR_NONE, THREADS
from quintet.cli.terminal import note
from quintet.errors import InputError
from quintet.hub import demo_model

if TYPE_CHECKING:
    from quintet.measurement.machine import Bandwidth
    from quintet.modeling.heads import CausalLMHead

# Above this share of the processor in other hands, a result says so.
BUSY = 0.05


class _Numbers(click.ParamType[tuple[int, ...]]):
    """A click type of integers separated by commas."""

    name = "n,n,…"

    def __init__(self, least: int) -> None:
        self.least = least

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        try:
            numbers = tuple(int(part) for part in str(value).split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not whole numbers separated by commas", param, ctx)
        if any(number < self.least for number in numbers):
            self.fail(f"{value!r} has a number below {self.least}", param, ctx)
        return numbers


class _Bench(DispatchingCommand):
    """One command, and a second one that measures a server, with other options."""

    others = MappingProxyType({"serve": "bench_serve"})


@click.command("bench", cls=_Bench)
@click.argument("model", required=False)
@click.option("--geometry", help="Random weights in the shape of a released model; no checkpoint.")
@click.option(
    "--n-prompt", "-p", type=_Numbers(0), default="512", show_default=True, help="Prompt lengths."
)
@click.option(
    "--n-gen", "-n", type=COUNT_OR_NONE, default=16, show_default=True, help="Steps to time."
)
@click.option(
    "--n-depth", "-d", type=_Numbers(1), default="512", show_default=True, help="Context of steps."
)
@click.option(
    "--batch-size", "-b", type=_Numbers(1), default="1", show_default=True, help="Rows at once."
)
@click.option("--repetitions", "-r", type=COUNT, default=5, show_default=True)
@click.option("--threads", "-t", type=THREADS, help="Of the CPU.")
@click.option("--dtype", default="auto", show_default=True, help="Of the weights.")
@click.option("--quantize", help="Hold the weights in fewer bits: int8, int4, …")
@click.option(
    "--cache-dtype",
    type=click.Choice(["int8", "int6", "int4"]),
    help="Hold keys and values in fewer bits.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option(
    "--attn-implementation",
    type=click.Choice(["eager", "sdpa", "flash_attention_2"]),
    help="How attention is computed.",
)
@source_options
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Nothing but the result.")
def command(
    model: str | None,
    geometry: str | None,
    n_prompt: tuple[int, ...],
    n_gen: int,
    n_depth: tuple[int, ...],
    batch_size: tuple[int, ...],
    repetitions: int,
    threads: int | None,
    cache_dtype: str | None,
    as_json: bool,
    quiet: bool,
    **source: Any,
) -> None:
    """Measure how fast MODEL runs on this machine.

    Prompts (pp) are timed to the first token, steps (tg) at a context depth that is filled with
    random keys and values, which cost what real ones do. Medians of the repetitions. Without MODEL,
    the packaged demo model.

    `quintet bench serve URL` measures how a server bears load.
    """
    if model is not None and geometry is not None:
        raise click.UsageError("Give either MODEL, a directory or hub id, or --geometry NAME.")
    idle = [name for name in ("revision", "cache_dir", "local_files_only") if source[name]]
    if geometry is not None and idle:
        raise InputError(f"--geometry fetches nothing, so {', '.join(idle)} has no effect")
    if model is None and geometry is None:
        model = str(demo_model())
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    from quintet.measurement.machine import read_bandwidth
    from quintet.modeling.placement import first_device

    # Before the model is there, so that its peak of memory is its own.
    bandwidth = read_bandwidth()
    with warnings_as_notes(quiet):
        if first_device(source["device"]).type == "cpu":
            have_kernels(quiet)
        opened, seconds = _open(model, geometry, **source)
        note(_described(opened, geometry or model), quiet)
        result = _measured(
            opened,
            bandwidth,
            n_prompt,
            n_gen,
            n_depth,
            batch_size,
            repetitions,
            cache_dtype=cache_dtype,
            quiet=quiet,
        )
    source_of = {"model": geometry or model, "quantize": source["quantize"]}
    result = {**source_of, "cache_dtype": cache_dtype, "load_seconds": seconds, **result}
    click.echo(json.dumps(result, indent=2) if as_json else "\n".join(_table(result)))


def _open(
    name: str | None,
    geometry: str | None,
    *,
    dtype: str,
    quantize: str | None,
    device: str,
    attn_implementation: str | None,
    **where: Any,
) -> tuple["CausalLMHead", float | None]:
    """Return a model, and the seconds from its files to its first token; None without files."""
    import torch

    from quintet.auto import AutoModelForCausalLM
    from quintet.measurement import geometries, synthetic, timing
    from quintet.modeling.heads import CausalLMHead
    from quintet.modeling.placement import first_device, named_dtype

    given = {"attn_implementation": attn_implementation, "quantize": quantize}
    overrides: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if geometry is not None:
        config = geometries.geometry(geometry).config()
        if attn_implementation is not None:
            config.attn_implementation = attn_implementation
        chosen = torch.bfloat16 if dtype == "auto" else named_dtype(dtype)
        drawn = synthetic.random_model(config, chosen)
        if quantize is not None:
            kind, numbers = type(drawn), drawn.state_dict()
            drawn = kind.from_pretrained(
                None, config=config, state_dict=numbers, dtype=chosen, quantize=quantize
            )
        return drawn.to(first_device(device)), None
    assert name is not None
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=dtype,
        device_map=device,
        **where,
        **overrides,
    )
    if not isinstance(model, CausalLMHead):
        raise InputError(f"{name} has no language-modelling head")
    timing.time_prompt(model, 1, 1)
    return model, time.perf_counter() - started


def _described(model: "CausalLMHead", name: str | None) -> str:
    import torch

    millions = model.num_parameters() / 1e6
    return (
        f"{name}: {model.config.model_type}, {millions:,.0f} M parameters, {kind_of(model)} on "
        f"{model.device}, {torch.get_num_threads()} threads, {model.config.attn_implementation}"
    )


def _measured(
    model: "CausalLMHead",
    bandwidth: "Bandwidth | None",
    prompts: tuple[int, ...],
    steps: int,
    depths: tuple[int, ...],
    batches: tuple[int, ...],
    repetitions: int,
    *,
    cache_dtype: str | None,
    quiet: bool,
) -> dict[str, Any]:
    import torch

    from quintet.kernels import report
    from quintet.measurement import machine

    on_cpu = model.device.type == "cpu"
    bandwidth = bandwidth if on_cpu else None
    multiplies = any(prompts) or (steps > 0 and max(batches) > 1)
    peak = machine.gemm_peak(model.dtype) if on_cpu and multiplies else None
    with machine.MachineLoad() as load:
        rows = []
        for row in _rows(
            model,
            prompts,
            steps,
            depths,
            batches,
            repetitions,
            cache_dtype=cache_dtype,
            bandwidth=bandwidth,
            peak=peak,
        ):
            note(" ".join(_cells(row)), quiet)
            rows.append(row)
    return {
        "family": model.config.model_type,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": kind_of(model),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "attention": model.config.attn_implementation,
        "kernels": {k.name: k.level or f"PyTorch, as {k.reason}" for k in report().kernels},
        "peak_memory_bytes": machine.peak_memory(),
        "bandwidth": None if bandwidth is None else asdict(bandwidth),
        "gemm_flops_per_second": peak,
        "machine": {**asdict(machine.Machine.here()), **load.facts()},
        "rows": rows,
    }


def _rows(
    model: "CausalLMHead",
    prompts: tuple[int, ...],
    steps: int,
    depths: tuple[int, ...],
    batches: tuple[int, ...],
    repetitions: int,
    *,
    cache_dtype: str | None,
    bandwidth: "Bandwidth | None",
    peak: float | None,
) -> Iterator[dict[str, Any]]:
    from quintet.cache import Cache, QuantizedCache
    from quintet.generation.cache_choice import CACHE_BITS
    from quintet.measurement import floors, synthetic, timing

    def empty() -> Cache:
        if cache_dtype is None:
            return model.new_cache()
        return QuantizedCache(model.config, CACHE_BITS[cache_dtype])

    for batch in batches:
        for tokens in filter(None, prompts):
            # The first one pays for what is made once.
            timing.time_prompt(model, batch, tokens, cache=empty())
            spread = timing.Spread.of(
                [
                    timing.time_prompt(model, batch, tokens, seed, empty())
                    for seed in range(repetitions)
                ]
            )
            flops = floors.prompt_flops(model.config, batch, tokens)
            floor = None if peak is None else flops / peak
            yield _row(f"pp{tokens}", batch, batch * tokens, spread, floor, {"flops": flops})
        for depth in depths if steps else ():
            one = synthetic.filled_cache(model, batch, 1, empty())
            counted = floors.step_bytes(model, one, batch, depth)
            spread = timing.Spread.of(
                [
                    timing.time_steps(model, batch, depth, steps, seed, cache=empty())
                    for seed in range(repetitions)
                ]
            )
            floor = None if bandwidth is None else counted.total / bandwidth.bytes_per_second
            if floor is not None and peak is not None:
                floor = max(floor, floors.prompt_flops(model.config, batch, 1) / peak)
            yield _row(f"tg{steps} @ d{depth}", batch, batch, spread, floor, asdict(counted))


def _row(
    test: str, batch: int, tokens: int, spread: Any, floor: float | None, needs: dict[str, Any]
) -> dict[str, Any]:
    return {
        "test": test,
        "batch": batch,
        "tokens_per_second": tokens / spread.median,
        "seconds": spread.median,
        "least": spread.least,
        "most": spread.most,
        "each": spread.seconds,
        "floor_seconds": floor,
        "of_floor": None if floor is None else floor / spread.median,
        "needs": needs,
    }


HEADER = ("test", "batch", "tok/s", "ms", "least - most", "floor ms", "of it")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    floor = row["floor_seconds"]
    return (
        row["test"],
        str(row["batch"]),
        f"{row['tokens_per_second']:.2f}",
        f"{row['seconds'] * 1e3:.2f}",
        f"{row['least'] * 1e3:.2f} - {row['most'] * 1e3:.2f}",
        "" if floor is None else f"{floor * 1e3:.2f}",
        "" if floor is None else f"{row['of_floor']:.0%}",
    )


def _table(result: dict[str, Any]) -> Iterator[str]:
    rows = [HEADER, *map(_cells, result["rows"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield f"| {' | '.join(cells)} |"
    yield ""
    size, memory = result["parameters"] / 1e6, result["peak_memory_bytes"] / 2**30
    loaded = result["load_seconds"]
    yield (
        f"{result['family']}, {size:,.0f} M parameters, {result['weights']} on {result['device']}, "
        f"{result['threads']} threads, {result['attention']}"
        + (f", cache in {result['cache_dtype']}" if result["cache_dtype"] else "")
    )
    yield f"peak memory {memory:.2f} GiB" + (
        "" if loaded is None else f", {loaded:.2f} s from files to first token"
    )
    if (bandwidth := result["bandwidth"]) is not None:
        rate = bandwidth["bytes_per_second"] / 1e9
        yield f"memory is read at {rate:.1f} GB/s ({bandwidth['how']})"
    if (peak := result["gemm_flops_per_second"]) is not None:
        yield f"matrices are multiplied at {peak / 1e9:.0f} GFLOP/s in {result['dtype']}"
    for state in dict.fromkeys(result["kernels"].values()):
        names = [name for name, its in result["kernels"].items() if its == state]
        yield f"kernels: {', '.join(names)} ({state})"
    others = result["machine"]["others"]
    if others is not None and others > BUSY:
        yield f"not quiet: others took {others:.0%} of the processor meanwhile"

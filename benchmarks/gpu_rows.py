"""What is timed of one geometry on a GPU, most important first, as long as there is time."""

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile

from quintet import CompileConfig
from quintet.backends import REGISTRY
from quintet.configuration import PreTrainedConfig
from quintet.generation.compiling import compiled
from quintet.generation.fixed_step import FixedStep, Recording
from quintet.generation.graphs import graphs_of
from quintet.generation.rows import Rows
from quintet.measurement.floors import step_bytes
from quintet.measurement.synthetic import filled_cache, random_ids, random_model
from quintet.measurement.timing import time_prompt
from quintet.modeling.heads import CausalLMHead

__all__ = ["BATCHES", "DEPTH", "PROMPT", "Missing", "Row", "bandwidth", "measured", "transformers"]

PROMPT, DEPTH, BATCHES, NEW = 4096, 512, (1, 8, 32, 128), 64
STEPS = 24
# Tokens of a prompt that come with a step of the other rows.
PIECE = 128
# Published kernels, and which models have what they compute.
ON_REQUEST: dict[str, Callable[[PreTrainedConfig], bool]] = {
    "flash-attn": lambda config: not vars(config).get("kv_lora_rank"),
    "flash-mla": lambda config: bool(vars(config).get("kv_lora_rank")),
    "mamba-ssm": lambda config: bool(config.recurrent_layers()),
}
# Seconds that the steps of a row may take, and a row with all that goes before them.
STEPPING, ROW = 1.5, 45.0
FULL = CompileConfig(fullgraph=True, dynamic=False)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        name: of the geometry.
        case: what was timed.
        way: how it ran.
        seconds: of a prompt, or of a step.
        tokens: that these are of.
        kernels: that one was launched with; operations where there is no GPU. None if not counted.
        read: bytes of weights, cache and states that it has to read at the least; 0 of a prompt.
    """

    name: str
    case: str
    way: str
    seconds: float
    tokens: int
    kernels: int | None = None
    read: int = 0


@dataclass(frozen=True, slots=True)
class Missing:
    """A figure that there is none of, and why."""

    name: str
    case: str
    why: str


Figure = Row | Missing


def bandwidth(device: torch.device) -> float:
    """Return how many bytes a second the device reads, of the fastest of some sums."""
    x = torch.ones(2**30 if device.type == "cuda" else 2**24, dtype=torch.bfloat16, device=device)
    times = []
    for _ in range(6):
        wait(device)
        started = time.perf_counter()
        x.sum()
        wait(device)
        times.append(time.perf_counter() - started)
    return x.nbytes / min(times)


def wait(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(
    name: str, config: PreTrainedConfig, device: torch.device, small: int, until: float
) -> Iterator[Figure]:
    """Yield the figures of a geometry, while there is time.

    Args:
        small: what contexts are divided by, to try it.
        until: the second of the monotonic clock from which on no more are begun.
    """
    model = random_model(config, torch.bfloat16, device=device)
    depth, prompt = DEPTH // small, PROMPT // small
    step = partial(_step, model, name)
    # What is compiled is compared where it matters most, as compiling takes long.
    ways = [*(("recorded", batch) for batch in BATCHES), ("compiled", 1), ("as it is", 1)]
    plan: list[tuple[str, Callable[[], Row]]] = [
        (f"{_case(batch, depth)}, {way}", partial(step, way, batch, depth)) for way, batch in ways
    ]
    # Behind the batches of what was recorded.
    plan[len(BATCHES) : len(BATCHES)] = [
        (f"prompt of {prompt}", partial(_prompt, model, name, prompt)),
        (f"{NEW} tokens behind {depth}", partial(_whole, model, name, depth)),
        ("rows beside a piece", partial(_mixed, model, name, depth, max(PIECE // small, 2))),
    ]
    asked = [one.name for one in REGISTRY.backends if one.on_request and one.missing() is None]
    plan += [
        (f"{_case(32, depth)}, {one}", partial(_asking, one, partial(step, "recorded", 32, depth)))
        for one in asked
        if one in ON_REQUEST and ON_REQUEST[one](config)
    ]
    for case, row in plan:
        yield _within(name, case, until, row)


def transformers(
    name: str, config: PreTrainedConfig, device: torch.device, small: int, until: float
) -> Iterator[Figure]:
    """Yield the figures of steps of Transformers: as it is, then compiled over a static cache."""
    depth = DEPTH // small
    if find_spec("transformers") is None:
        yield Missing(name, "Transformers", "it is not installed")
        return
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**config.to_dict(), "dtype": "bfloat16"}
    theirs = AutoConfig.for_model(values.pop("model_type"), **values)
    with device:
        model = AutoModelForCausalLM.from_config(theirs, dtype=torch.bfloat16).eval()
    for way in ("Transformers", "Transformers, compiled"):
        yield _within(
            name, f"{_case(1, depth)}, {way}", until, partial(_theirs, model, name, way, depth)
        )


def _case(batch: int, depth: int) -> str:
    return f"batch {batch} behind {depth}"


def _within(name: str, case: str, until: float, row: Callable[[], Row]) -> Figure:
    """Return a row, or why there is none: it failed, takes too long, or is too late."""
    left = until - time.monotonic()
    if left <= 0:
        return Missing(name, case, "there was no time for it")
    try:
        with _budget(min(left + 5, ROW)):
            return row()
    except Exception as error:  # What one row meets keeps the others from nothing.
        return Missing(name, case, f"{type(error).__name__}: {str(error)[:300]}")


@contextmanager
def _budget(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError inside when so many seconds have passed."""

    def over(*_: object) -> None:
        raise TimeoutError(f"a row may take {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _prompt(model: CausalLMHead, name: str, tokens: int) -> Row:
    time_prompt(model, 1, min(tokens, 64))
    seconds = statistics.median(time_prompt(model, 1, tokens) for _ in range(3))
    return Row(name, f"prompt of {tokens}", "as it is", seconds, tokens)


def _whole(model: CausalLMHead, name: str, depth: int) -> Row:
    """Time generate(), with its prompt and what it takes to record its steps."""
    ids = random_ids(model.config.vocab_size, 1, depth).to(model.device)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
        wait(model.device)
        times.append(time.perf_counter() - started)
    return Row(name, f"{NEW} tokens behind {depth}", "generate()", min(times), NEW)


@torch.no_grad()
def _step(model: CausalLMHead, name: str, way: str, batch: int, depth: int) -> Row:
    """Time steps of an engine's rows, with the choice of the likeliest token."""
    graphs = graphs_of(model.device)
    recording = {
        "as it is": None,
        "recorded": Recording(graphs),
        "compiled": Recording(graphs, lambda one: cast("Any", compiled(cast("Any", one), FULL))),
    }[way]
    # As pages of published kernels have to be.
    capacity = -(-(depth + 2 * STEPS) // 256) * 256
    rows = Rows(cast("Any", model), batch, capacity)
    ids = [rows.open() for _ in range(batch)]
    filled_cache(model, batch, depth, rows.cache)
    fixed = None
    if recording is not None:
        fixed = FixedStep(cast("Any", model), rows.cache, batch, recording)
    places = [rows.cache.index(cast("int", one)) for one in ids]

    def step() -> None:
        if fixed is None:
            column = torch.ones(batch, 1, dtype=torch.long, device=model.device)
            output = model(column, past_key_values=rows.cache, use_cache=True, logits_to_keep=1)
            logits = output.logits[:, -1]
        else:
            logits = fixed.run(places, [1] * batch)
            if logits is None:
                raise RuntimeError("steps of this model are not recorded")
        # As an engine waits for what it chose.
        logits.argmax(dim=-1).tolist()

    step()
    kernels = _kernels(step, model.device)
    one = filled_cache(model, batch, 1)
    read = step_bytes(model, one, batch, depth).total
    return Row(name, _case(batch, depth), way, _seconds(step), batch, kernels, read)


@torch.no_grad()
def _mixed(model: CausalLMHead, name: str, depth: int, piece: int, batch: int = 8) -> Row:
    """Time forwards in which a row reads a piece of its prompt and the others step."""
    rows = Rows(cast("Any", model), batch, depth + piece * (2 * STEPS + 2))
    for _ in range(batch):
        rows.open()
    filled_cache(model, batch, depth, rows.cache)
    counts = [piece, *[1] * (batch - 1)]
    ends = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    ids = torch.ones(1, sum(counts), dtype=torch.long, device=model.device)

    def step() -> None:
        model(ids, past_key_values=rows.cache, use_cache=True, cu_seq_lens_q=ends)
        wait(model.device)

    step()
    kernels = _kernels(step, model.device)
    case = f"{batch - 1} rows beside a piece of {piece}"
    return Row(name, case, "as it is", _seconds(step), sum(counts), kernels)


def _asking(backend: str, row: Callable[[], Row]) -> Row:
    """Time what a published kernel serves that nobody else asked for."""
    with REGISTRY.asking(backend):
        made = row()
    return replace(made, way=f"{made.way}, {backend}")


def _theirs(model: Any, name: str, way: str, depth: int) -> Row:
    """Time steps of a model of Transformers, one row."""
    from transformers import DynamicCache, StaticCache

    device, config = model.device, model.config
    static = way != "Transformers"
    room = depth + 2 * STEPS
    cache = StaticCache(config, max_cache_len=room) if static else DynamicCache(config=config)
    run = torch.compile(model, mode="reduce-overhead", fullgraph=True) if static else model
    ids = random_ids(config.vocab_size, 1, depth).to(device)
    token = ids[:, :1].contiguous()
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        at = [torch.tensor([depth], device=device)]

        def step() -> None:
            output = run(token, past_key_values=cache, use_cache=True, cache_position=at[0])
            output.logits[:, -1].argmax(dim=-1).tolist()
            at[0] = at[0] + 1

        for _ in range(3):
            step()
        kernels = _kernels(step, device)
        return Row(name, _case(1, depth), way, _seconds(step), 1, kernels)


def _seconds(step: Callable[[], None]) -> float:
    """Return the mean seconds of a step, which waits for its end."""
    started, steps = time.perf_counter(), 0
    while steps < STEPS and time.perf_counter() - started < STEPPING:
        step()
        steps += 1
    return (time.perf_counter() - started) / steps


def _kernels(step: Callable[[], None], device: torch.device) -> int:
    """Count the kernels that a step launches; without a GPU, the operations of torch."""
    there = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if there else ProfilerActivity.CPU]) as seen:
        step()
        wait(device)
    kind = torch.autograd.DeviceType.CUDA if there else torch.autograd.DeviceType.CPU
    names = [one.name for one in seen.events() or () if one.device_type == kind]
    return sum(not one.startswith(("Memcpy", "Memset")) for one in names)

"""Two processes of one thread each, beside one process of two threads, on the same machine.

    python -m benchmarks.parallel [--geometry qwen2-0.5b] [--layers N] [--rounds 5]

All run in turns, so that what else the machine does meets all alike; a row is the median of the
rounds' ratios, and the times of the best round. "messages" are two processes whose sums are
gloo's, "memory" those that meet in memory, layers called one by one in the former. The third
column tells how often two processes met in a step.
"""

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.processes import Seat, config_of, ratio, running
from quintet.configuration import PreTrainedConfig
from quintet.measurement.synthetic import random_ids, random_model
from quintet.parallel import shared_buffer as shared_buffers
from quintet.parallel.apply import connect, divide
from quintet.parallel.world import Degrees, World

# Processes, and the threads of each.
SETUPS = {"one process": (1, 2), "messages": (2, 1), "memory": (2, 1)}


@dataclass(frozen=True)
class Work:
    """What is measured: so many tokens behind a context, or a prompt."""

    kind: str
    count: int


def serve(seat: Seat, config: PreTrainedConfig) -> None:
    """Serve one process of a setup."""
    model: Any = random_model(config, torch.bfloat16)
    model.eval()
    world, degrees = None, Degrees(tp=seat.size)
    if seat.size > 1:
        # Cut before the others make theirs.
        table, _ = divide(model, World(seat.rank, degrees, torch.device("cpu"), {}))
    seat.built()
    if seat.size > 1:
        seat.join()
        world = World.of(degrees, torch.device("cpu"))
        if seat.setup == "messages":
            shared_buffers._OF_GROUPS[world.groups["tp"]] = None
        connect(model, table, world)
        model.world = world
    for work in seat.work():
        seat.orders.send(measure(model, work, world))


@torch.no_grad()
def measure(model: Any, work: Work, world: World | None) -> tuple[float, int]:
    """Return the seconds a step or a prompt takes, and how often processes met in it."""
    shared_buffer = None if world is None else shared_buffers.shared_buffer_of(world.groups["tp"])
    torch.manual_seed(0)
    if work.kind == "decode":
        cache = model.new_cache()
        model(random_ids(model.config.vocab_size, 1, 8), past_key_values=cache, use_cache=True)
        steps = work.count
        with model.fused_session(cache):
            token = random_ids(model.config.vocab_size, 1, 1)
            model(token, past_key_values=cache, use_cache=True)
            before = 0 if shared_buffer is None else shared_buffer.calls
            start = time.perf_counter()
            for _ in range(steps):
                output = model(token, past_key_values=cache, use_cache=True)
                token = output.logits[:, -1].argmax(dim=-1)[:, None]
            taken = (time.perf_counter() - start) / steps
        met = 0 if shared_buffer is None else (shared_buffer.calls - before) // steps
        return taken, met
    prompt = random_ids(model.config.vocab_size, 1, work.count)
    before = 0 if shared_buffer is None else shared_buffer.calls
    start = time.perf_counter()
    model(prompt, past_key_values=model.new_cache(), use_cache=True, logits_to_keep=1)
    taken = time.perf_counter() - start
    return taken, 0 if shared_buffer is None else shared_buffer.calls - before


def main() -> None:
    """Print a row for each kind of work and setup."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", default="qwen2-0.5b")
    parser.add_argument("--layers", type=int, help="cut to so many")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    config = config_of(asked.geometry, num_hidden_layers=asked.layers)
    with running(SETUPS, serve, config) as setups:
        print("| work | processes | met | ms | of one process |\n|---|---|---|---|---|", flush=True)
        for work in (Work("decode", asked.tokens), Work("prefill", asked.prompt)):
            found = setups.in_turns(work, asked.rounds)
            firsts = {setup: [one[0] for one in rounds] for setup, rounds in found.items()}
            base = [seconds for seconds, _ in firsts["one process"]]
            for setup, rounds in firsts.items():
                own = [seconds for seconds, _ in rounds]
                print(
                    f"| {work.kind} {work.count} | {setup} | {rounds[-1][1] or ''} | "
                    f"{1e3 * min(own):.1f} | {ratio(base, own):.2f}× |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

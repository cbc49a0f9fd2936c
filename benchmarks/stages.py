"""Two stages of one thread each, whose rows take turns, beside one process on the same machine.

    python -m benchmarks.stages [--geometry qwen2-0.5b] [--layers N] [--batch 8] [--rounds 5]

All run in turns of their own, so that what else the machine does meets all alike. A row of the
table is the median of the rounds' ratios to one process of one thread, and the best round.
"together" are stages that all rows pass at once, each waiting for the other.
"""

import argparse
import time
from typing import Any
from unittest import mock

import torch

from benchmarks.processes import Seat, config_of, ratio, running
from quintet.configuration import PreTrainedConfig
from quintet.generation import call
from quintet.measurement.synthetic import random_ids, random_model
from quintet.parallel.apply import shard_model
from quintet.parallel.world import Degrees, World

# Processes, and the threads of each.
SETUPS = {"one thread": (1, 1), "two threads": (1, 2), "together": (2, 1), "in turns": (2, 1)}


def serve(seat: Seat, config: PreTrainedConfig) -> None:
    """Serve one process of a setup."""
    model: Any = random_model(config, torch.bfloat16)
    model.eval()
    seat.built()
    if seat.size > 1:
        seat.join()
        world = World.of(Degrees(pp=seat.size), torch.device("cpu"))
        shard_model(model, world)
        model.world = world
    for batch, prompt, new in seat.work():
        groups = call.groups_of if seat.setup == "in turns" else _all_at_once
        torch.manual_seed(0)
        ids = random_ids(config.vocab_size, batch, prompt)
        began = time.perf_counter()
        with mock.patch.object(call, "groups_of", groups):
            model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None)
        seat.orders.send(time.perf_counter() - began)


def _all_at_once(world: World | None, rows: int) -> list[slice]:
    return [slice(0, rows)]


def main() -> None:
    """Print a row for each kind of work and setup."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", default="qwen2-0.5b")
    parser.add_argument("--layers", type=int, help="cut to so many")
    parser.add_argument("--vocabulary", type=int, help="cut to so many")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    config = config_of(asked.geometry, num_hidden_layers=asked.layers, vocab_size=asked.vocabulary)
    with running(SETUPS, serve, config) as setups:
        print("| work | setup | s | of one thread |\n|---|---|---|---|", flush=True)
        for name, work in {
            f"{asked.tokens} tokens": (asked.batch, 8, asked.tokens),
            f"a prompt of {asked.prompt}": (asked.batch, asked.prompt, 1),
        }.items():
            found = setups.in_turns(work, asked.rounds)
            seconds = {setup: [max(one) for one in rounds] for setup, rounds in found.items()}
            for setup, own in seconds.items():
                faster = ratio(seconds["one thread"], own)
                print(f"| {name} | {setup} | {min(own):.2f} | {faster:.2f}× |", flush=True)


if __name__ == "__main__":
    main()

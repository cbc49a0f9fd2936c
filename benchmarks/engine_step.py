"""What a step of an engine costs beside its forward: `python benchmarks/engine_step.py`.

Rows of the packaged model decode greedily and by sampling; the time of a step without that of the
model's forward within it is the overhead. The steps are those behind the first ones; medians.
Beside it, what the thread of a serving engine does between two steps while tasks of an event loop
read the same answers: plans, text, counting and handing out; a mean of its processor time.
"""

import argparse
import asyncio
import statistics
import time
from typing import Any

import torch

from quintet import AutoModelForCausalLM, AutoTokenizer, demo_model
from quintet.generation.engine import Engine
from quintet.serving import Engine as ServingEngine
from quintet.serving import Limits

SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8}


class Timed:
    """A model whose forwards are timed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        made = self.model(*args, **kwargs)
        self.seconds += time.perf_counter() - begin
        return made


def measure(model: Any, rows: int, steps: int, options: dict[str, Any]) -> tuple[float, float]:
    """Return the median milliseconds of a step and of its overhead."""
    timed = Timed(model)
    engine = Engine(timed, rows, 64 + steps + 1)
    dice = torch.Generator().manual_seed(0)
    sequences = []
    for row in range(rows):
        prompt = torch.randint(300, 2000, (1, 32 + 4 * row), generator=dice)
        sequences.append(
            engine.sequence(
                prompt,
                max_new_tokens=steps,
                eos_token_id=-1,
                generator=torch.Generator().manual_seed(row),
                **options,
            )
        )
        engine.add(sequences[-1])
    engine.step(sequences)
    whole, beside = [], []
    for _ in range(steps - 1):
        timed.seconds, begin = 0.0, time.perf_counter()
        engine.step(sequences)
        whole.append(1e3 * (time.perf_counter() - begin))
        beside.append(whole[-1] - 1e3 * timed.seconds)
    return statistics.median(whole[5:]), statistics.median(beside[5:])


def between(model: Any, rows: int, steps: int, options: dict[str, Any]) -> float:
    """Return the mean milliseconds that a serving engine's thread has beside each step."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model())

    async def read(engine: ServingEngine, row: int) -> None:
        generator = torch.Generator().manual_seed(row)
        own = {"max_new_tokens": steps, "eos_token_id": -1, "generator": generator, **options}
        async for _ in engine.generate([300 + row, 400, 500], **own):
            pass

    async def everybody(engine: ServingEngine) -> None:
        await asyncio.gather(*(read(engine, row) for row in range(rows)))

    limits = Limits(rows=rows, capacity=64 + steps)
    # Its own time, not that in which others have the processor or the interpreter.
    with ServingEngine(model, tokenizer, limits, clock=time.thread_time) as engine:
        asyncio.run(everybody(engine))
        before = engine.state
        asyncio.run(everybody(engine))
        after = engine.state
    beside = after.overhead_seconds - before.overhead_seconds
    return 1e3 * beside / (after.steps - before.steps)


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--steps", type=int, default=120)
    arguments.add_argument("--threads", type=int, default=1)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    model = AutoModelForCausalLM.from_pretrained(demo_model())
    print("| rows | options | step, ms | beside the forward, ms | between two steps, ms |")
    print("|---|---|---|---|---|")
    for rows in (1, 8):
        for name, options in (("greedy", {"do_sample": False}), ("sampled", SAMPLING)):
            step, beside = measure(model, rows, given.steps, options)
            served = between(model, rows, given.steps, options)
            print(f"| {rows} | {name} | {step:.2f} | {beside:.2f} | {served:.2f} |")


if __name__ == "__main__":
    main()

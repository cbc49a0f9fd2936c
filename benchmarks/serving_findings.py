"""What targets of a server are measured with: a finding, models and servers, single requests."""

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.servers import KINDS, Server
from benchmarks.serving_files import servable
from quintet import AutoModelForCausalLM
from quintet.hub import demo_model
from quintet.measurement.serving.asking import RequestRecord, Target, find
from quintet.measurement.serving.connection import Address

DEMO = "packaged"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was asked for, and what was measured.

    Attributes:
        target: its number.
        what: in words.
        asked: the bound.
        measured: what it is compared with.
        least: whether the bound is the least; else it is the most.
        unit: of both; "" for a ratio.
        more: whatever else was measured on the way.
    """

    target: str
    what: str
    asked: float
    measured: float
    least: bool = False
    unit: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        return self.measured >= self.asked if self.least else self.measured <= self.asked

    @property
    def row(self) -> str:
        """A line of the table."""
        sign = "≥" if self.least else "≤"
        asked, measured = (f"{x:.3g}{self.unit}" for x in (self.asked, self.measured))
        ends = "met" if self.met else "missed"
        return f"| {self.target} | {self.what} | {sign} {asked} | {measured} | {ends} |"


@dataclass(frozen=True, slots=True)
class Bench:
    """Models and servers of a run.

    Attributes:
        files: where checkpoints are kept.
        threads: of the server, and of what is measured beside it.
        rounds: how often everything is done.
        models: a pattern of those whose conversations are followed.
    """

    files: Path
    threads: int
    rounds: int
    models: str = ""

    def path(self, name: str) -> Path:
        """Return the directory of a model."""
        return Path(demo_model()) if name == DEMO else servable(self.files, name)

    @contextmanager
    def server(
        self, name: str, *options: str, rows: int = 8, context: int = 4096
    ) -> Iterator[Server]:
        """Run a server of ours."""
        print(f"starting a server of {name} {' '.join(options)}", file=sys.stderr, flush=True)
        with Server(
            KINDS[0],
            self.path(name),
            rows=rows,
            context=1024 if name == DEMO else context,
            threads=self.threads,
            log=Path("/tmp/quintet-serving-targets.log"),
            options=options,
        ) as server:
            yield server


@cache
def model_of(path: Path) -> Any:
    """Return a model, loaded once."""
    return AutoModelForCausalLM.from_pretrained(path)


def ids_of(model: Any, tokens: int, seed: int, rows: int = 1) -> torch.Tensor:
    """Return random ids (rows, tokens)."""
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(300, 2000, (rows, tokens), generator=dice)


def generated(model: Any, ids: torch.Tensor, out: int) -> float:
    """Return how long `generate()` takes for so many tokens."""
    began = time.perf_counter()
    model.generate(ids, max_new_tokens=out, eos_token_id=[], do_sample=False)
    return time.perf_counter() - began


def target_of(server: Server, **extra: Any) -> Target:
    """Return how a server is asked."""
    return asyncio.run(find(Address.of(server.url), extra=extra))


def answered(target: Target, ids: torch.Tensor, out: int) -> RequestRecord:
    """Ask alone; what goes wrong ends the run."""
    one = asyncio.run(target.ask(ids[0].tolist(), out))
    assert one.error is None, one.error
    return one


def table(findings: Sequence[Finding]) -> str:
    """Return findings in Markdown."""
    head = ["| target | what | asked | measured | |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(one.row for one in findings)])

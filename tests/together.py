"""Two processes that train one model together: run as a script, it fails where they part.

Forked from one process, so that everything is imported once.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from comparisons import TOLERANCE
from conformance.families import FAMILIES, Family
from support import relative_error

RANKS, STEPS = 2, 2
PREDICTING = {"num_nextn_predict_layers": 1}


def main() -> None:
    with TemporaryDirectory() as folder:
        start_processes(work, args=(folder,), nprocs=RANKS, start_method="fork")


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{Path(folder) / 'meeting'}", rank=rank, world_size=RANKS
    )
    for family in FAMILIES:
        for static in (False, True):
            compare(family, rank, static)
    v3 = next(family for family in FAMILIES if family.name == "deepseek-v3")
    compare(v3, rank, True, mtp_loss_weight=0.5)
    dist.destroy_process_group()


def compare(family: Family, rank: int, static: bool, **options: float) -> None:
    """Train a model on halves of batches, and compare with one that sees them whole."""
    changes = PREDICTING if options else {}
    alone, model = (family.model_of(**changes).train() for _ in range(2))
    # The balance of a batch is not the mean of that of its halves; DeepSeek-V2's is of each row.
    shared = DistributedDataParallel(model, static_graph=static)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in (alone, model)]
    torch.manual_seed(2)
    for step in range(STEPS):
        ids = torch.randint(1, 101, (2 * RANKS, 7))
        mine = ids[2 * rank : 2 * rank + 2]
        alone(ids, labels=ids, use_cache=step == 1, **options).loss.backward()
        shared(mine, labels=mine, use_cache=step == 1, **options).loss.backward()
        for (name, one), two in zip(alone.named_parameters(), model.parameters(), strict=True):
            whole, halves = grad(one), grad(two)
            worst = (whole - halves).abs().max().item()
            scale = max(whole.abs().max().item(), 1e-3)
            told = f"{family} {static=} {options} {rank=} {step=} {name}: {worst / scale}"
            assert worst < 10 * TOLERANCE * scale, told
            assert relative_error(halves, mean(halves)) == 0, f"{told}; the processes differ"
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def mean(x: Tensor) -> Tensor:
    gathered = [torch.empty_like(x) for _ in range(RANKS)]
    dist.all_gather(gathered, x.contiguous())
    return torch.stack(gathered).mean(dim=0)


if __name__ == "__main__":
    main()
    sys.exit(0)

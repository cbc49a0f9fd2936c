"""Two processes that hold one model between them: run as a script, it fails where they part."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes

from comparisons import TOLERANCE
from conformance.families import FAMILIES, Family
from support import relative_error

RANKS, STEPS = 2, 3


def main() -> None:
    with TemporaryDirectory() as folder:
        start_processes(work, args=(folder,), nprocs=RANKS, start_method="fork")


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{Path(folder) / 'meeting'}", rank=rank, world_size=RANKS
    )
    for family in FAMILIES:
        compare(family, Path(folder) / family.name)
    dist.destroy_process_group()


def compare(family: Family, folder: Path) -> None:
    """Train a model in shards, generate with it and save it; one that is whole does the same."""
    whole, parts = (family.model_of(tie_word_embeddings=True).train() for _ in range(2))
    mesh = init_device_mesh("cpu", (RANKS,))
    # Layers of Zamba2 share blocks, and what is shared has to be in one group.
    for layer in () if family.name == "zamba2" else parts.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(parts, mesh=mesh)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-2) for model in (whole, parts)]
    torch.manual_seed(2)
    for step in range(STEPS):
        ids = torch.randint(1, 101, (2, 7))
        told = [model(input_ids=ids, labels=ids).loss for model in (whole, parts)]
        assert relative_error(told[1], told[0]) < 10 * TOLERANCE, f"{family} {step=}: {told}"
        for loss, optimizer in zip(told, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    ids = torch.arange(5, 10)[None]
    texts = [model.eval().generate(ids, max_new_tokens=4) for model in (whole, parts)]
    assert torch.equal(*texts), family
    state = get_model_state_dict(
        parts, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if dist.get_rank() == 0:
        parts.save_pretrained(folder, state_dict=state)
        again = type(parts).from_pretrained(folder)
        with torch.no_grad():
            assert relative_error(again(ids).logits, whole(ids).logits) < 100 * TOLERANCE, family
    dist.barrier()


if __name__ == "__main__":
    main()
    sys.exit(0)

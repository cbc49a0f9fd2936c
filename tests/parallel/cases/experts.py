"""Cases of experts on processes that have tokens of their own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.cases.tensor import agree, agree_gradient, family, tokens, world
from quintet import AutoModelForCausalLM
from quintet.errors import InputError
from quintet.layers.moe import ExpertStack
from quintet.modeling.loading import Options, load
from quintet.modeling.source import ModelSource
from quintet.parallel import regions
from quintet.parallel.apply import connect, divide
from quintet.parallel.expert_seats import balanced
from quintet.parallel.gradients import sum_partial
from quintet.parallel.placement import Shard
from quintet.parallel.world import World
from quintet.training.balance import ExpertLoads
from support import relative_error

Changes = dict[str, Any]


def divided(model: Any, here: World) -> dict[str, Shard]:
    table, shards = divide(model, here)
    connect(model, table, here)
    return shards


def own_tokens(name: str, changes: Changes, degrees: dict[str, int]) -> None:
    """Compare a model whose processes have different rows with one that has all of them."""
    whole, parts = (family(name).model_of(**changes).train().double() for _ in range(2))
    here = world(**degrees)
    shards = divided(parts, here)
    batches, batch = here.degrees.fsdp, here.coordinates["fsdp"]
    # Rows of different lengths: processes send unequally many tokens, and one has almost none.
    rows = [tokens(1, (7, 1, 4, 2)[i]) for i in range(batches)]
    wanted = [whole(input_ids=row).logits for row in rows]
    found = parts(input_ids=rows[batch]).logits
    agree(found, wanted[batch], "logits")
    weights = [torch.randn_like(logits) for logits in wanted]
    torch.stack([(x * w).sum() for x, w in zip(wanted, weights, strict=True)]).sum().backward()
    (found * weights[batch]).sum().backward()
    if "tp" in here.groups:
        sum_partial(parts, shards, here.groups["tp"])
    own = dict(parts.named_parameters())
    for path, parameter in whole.named_parameters():
        if parameter.grad is None:
            continue
        grad = own[path].grad
        if ".experts." not in path and batches > 1:
            # What is not divided among them, processes with other rows add up in training.
            dist.all_reduce(grad, group=here.groups["fsdp"])
        agree_gradient(grad, path, whole, shards)


def redundant(name: str, changes: Changes, degrees: dict[str, int], more: int) -> None:
    """Compare a model whose experts stand by what they were asked for with one that is whole."""
    whole, parts = (family(name).model_of(**changes) for _ in range(2))
    ids = tokens(2, 7)
    with torch.no_grad(), ExpertLoads(whole) as counted:
        wanted = whole(input_ids=ids).logits
        loads = dict(zip(counted.routers, counted.loads(), strict=True))
    here = world(**degrees)
    seats = balanced(loads, here.degrees.ep, redundant=more)
    assert any(len(set(order)) < len(order) for order in seats.values())
    divided(parts, replace(here, seats=seats))
    stack = next(m for n, m in parts.named_modules() if n in seats)
    assert len(stack.down_proj) == (stack.num_experts + more) // here.degrees.ep
    with torch.no_grad():
        agree(parts(input_ids=ids).logits, wanted, "logits")
        agree(parts(input_ids=ids[:1, :1]).logits, whole(input_ids=ids[:1, :1]).logits, "one token")


def loaded(name: str, changes: Changes, path: Path, quantize: str | None) -> None:
    """Compare a model that is loaded with its experts at seats with one that is loaded whole."""
    cls = family(name).cls("ForCausalLM")
    whole = cls.from_pretrained(path, quantize=quantize)
    found = [n for n, m in whole.named_modules() if isinstance(m, ExpertStack)]
    # Both processes have all of them, one in another order.
    order = (0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0)
    here = replace(world(tp=2, ep=2), seats=dict.fromkeys(found, order))
    options = Options(world=here, quantize=quantize)
    parts = load(cls, ModelSource(path), None, {}, options)[0].eval()
    with torch.no_grad():
        wanted, made = (model(input_ids=tokens(2, 7)).logits for model in (whole.eval(), parts))
    # In int8 the inputs of a part are rounded by themselves; a wrong expert is another number.
    assert relative_error(made, wanted) < (1e-5 if quantize is None else 1e-2)


def asked_for(source: Path, target: Path) -> None:
    """Load a model with redundant experts as anybody does, run it, and save it."""
    torch.set_num_threads(1)
    whole = AutoModelForCausalLM.from_pretrained(source, device_map=None).eval()
    found = [n for n, m in whole.named_modules() if isinstance(m, ExpertStack)]
    loads = {name: [9.0, 1, 1, 1, 1, 2] for name in found}
    seats = balanced(loads, 2, redundant=2)
    refused = {"tp_size": 2, "expert_seats": seats}
    with pytest.raises(InputError, match="ep_size=1 gives all of them to each"):
        AutoModelForCausalLM.from_pretrained(source, distributed_config=refused)
    options = {"tp_size": 2, "ep_size": 2, "expert_seats": seats}
    parts = AutoModelForCausalLM.from_pretrained(source, distributed_config=options).eval()
    assert len(parts.get_submodule(found[0]).down_proj) == 4
    with torch.no_grad():
        agree(*(model(input_ids=tokens(2, 7)).logits for model in (parts, whole)), "logits")
    parts.save_pretrained(target)
    print("the same")


def reductions(name: str, changes: Changes, degrees: dict[str, int]) -> int:
    """Count the sums over processes in a forward of one token."""
    model = family(name).model_of(**changes)
    divided(model, world(**degrees))
    counted = 0
    summed = regions.sum_in_place

    def count(x: Tensor, group: dist.ProcessGroup) -> None:
        nonlocal counted
        counted += 1
        summed(x, group)

    regions.sum_in_place = count
    try:
        with torch.no_grad():
            # Without a cache each layer is called, and none adds up inside of a kernel.
            model.base_model(input_ids=tokens(1, 1), use_cache=False)
    finally:
        regions.sum_in_place = summed
    return counted

"""Cases of sequences on several processes; each process compares with a model that is whole."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.cases.pipeline import check_gradients
from parallel.cases.tensor import family, world
from parallel.cases.training import config_of
from quintet.parallel import regions as regions_of
from quintet.parallel.apply import shard_model, shards_of
from quintet.parallel.context_parallel import Sequences
from quintet.parallel.gradients import sum_partial
from quintet.parallel.placement import Shard, table_of
from quintet.parallel.regions import entered, scattered
from quintet.parallel.sequence_parallel import slice_tokens
from quintet.planning.devices import device
from quintet.planning.plans import described
from quintet.planning.training import Training, training_footprint
from quintet.planning.world import Split
from quintet.training.batch import Batch
from quintet.training.joining import joined, parallelize
from quintet.training.objectives.next_token import LanguageModelling
from quintet.training.objectives.targets import targets
from quintet.training.progress import Progress
from quintet.training.step import accumulate
from support import relative_error


def batch_of(length: int, kind: str) -> Batch:
    """Make two rows with uneven labels, of one text each, with padding, or of several texts."""
    ids = torch.randint(1, 100, (2, length))
    labels = torch.where(torch.rand(2, length) < 0.6, ids, -100)
    labels[0, length // 2 :] = -100
    batch = Batch(input_ids=ids, labels=labels)
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[1, length - 4 :] = 0
        return replace(batch, attention_mask=mask, labels=labels.masked_fill(mask == 0, -100))
    if kind == "packed":
        index = (torch.arange(length) > 4).long() + (torch.arange(length) > 9).long()
        return replace(batch, seq_idx=torch.stack((index, torch.zeros_like(index))))
    return batch


def gradients(name: str, changes: dict[str, Any], kind: str, length: int, count: int) -> None:
    """Compare the loss and the gradients of rows that processes share with those of one."""
    whole, model = (family(name).model_of(**changes).train() for _ in range(2))
    # Where layers run again, keys are gathered again.
    model.gradient_checkpointing_enable()
    here = world(cp=count)
    torch.manual_seed(1)
    batch = batch_of(length, kind)
    depth = changes.get("num_nextn_predict_layers", 0)
    objective = LanguageModelling(prediction=0.3 if depth else None, depth=max(depth, 1))
    wanted = accumulate(whole, objective, [batch], Progress(0, 0, 0.0), nullcontext)
    counts = Counter(objective.counts(batch))
    sequences = Sequences(model, here)
    chunks = sequences.chunks(length)
    made = sequences.states(batch.input_ids, batch.seq_idx, batch.attention_mask, depth)
    assert made.hidden.shape[1] == chunks.length // count
    head, total = model.scored_head(), torch.zeros(())
    for k, states in enumerate((made.hidden, *made.ahead)):
        own = chunks.of(targets(batch, k + 1), -100)
        term = -head.sums(states, own).log_prob.sum()
        divisor = counts[f"prediction_{k}" if k else "next_token"]
        total = total + term / divisor * (0.3 / depth if k else 1)
    total.backward()
    loss = total.detach().clone()
    dist.all_reduce(loss)
    assert abs(loss.item() - wanted.loss) < 1e-5 * abs(wanted.loss)
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    shards = {n: Shard(tuple(p.shape), {}) for n, p in whole.named_parameters()}
    check_gradients(whole, model, shards)


def slices(name: str, changes: dict[str, Any], padded: bool) -> None:
    """Compare logits and gradients of a model that is cut, and whose norms go by slices."""
    whole, parts = (family(name).model_of(**changes).train() for _ in range(2))
    more = {"output_mtp_logits": True} if changes.get("num_nextn_predict_layers") else {}
    here = world(tp=2)
    shards = shards_of(parts, table_of(parts), here)
    own = slice_tokens(parts, shard_model(parts, here), here)
    assert own.partial
    torch.manual_seed(1)
    ids = torch.randint(1, 101, (2, 7))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    outputs = [model(input_ids=ids, attention_mask=mask, **more) for model in (whole, parts)]
    made = [torch.stack((o.logits, *(o.mtp_logits or () if more else ()))) for o in outputs]
    real = mask[None, ..., None]
    assert relative_error(made[1] * real, made[0] * real) < 1e-5
    weights = torch.randn_like(made[0]) * real
    for logits in made:
        (logits * weights).sum().backward()
    sum_partial(parts, shards, here.groups["tp"])
    own.add_up({n: p.grad for n, p in parts.named_parameters() if p.grad is not None})
    check_gradients(whole, parts, shards)
    with torch.no_grad():
        # Where nothing is learned, a step of one token is no slice.
        one = [model(input_ids=ids[:, :1]).logits for model in (whole, parts)]
    assert relative_error(one[1], one[0]) < 1e-5


def kept(name: str) -> list[tuple[int, int]]:
    """Return how many bytes a forward keeps for its backward, and how many are planned.

    First by tp alone, and then by slices, too.
    """
    found = []
    for by_tokens in (False, True):
        model = family(name).model_of(hidden_size=128, intermediate_size=256).train()
        config = config_of({"tp": 2, "sequence_parallel": by_tokens})
        parallelize(model, config, joined(config.parallel))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes: dict[int, int] = {}
        held: list[Tensor] = []

        def keep(x: Tensor, sizes: dict[int, int] = sizes, held: list[Tensor] = held) -> Tensor:
            # What is held is not made anew at the same place.
            held.append(x)
            storage = x.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model.base_model(input_ids=torch.arange(96)[None]).last_hidden_state.sum()
        work = Training(96, rows=1, itemsize=4, kernels=True, sequence_parallel=by_tokens)
        planned, _ = described(model.config, device("cpu"))
        expected = training_footprint(planned, Split(tp=2), work).activations
        measured = sum(size for place, size in sizes.items() if place not in weights)
        found.append((measured, expected))
    return found


def regions(by_messages: bool) -> None:
    """Compare what enters and leaves a region in parts with what f and g make of the whole."""
    torch.manual_seed(0)
    rank, group, sizes = dist.get_rank(), world(tp=2).groups["tp"], [3, 2]
    wholes = [torch.randn(2, 5, 3, requires_grad=True) for _ in range(2)]
    factors, weights = torch.randn(2, 5, 3), torch.randn(2, 2, 5, 3)
    own = slice(0, 3) if rank == 0 else slice(3, 5)
    none = patch.object(regions_of, "shared_buffer_of", return_value=None)
    with none if by_messages else nullcontext():
        part = wholes[0].detach()[:, own].clone().requires_grad_()
        made = entered(part, group, widths=sizes, dim=1)
        assert torch.equal(made, wholes[0])
        (made * weights[rank]).sum().backward()
        assert part.grad is not None
        torch.testing.assert_close(part.grad, weights.sum(dim=0)[:, own])
        left = scattered(wholes[rank] * 2, group, widths=sizes, dim=1)
        torch.testing.assert_close(left, (wholes[0] + wholes[1])[:, own] * 2)
        (left * factors[:, own]).sum().backward()
        torch.testing.assert_close(wholes[rank].grad, factors * 2)

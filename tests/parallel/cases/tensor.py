"""Cases of tensor and expert parallelism; each process compares with a model that is whole."""

import json
from functools import cache
from typing import Any

import torch
from torch import Tensor

from conformance.families import FAMILIES, Family
from quintet.parallel.apply import shard_model, shards_of
from quintet.parallel.gradients import sum_partial
from quintet.parallel.placement import Shard, table_of
from quintet.parallel.world import Degrees, World
from support import relative_error

Changes = dict[str, Any]
PIECES = ((0, 6), (6, 7), (7, 9))


def family(name: str) -> Family:
    return next(one for one in FAMILIES if one.name == name)


def world(**degrees: int) -> World:
    return World.of(Degrees(**degrees), torch.device("cpu"))


def tokens(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(1, 101, shape)


def agree(found: Tensor, wanted: Tensor, what: str) -> None:
    error = relative_error(found, wanted)
    assert error < 1e-5, f"{what}: {error}"


def agree_gradient(found: Tensor | None, path: str, whole: Any, shards: dict[str, Shard]) -> None:
    """Compare a gradient with this process's part of the whole one."""
    wanted = shards[path].of(whole.get_parameter(path).grad)
    # Of what no token went through there is none.
    found = torch.zeros_like(wanted) if found is None else found
    agree(found, wanted, path)


def answers(model: Any, **inputs: Any) -> list[Tensor]:
    """Everything that a model of any head says of tokens."""
    output = model(**inputs)
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    return [*(output[name] for name in names if name in output), *(output.get("mtp_logits") or ())]


def logits_and_gradients(
    name: str, changes: Changes, degrees: dict[str, int], head: str = "ForCausalLM"
) -> None:
    """Compare logits, and the gradient of what is made of all of them.

    In float64: gradients of routers are differences, in which float32's roundings grow.
    """
    whole, wanted, weights = _learned_whole(name, json.dumps(changes), head)
    parts = family(name).model_of(head, **changes).train().double()
    here = world(**degrees)
    shards = shards_of(parts, table_of(parts), here)
    shard_model(parts, here)
    found = answers(parts, **_asked(changes))
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        agree(one, other, "logits")
    _learn(found, weights)
    sum_partial(parts, shards, here.groups["tp"])
    own = dict(parts.named_parameters())
    for path, parameter in whole.named_parameters():
        if parameter.grad is None:
            assert own[path].grad is None or not own[path].grad.any()
            continue
        agree_gradient(own[path].grad, path, whole, shards)


@cache
def _learned_whole(name: str, changes: str, head: str) -> tuple[Any, list[Tensor], list[Tensor]]:
    """Return a whole model with its gradients, what it said, and by which weights that counts.

    They are the same however it is divided.
    """
    asked = json.loads(changes)
    whole = family(name).model_of(head, **asked).train().double()
    made = answers(whole, **_asked(asked))
    weights = [torch.randn_like(one) for one in made]
    _learn(made, weights)
    return whole, [one.detach() for one in made], weights


def _asked(changes: Changes) -> Changes:
    asked: Changes = {"input_ids": tokens(2, 7)}
    asked["attention_mask"] = torch.ones(2, 7, dtype=torch.long)
    if changes.get("num_nextn_predict_layers"):
        asked["output_mtp_logits"] = True
    return asked


def _learn(said: list[Tensor], weights: list[Tensor]) -> None:
    torch.stack([(x * w).sum() for x, w in zip(said, weights, strict=True)]).sum().backward()


@torch.no_grad()
def packed_texts(name: str, changes: Changes, degrees: dict[str, int]) -> None:
    """Compare the logits of several texts in one row."""
    whole, parts = (family(name).model_of(**changes) for _ in range(2))
    shard_model(parts, world(**degrees))
    starts = torch.tensor([0, 3, 4, 9])
    inputs = {"input_ids": tokens(1, 9), "cu_seq_lens_q": starts}
    wanted, found = (answers(model, **inputs)[0] for model in (whole, parts))
    agree(found, wanted, "logits")


@torch.no_grad()
def steps(name: str, changes: Changes, degrees: dict[str, int]) -> None:
    """Compare the logits of a padded prompt, and of tokens that go on with what it left."""
    parts = family(name).model_of(**changes)
    shard_model(parts, world(**degrees))
    wanted = _steps_of_whole(name, json.dumps(changes))
    for (start, end), one, other in zip(PIECES, _said(parts), wanted, strict=True):
        agree(one, other, f"tokens {start} to {end}")


@cache
def _steps_of_whole(name: str, changes: str) -> list[Tensor]:
    return _said(family(name).model_of(**json.loads(changes)))


def _said(model: Any) -> list[Tensor]:
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :2] = 0
    past, said = None, []
    for start, end in PIECES:
        output = model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            past_key_values=past,
            use_cache=True,
        )
        past = output.past_key_values
        # What stands at padding is nobody's.
        said.append(output.logits[mask[:, start:end].bool()])
    return said

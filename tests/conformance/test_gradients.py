"""The loss and every gradient, however a batch is laid out, cut up and recomputed.

In float32, to 1e-6 of the gradients of a layer (docs/numerics.md).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from comparisons import PADDING, batch, calmed, counted_labels
from conformance.families import FAMILIES, Family, each
from families import deepseek

LIMIT = 1e-6
V2, V3 = (f for f in FAMILIES if f.name in ("deepseek-v2", "deepseek-v3"))
# How layers are recomputed on the way back; None for not at all.
RECOMPUTED: dict[str, bool | None] = {"kept": None, "recomputed": False, "reentrant": True}
Inputs = Mapping[str, Any]


class Learned(NamedTuple):
    """What a model was taught: a loss, and a gradient for every parameter."""

    loss: float
    gradients: dict[str, Tensor]


def learned(model: Any, parts: Iterable[Inputs], loss_of: Callable[..., Tensor]) -> Learned:
    model.zero_grad()
    total = 0.0
    for part in parts:
        loss = loss_of(model, part)
        loss.backward()
        total += float(loss.detach())
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Learned(total, gradients)


def own_loss(model: Any, part: Inputs) -> Tensor:
    loss: Tensor = model(**part).loss
    return loss


def assert_same(found: Learned, told: Learned, what: str = "") -> None:
    """Compare by the norm of the difference: of a layer's gradients at once, and of each alone."""
    assert abs(found.loss - told.loss) < LIMIT * abs(told.loss)
    assert found.gradients.keys() == told.gradients.keys()
    layers: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, right in told.gradients.items():
        pair = found.gradients[name], right
        layers.setdefault(".".join(name.split(".")[:3]), []).append(pair)
        # A key's bias cancels in the softmax, so that its own gradient is rounding alone.
        if not name.endswith("k_proj.bias"):
            assert distance([pair]) < 10 * LIMIT, (what, name)
    for layer, pairs in layers.items():
        assert distance(pairs) < LIMIT, (what, layer)


def distance(pairs: list[tuple[Tensor, Tensor]]) -> float:
    error = sum(float((found - told).square().sum()) for found, told in pairs)
    whole = sum(float(told.square().sum()) for _, told in pairs)
    return float((error / whole) ** 0.5) if error else 0.0


def recomputing(model: Any, how: str) -> Any:
    reentrant = RECOMPUTED[how]
    if reentrant is None:
        model.gradient_checkpointing_disable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model.train()


def rows_of(inputs: Inputs) -> list[Inputs]:
    """A batch in as many parts as it has rows."""
    count = len(inputs["input_ids"])

    def row(value: Any, index: int) -> Any:
        batched = isinstance(value, Tensor) and value.ndim > 0
        return value[index : index + 1] if batched else value

    return [{name: row(x, index) for name, x in inputs.items()} for index in range(count)]


@pytest.mark.parametrize("padding", PADDING)
@each
def test_padded_rows_teach_what_they_teach_in_transformers(family: Family, padding: str) -> None:
    """Whole, and row by row with the number of labels that the whole has."""
    changes = dict(family.alone)
    if family is V2:
        changes["aux_loss_alpha"] = 0.0  # Transformers has no loss of its balance.
    ours, theirs = family.twins("ForCausalLM", changes, "eager")
    calmed(ours, theirs)
    ids, mask, extra = batch(padding)
    labels = counted_labels(ids, mask)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if "aux_loss" in family.compared:
        given["output_router_logits"] = True
    items = {"num_items_in_batch": (labels[:, 1:] != -100).sum()}
    told = learned(theirs, [{**given, **extra}], own_loss)
    for how in RECOMPUTED:
        assert_same(learned(recomputing(ours, how), [given], own_loss), told)
    told = learned(theirs, rows_of({**given, **extra, **items}), own_loss)
    assert_same(learned(ours, rows_of({**given, **items}), own_loss), told)


# -- several texts in a row --------------------------------------------------------------------

# Two rows of fourteen tokens, of three texts and of two.
ROWS = ((6, 1, 7), (9, 5))


def laid_out(ids: Tensor) -> dict[str, list[Inputs]]:
    """The same texts packed, packed and row by row, padded on both sides, and one by one."""
    items = {"num_items_in_batch": sum(n - 1 for row in ROWS for n in row)}
    index = torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in ROWS]
    ).to(torch.int32)
    packed = {"input_ids": ids, "labels": ids, "seq_idx": index, **items}
    texts = [t for row, sizes in zip(ids, ROWS, strict=True) for t in row.split(sizes)]
    width = max(map(len, texts))
    padded = {}
    for side in ("left", "right"):
        filled, mask = torch.zeros(2, len(texts), width, dtype=torch.long)
        for row, kept, text in zip(filled, mask, texts, strict=True):
            where = slice(width - len(text), None) if side == "left" else slice(len(text))
            row[where], kept[where] = text, 1
        labels = filled.masked_fill(mask == 0, -100)
        padded[side] = [{"input_ids": filled, "attention_mask": mask, "labels": labels, **items}]
    alone = [{"input_ids": t[None], "labels": t[None], **items} for t in texts if len(t) > 1]
    return {"packed": [packed], "packed-rows": rows_of(packed), **padded, "alone": alone}


@each
def test_texts_teach_the_same_packed_padded_and_alone(family: Family) -> None:
    changes: dict[str, Any] = dict(family.variants[family.thorough[-1]])
    options: dict[str, Any] = {}
    if family is V2:
        changes["aux_loss_alpha"] = 0.0  # A loss of whole texts has a test of its own.
    if family is V3:
        changes["num_nextn_predict_layers"] = 2
        options["mtp_loss_weight"] = 0.5
    model = family.model_of(**changes)
    calmed(model)
    layouts = laid_out(torch.randint(1, 101, (2, 14)))

    def loss_of(model: Any, part: Inputs) -> Tensor:
        return own_loss(model, {**part, **options})

    told = learned(recomputing(model, "kept"), layouts["alone"], loss_of)
    for layout, parts in layouts.items():
        for how in RECOMPUTED if layout == "packed" else ("recomputed",):
            found = learned(recomputing(model, how), parts, loss_of)
            assert_same(found, told, layout)


# -- losses that Transformers does not have ----------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("how", RECOMPUTED)
def test_prediction_layers_learn_the_papers_loss(depth: int, how: str) -> None:
    """L + λ/D · Σ_k L_k (eq. 24-25), with Transformers' layers: for rows and for packed texts."""
    ours, main, ahead = deepseek.mtp_twins(depth)
    calmed(ours, main, ahead.layers)
    weight = 0.3
    ids = torch.randint(1, 101, (1, 17))
    texts = ids.split((9, 8), dim=1)

    def their_loss(main: Any, part: Inputs) -> Tensor:
        sums, counts = [0.0] * (depth + 1), [0] * (depth + 1)
        for text in part["texts"]:
            logits = [main(text).logits, *deepseek.theirs_ahead(main, ahead, text, depth)]
            for k, scores in enumerate(logits):
                # At t, the k-th scores are of token t + k + 1.
                wanted = text[0, k + 1 :]
                sums[k] += F.cross_entropy(scores[0, : len(wanted)], wanted, reduction="sum")
                counts[k] += len(wanted)
        first, *later = (s / n for s, n in zip(sums, counts, strict=True))
        return first + weight / depth * sum(later)

    for given, parts in (
        ({}, [ids]),
        ({"seq_idx": torch.arange(2).repeat_interleave(torch.tensor([9, 8]))[None]}, texts),
    ):
        ahead.zero_grad()
        told = learned(main, [{"texts": parts}], their_loss)
        # With us, the head is first met as a part of a prediction layer.
        head = told.gradients.pop("lm_head.weight")
        told.gradients["model.layers.3.shared_head.head.weight"] = head
        for k, layer in enumerate(ahead.layers):
            for name, parameter in layer.named_parameters():
                name = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
                told.gradients[f"model.layers.{3 + k}.{name}"] = parameter.grad.clone()
        whole = {"input_ids": ids, "labels": ids, "mtp_loss_weight": weight, **given}
        assert_same(learned(recomputing(ours, how), [whole], own_loss), told)


@pytest.mark.parametrize("per_row", [True, False], ids=["sequence", "batch"])
@pytest.mark.parametrize("padding", PADDING)
def test_the_balance_of_v2_teaches_what_its_equations_say(padding: str, per_row: bool) -> None:
    """α Σ_e f_e P_e of each layer, the f_e without gradients (arXiv:2405.04434, §2.2.3)."""
    alpha, E, A = 0.5, 8, 3
    model = V2.model_of(seq_aux=per_row, aux_loss_alpha=alpha)
    calmed(model)
    ids, mask, _ = batch(padding)
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids}

    def plain_loss(model: Any, part: Inputs) -> Tensor:
        # In evaluation the model's own loss has no balance in it.
        out = model(**part, output_router_logits=True)
        loss: Tensor = out.loss
        for logits in out.router_logits:
            scores = logits.softmax(-1).view(*mask.shape, E)
            rows = [row[kept == 1] for row, kept in zip(scores, mask, strict=True)]
            for s in rows if per_row else [torch.cat(rows)]:
                chosen = torch.zeros_like(s).scatter(1, s.topk(A).indices, 1.0)
                f = chosen.sum(0) * E / (A * len(s))
                loss = loss + alpha * (f * s.mean(0)).sum() / (len(rows) if per_row else 1)
        return loss

    told = learned(model.eval(), [given], plain_loss)
    for how in RECOMPUTED:
        assert_same(learned(recomputing(model, how), [given], own_loss), told)

"""What is minimised is what the equations say, of logits that are there as a whole."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from conformance.families import FAMILIES, Family, each
from conformance.heads import made
from quintet.errors import ConfigError, InputError
from quintet.training.batch import Batch
from quintet.training.objective import Term
from quintet.training.objectives import LanguageModelling
from quintet.training.progress import Progress
from support import relative_error

START = Progress(step=0, tokens=0, done=0.0)
TEXTS = (4, 7, 2, 5)
V3 = next(family for family in FAMILIES if family.name == "deepseek-v3")


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 101, (n,), generator=generator) for n in TEXTS]


def some_labels(ids: Tensor) -> Tensor:
    """Those of a text that is learned in part."""
    return ids.masked_fill(ids % 5 == 0, -100)


def packed() -> Batch:
    """Two rows of two texts each."""
    rows = [torch.cat(texts()[:2]), torch.cat([*texts()[2:], torch.arange(1, 5)])]
    index = [[0] * 4 + [1] * 7, [0] * 2 + [1] * 5 + [2] * 4]
    ids = torch.stack(rows)
    return Batch(input_ids=ids, labels=some_labels(ids), seq_idx=torch.tensor(index), texts=5)


def padded() -> Batch:
    ids = torch.nn.utils.rnn.pad_sequence(texts(), batch_first=True)
    mask = (ids != 0).long()
    # A label that stands at padding is none.
    return Batch(input_ids=ids, labels=some_labels(ids), attention_mask=mask, texts=4)


def each_alone(batch: Batch) -> list[Batch]:
    rows = zip(batch.input_ids, batch.labels, strict=True)
    parts = []
    for row, (ids, labels) in enumerate(rows):
        if batch.attention_mask is not None:
            own = [batch.attention_mask[row] != 0]
        elif batch.seq_idx is not None:
            own = [batch.seq_idx[row] == n for n in batch.seq_idx[row].unique()]
        else:
            own = [torch.ones_like(ids, dtype=torch.bool)]
        parts += [
            Batch(input_ids=ids[which][None], labels=labels[which][None], texts=1) for which in own
        ]
    return parts


BATCHES = {"packed": packed, "padded": padded}
each_batch = pytest.mark.parametrize("kind", BATCHES)


def minimised(terms: Any, counts: Any) -> Tensor:
    total = torch.zeros(())
    for name, term in terms.items():
        assert term.count <= counts[name]
        total = total + term.weight * term.sum / max(1, counts[name])
    return total


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert largest > 0
    worst = max(
        float((ours.get(name, torch.zeros_like(g)) - g).abs().max()) for name, g in theirs.items()
    )
    # Both are rounded: texts beside each other, and each alone.
    return worst < 2e-6 * largest


def plainly(model: Any, batch: Batch, *, smoothing: float, z: float, prediction: float) -> Tensor:
    """The equations, of each text alone, with all logits."""
    sums: dict[str, Any] = {}
    counts: dict[str, int] = {}
    depth = 0 if not prediction else model.prediction_depth()
    for text in each_alone(batch):
        out = model(text.input_ids, **({"output_mtp_logits": True} if depth else {}))
        logits = [out.logits[0], *([x[0] for x in out.mtp_logits] if depth else [])]
        for k, z_n in enumerate(logits):
            labels = text.labels[0, k + 1 :]
            z_n = z_n[: len(labels)][labels != -100].float()
            labels = labels[labels != -100]
            counts[f"{k}"] = counts.get(f"{k}", 0) + len(labels)
            share = 0.0 if k else smoothing
            loss = F.cross_entropy(z_n, labels, label_smoothing=share, reduction="sum")
            if k == 0:
                loss = loss + z * z_n.logsumexp(-1).square().sum()
            sums[f"{k}"] = sums.get(f"{k}", 0.0) + loss
    weights = {"0": 1.0, **{f"{k}": prediction / depth for k in range(1, depth + 1)}}
    return sum(w * sums[k] / max(1, counts[k]) for k, w in weights.items())  # type: ignore[return-value]


@each_batch
@each
def test_every_family_learns_what_the_equations_say(family: Family, kind: str) -> None:
    batch, model = BATCHES[kind](), made(family, "ForCausalLM").train()
    objective = LanguageModelling(z_loss=1e-3, label_smoothing=0.1)
    terms = objective.terms(model, batch, START)
    counts = objective.counts(batch)
    assert {name: term.count for name, term in terms.items()} == counts
    loss = minimised(terms, counts)
    loss.backward()
    ours = gradients(model)
    expected = plainly(model, batch, smoothing=0.1, z=1e-3, prediction=0)
    expected.backward()
    assert relative_error(loss, expected) < 1e-6
    assert same_gradients(ours, gradients(model))


class Falling:
    """A λ of 0.4 in the first half, and of 0.1 in the second."""

    def at(self, progress: Progress) -> float:
        return 0.4 if progress.done < 0.5 else 0.1


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@each_batch
def test_prediction_layers_learn_what_comes_later(kind: str, recompute: bool) -> None:
    batch = BATCHES[kind]()
    model = made(V3, "ForCausalLM", num_nextn_predict_layers=2).train()
    if recompute:
        model.gradient_checkpointing_enable()
    objective = LanguageModelling(prediction=Falling(), depth=2)
    for done, weight in ((0.2, 0.4), (0.7, 0.1)):
        terms = objective.terms(model, batch, Progress(step=9, tokens=9, done=done))
        assert [*terms] == ["next_token", "prediction_1", "prediction_2"]
        loss = minimised(terms, objective.counts(batch))
        loss.backward()
        ours = gradients(model)
        expected = plainly(model, batch, smoothing=0, z=0, prediction=weight)
        expected.backward()
        assert relative_error(loss, expected) < 1e-6
        assert same_gradients(ours, gradients(model))


class Late:
    """A λ of nothing at first."""

    def at(self, progress: Progress) -> float:
        return 0.0 if progress.done < 0.5 else 0.3


def test_prediction_layers_do_not_run_where_they_weigh_nothing() -> None:
    model = made(V3, "ForCausalLM", num_nextn_predict_layers=2).train()
    objective, batch = LanguageModelling(prediction=Late(), depth=2), padded()
    terms = objective.terms(model, batch, START)
    assert [*terms] == ["next_token"]
    minimised(terms, objective.counts(batch)).backward()
    assert all(p.grad is None for p in model.model.layers[-1].self_attn.parameters())
    assert "prediction_2" in objective.terms(model, batch, Progress(step=1, tokens=1, done=0.5))


@torch.no_grad()
def test_the_plain_forward_has_the_same_losses() -> None:
    model = made(V3, "ForCausalLM", num_nextn_predict_layers=2)
    batch = padded()
    terms = LanguageModelling(prediction=0.3, depth=2).terms(model, batch, START)
    out = model(
        batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        mtp_loss_weight=0.3,
    )
    means = [term.sum / term.count for name, term in terms.items() if name != "next_token"]
    assert relative_error(torch.stack(means).mean(), out.mtp_loss) < 1e-6
    first = terms["next_token"]
    assert relative_error(first.sum / first.count + 0.3 * out.mtp_loss, out.loss) < 1e-6


@torch.no_grad()
def test_how_a_step_is_cut_into_parts_changes_nothing() -> None:
    model, batch = made(FAMILIES[0], "ForCausalLM"), padded()
    objective = LanguageModelling(z_loss=0.1, label_smoothing=0.2)

    def part(rows: slice) -> Batch:
        mask = batch.attention_mask
        assert mask is not None
        return Batch(
            input_ids=batch.input_ids[rows], labels=batch.labels[rows], attention_mask=mask[rows]
        )

    whole = objective.terms(model, batch, START)
    parts = [objective.terms(model, part(rows), START) for rows in (slice(0, 1), slice(1, 4))]
    for name, term in whole.items():
        assert term.count == sum(p[name].count for p in parts)
        assert relative_error(sum(p[name].sum for p in parts), term.sum) < 1e-6  # type: ignore[arg-type]


def test_a_batch_that_teaches_nothing_is_0_and_has_gradients() -> None:
    model = made(FAMILIES[0], "ForCausalLM")
    ids = torch.randint(1, 100, (1, 5))
    batch = Batch(input_ids=ids, labels=torch.full_like(ids, -100))
    terms = LanguageModelling(z_loss=0.1, label_smoothing=0.1).terms(model, batch, START)
    assert all(term.sum == 0 and term.count == 0 for term in terms.values())
    minimised(terms, dict.fromkeys(terms, 0)).backward()
    assert all(not g.any() for g in gradients(model).values())


def test_a_smoothed_target_is_told_apart_from_the_next_token() -> None:
    model, batch = made(FAMILIES[0], "ForCausalLM"), packed()
    plain: Term = LanguageModelling().terms(model, batch, START)["next_token"]
    smoothed = LanguageModelling(label_smoothing=0.3).terms(model, batch, START)
    assert smoothed["next_token"].sum == plain.sum
    assert (smoothed["next_token"].weight, smoothed["smoothing"].weight) == (0.7, 0.3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"z_loss": -1.0}, "z_loss=-1"),
        ({"z_loss": float("nan")}, "z_loss=nan"),
        ({"label_smoothing": 1.0}, "label_smoothing=1"),
        ({"prediction": -0.1}, "prediction=-0.1"),
        ({"prediction": 0.3, "depth": 0}, "depth=0"),
    ],
)
def test_numbers_that_weigh_nothing_are_named(options: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        LanguageModelling(**options)


def test_models_that_lack_what_is_asked_for_are_named() -> None:
    dense, batch = made(FAMILIES[0], "ForCausalLM"), packed()
    with pytest.raises(InputError, match="has 0; give depth=0, that is, prediction=None"):
        LanguageModelling(prediction=0.3).terms(dense, batch, START)
    with pytest.raises(InputError, match="predicts no tokens"):
        LanguageModelling().terms(dense.base_model, batch, START)
    wrong = Batch(input_ids=batch.input_ids, labels=batch.labels + 1000)
    with pytest.raises(InputError, match="labels hold 1"):
        LanguageModelling().terms(dense, wrong, START)

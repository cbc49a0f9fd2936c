"""Losses of unbalanced experts equal plain loops over their equations, by text and by step."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from families.deepseek import GROUPS, model_of
from families.qwen2_moe import model_of as qwen2_moe
from families.qwen2_moe import twins as qwen2_moe_twins
from families.zamba2 import model_of as zamba2
from quintet import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from quintet.errors import InputError
from quintet.layers.router import ExpertRouter
from quintet.training.balance import (
    BalanceLoss,
    DeviceLimitedBalance,
    SequenceBalance,
    SwitchBalance,
    loads_of_step,
    routing_of,
)
from quintet.training.batch import Batch
from quintet.training.objective import Term
from quintet.training.progress import Progress

START = Progress(step=0, tokens=0, done=0.0)
LENGTHS = (7, 3, 6)
TEXTS = torch.randint(1, 50, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).split(
    LENGTHS
)
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "deepseek_v2": lambda: model_of("DeepseekV2", **GROUPS),
    "deepseek_v3": lambda: model_of("DeepseekV3"),
    "qwen2_moe": lambda: qwen2_moe(num_hidden_layers=2),
}
DEVICES, REACHED = 2, 1
LOSSES: dict[str, BalanceLoss] = {
    "sequence": SequenceBalance(1.0),
    "devices": DeviceLimitedBalance(1.0, 1.0, 1.0, devices=DEVICES, reached=REACHED),
    "switch by text": SwitchBalance(1.0, 1.0, scope="sequence"),
    "switch by part": SwitchBalance(1.0, 1.0, scope="micro"),
}


def padded(texts: tuple[Tensor, ...]) -> Batch:
    """Rows with padding before, behind and between their tokens."""
    ids = torch.zeros(len(texts), 9, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        places = torch.arange(len(text)) + row if row != 1 else torch.tensor([0, 4, 8])
        ids[row, places], mask[row, places] = text, 1
    return Batch(input_ids=ids, labels=ids, attention_mask=mask)


def packed(texts: tuple[Tensor, ...]) -> Batch:
    """Two rows, the first of two texts; numbers begin anew in each row."""
    first = torch.cat(texts[:2])
    both = torch.stack((first, torch.cat((texts[2], texts[0]))[: len(first)]))
    index = torch.zeros_like(both)
    index[0, len(texts[0]) :] = 1
    index[1, len(texts[2]) :] = 5
    return Batch(input_ids=both, labels=both, seq_idx=index)


LAYOUTS = {"padded": padded(TEXTS), "packed": packed(TEXTS)}


def texts_in(batch: Batch) -> list[Tensor]:
    if batch.seq_idx is None:
        assert batch.attention_mask is not None
        return [r[m.bool()] for r, m in zip(batch.input_ids, batch.attention_mask, strict=True)]
    found = []
    for row, index in zip(batch.input_ids, batch.seq_idx, strict=True):
        edges = [0, *(index.diff().nonzero().flatten() + 1).tolist(), len(row)]
        found += [row[a:b] for a, b in pairwise(edges)]
    return found


def run(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        seq_idx=batch.seq_idx,
        output_router_logits=True,
        use_cache=False,
    )
    logits: tuple[Tensor, ...] = output.router_logits
    return logits


def terms_of(model: PreTrainedModel, loss: BalanceLoss, batch: Batch) -> dict[str, Term]:
    terms = dict(loss.terms(routing_of(model, run(model, batch), batch), START))
    assert {name: term.count for name, term in terms.items()} == loss.counts(batch)
    return terms


# -- the same by loops over tokens, experts and devices -------------------------------------------


def alone(model: PreTrainedModel, text: Tensor) -> list[tuple[Tensor, Tensor, list[list[int]]]]:
    """Logits, affinities and choices of each layer, of a text that was run by itself."""
    chosen: list[list[list[int]]] = []
    routers = [m for m in model.modules() if isinstance(m, ExpertRouter)]
    hooks = [r.register_forward_hook(lambda m, i, o: chosen.append(o[2].tolist())) for r in routers]
    logits = run(model, Batch(input_ids=text[None], labels=text[None]))
    for hook in hooks:
        hook.remove()
    sigmoid = model.config.model_type == "deepseek_v3"
    return [
        (x, x.sigmoid() if sigmoid else x.softmax(-1), choice)
        for x, choice in zip(logits, chosen, strict=True)
    ]


def frequency(choices: list[list[int]], e: int) -> float:
    return sum(e in choice for choice in choices) / len(choices)


def plain_sequence(layers: list[tuple[Tensor, Tensor, list[list[int]]]]) -> dict[str, Tensor]:
    total = torch.zeros(())
    for _, s, choices in layers:
        A, E, T = len(choices[0]), s.shape[1], len(s)
        largest = [row.topk(A).indices.tolist() for row in s]
        for e in range(E):
            f = E / A * frequency(largest, e)
            total = total + f * sum(s[t, e] / s[t].sum() for t in range(T)) / T
    return {"sequence_balance": total}


def plain_devices(layers: list[tuple[Tensor, Tensor, list[list[int]]]]) -> dict[str, Tensor]:
    expert = device = sent = torch.zeros(())
    for _, s, choices in layers:
        A, E, T = len(choices[0]), s.shape[1], len(s)
        f = [E / A * frequency(choices, e) for e in range(E)]
        P = [s[:, e].sum() / T for e in range(E)]
        expert = expert + sum(f[e] * P[e] for e in range(E))
        for d in range(DEVICES):
            own = range(d * E // DEVICES, (d + 1) * E // DEVICES)
            mass = sum(P[e] for e in own)
            device = device + sum(f[e] for e in own) / len(own) * mass
            reached = sum(any(e in own for e in choice) for choice in choices)
            sent = sent + DEVICES / (REACHED * T) * reached * mass
    return {"expert_balance": expert, "device_balance": device, "communication_balance": sent}


def plain_switch(texts: list[list[tuple[Tensor, Tensor, list[list[int]]]]]) -> dict[str, Tensor]:
    """Of all tokens of all layers of some texts together."""
    logits = torch.cat([x for layers in texts for x, _, _ in layers])
    s = torch.cat([s for layers in texts for _, s, _ in layers])
    choices = [choice for layers in texts for _, _, made in layers for choice in made]
    E = s.shape[1]
    shares = s / s.sum(-1, keepdim=True)
    auxiliary = E * sum(frequency(choices, e) * shares[:, e].mean() for e in range(E))
    return {"auxiliary": auxiliary, "router_z": (logits.exp().sum(-1).log() ** 2).mean()}


def plain(name: str, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    texts = [alone(model, text) for text in texts_in(batch)]
    if name == "switch by part":
        return plain_switch(texts)
    one = {
        "sequence": plain_sequence,
        "devices": plain_devices,
        "switch by text": lambda text: plain_switch([text]),
    }[name]
    found = [one(text) for text in texts]
    return {key: sum(text[key] for text in found) / len(found) for key in found[0]}


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare all gradients; what has none has zeros."""
    assert expected.keys() <= found.keys()
    pairs = [(g, expected.get(name, torch.zeros_like(g))) for name, g in found.items()]
    size = torch.cat([value.flatten() for _, value in pairs]).norm()
    error = torch.cat([(g - value).flatten() for g, value in pairs]).norm() / size
    # The whole model runs over other shapes: kernels round in another order.
    assert error.item() < 2e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("family", MODELS)
def test_losses_and_gradients_are_those_of_the_texts_alone(
    family: str, name: str, layout: str
) -> None:
    model, batch = MODELS[family](), LAYOUTS[layout]
    terms = terms_of(model, LOSSES[name], batch)
    expected = plain(name, model, batch)
    means = {key: term.sum / term.count for key, term in terms.items()}
    for key, value in expected.items():
        assert means[key].item() == pytest.approx(value.item(), rel=1e-6), key
    ours = gradients(model, sum(means.values()))  # type: ignore[arg-type]
    assert_close(ours, gradients(model, sum(expected.values())))  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_gradients_pass_layers_that_are_recomputed(family: str, reentrant: bool) -> None:
    found = []
    for recomputes in (False, True):
        model = MODELS[family]().train()
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        terms = terms_of(model, LOSSES["switch by text"], LAYOUTS["packed"])
        terms |= terms_of(model, LOSSES["devices"], LAYOUTS["packed"])
        found.append(gradients(model, torch.stack([t.sum for t in terms.values()]).sum()))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("behind", [False, True])
def test_losses_of_a_part_are_what_a_plain_model_and_transformers_give(behind: bool) -> None:
    batch = LAYOUTS["padded"]
    ours, theirs = qwen2_moe_twins("Qwen2MoeForCausalLM", {})
    if behind:
        # Elsewhere padding moves the positions that theirs counts.
        rows = torch.nn.utils.rnn.pad_sequence(list(TEXTS), batch_first=True)
        batch = Batch(input_ids=rows, labels=rows, attention_mask=(rows > 0).long())
    given = {"attention_mask": batch.attention_mask, "output_router_logits": True}
    term = terms_of(ours, SwitchBalance(), batch)["auxiliary"]
    for model in (ours, theirs) if behind else (ours,):
        expected = model(batch.input_ids, labels=batch.labels, **given).aux_loss.item()
        assert (term.sum / term.count).item() == pytest.approx(expected, rel=1e-6)
    assert term.weight == 0.001

    model = MODELS["deepseek_v2"]()
    term = terms_of(model, DeviceLimitedBalance(devices=1, reached=1), batch)["expert_balance"]
    expected = model(batch.input_ids, **given).aux_loss.item()
    assert (term.sum / term.count).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", MODELS)
def test_parts_of_a_step_add_up_to_the_loss_of_the_step_at_once(family: str) -> None:
    model, loss = MODELS[family]().train(), SwitchBalance(1.0, 1.0, scope="global")
    whole = padded(TEXTS)
    assert loss.of_whole_step
    assert not SwitchBalance(None, 1.0, scope="global").of_whole_step
    terms = terms_of(model, loss, whole)
    means = {name: term.sum / term.count for name, term in terms.items()}
    expected = gradients(model, sum(means.values()))  # type: ignore[arg-type]
    at_once = terms_of(model, LOSSES["switch by part"], whole)
    assert all(at_once[n].sum.item() == pytest.approx(terms[n].sum.item()) for n in terms)

    # Rows beside others of a part are padded otherwise, or not at all.
    parts = [padded(TEXTS[:2]), Batch(input_ids=TEXTS[2][None], labels=TEXTS[2][None])]
    loads = loads_of_step(model, parts, lambda part: run(model, part))
    assert loads.sum(dim=1).eq(sum(LENGTHS) * model_active(model)).all()
    counts = {name: sum(loss.counts(part)[name] for part in parts) for name in terms}
    model.zero_grad()
    sums = dict.fromkeys(terms, 0.0)
    for part in parts:
        routing = routing_of(model, run(model, part), part, loads)
        for name, term in loss.terms(routing, START).items():
            (term.sum / counts[name]).backward(retain_graph=True)
            sums[name] += term.sum.item() / counts[name]
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, mean in means.items():
        assert sums[name] == pytest.approx(mean.item(), rel=1e-6)
    assert_close(found, expected)


def model_active(model: PreTrainedModel) -> int:
    return next(m for m in model.modules() if isinstance(m, ExpertRouter)).active


def test_looking_at_a_step_beforehand_changes_nothing_of_it() -> None:
    model = qwen2_moe(attention_dropout=0.5).train()
    batch = LAYOUTS["packed"]
    torch.manual_seed(3)
    expected = model(batch.input_ids, use_cache=False).logits
    torch.manual_seed(3)
    loads_of_step(model, [batch], lambda part: run(model, part))
    assert torch.equal(model(batch.input_ids, use_cache=False).logits, expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_row_of_nothing_but_padding_is_no_text() -> None:
    model, batch = MODELS["deepseek_v2"](), LAYOUTS["padded"]
    assert batch.attention_mask is not None
    mask = batch.attention_mask.clone()
    mask[1] = 0
    rows = mask.any(dim=1)
    fewer = Batch(
        input_ids=batch.input_ids[rows], labels=batch.labels[rows], attention_mask=mask[rows]
    )
    empty = Batch(input_ids=batch.input_ids, labels=batch.labels, attention_mask=mask)
    for loss in LOSSES.values():
        found, expected = terms_of(model, loss, empty), terms_of(model, loss, fewer)
        for name, term in expected.items():
            assert found[name].count == term.count
            assert found[name].sum.item() == pytest.approx(term.sum.item(), rel=1e-6)
    nothing = Batch(
        input_ids=batch.input_ids, labels=batch.labels, attention_mask=torch.zeros_like(mask)
    )
    for loss in LOSSES.values():
        assert all(t.sum.item() == t.count == 0 for t in terms_of(model, loss, nothing).values())


class Falling:
    def at(self, progress: Progress) -> float:
        return 1 - progress.done


def test_weights_may_change_along_a_training_and_losses_be_left_out() -> None:
    model, batch = MODELS["deepseek_v3"](), LAYOUTS["packed"]
    routing = routing_of(model, run(model, batch), batch)
    loss = DeviceLimitedBalance(Falling(), None, None, devices=2, reached=1)
    half = loss.terms(routing, Progress(step=5, tokens=0, done=0.5))
    assert {name: term.weight for name, term in half.items()} == {"expert_balance": 0.5}
    assert list(SwitchBalance(z=0.1).counts(batch)) == ["auxiliary", "router_z"]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: SequenceBalance(-1), "alpha=-1 weighs a loss; it is at least 0"),
        (lambda: SwitchBalance(float("nan")), "auxiliary=nan"),
        (lambda: SwitchBalance(10**400), "auxiliary=1000"),
        (lambda: SwitchBalance(scope="batch"), "scope='batch' is none of sequence, micro, global"),
        (lambda: DeviceLimitedBalance(devices=2), "reached=3 of devices=2"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Callable[[], object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        make()


def test_models_without_experts_and_experts_that_no_devices_share_are_told_of() -> None:
    batch = LAYOUTS["packed"]
    qwen2 = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=50,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    for model in (qwen2, zamba2(), qwen2_moe(num_experts=0)):
        with pytest.raises(InputError, match="has 0 layers with experts"):
            routing_of(model, (), batch)
    model = MODELS["deepseek_v3"]()
    with pytest.raises(InputError, match="devices=3 cannot hold 8 experts"):
        terms_of(model, DeviceLimitedBalance(devices=3), batch)

"""Texts packed into rows are what they are alone, in every family."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from comparisons import TOLERANCE
from conformance.families import FAMILIES, Family, each, each_head
from quintet import DynamicCache
from quintet.errors import InputError
from support import relative_error

# Two rows of twelve tokens, of three texts and of two.
ROWS = ((5, 1, 6), (9, 3))
IDS = torch.randint(101, (2, 12), generator=torch.Generator().manual_seed(3))


def texts_of(x: Tensor, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """The pieces (1, n, ...) of rows (B, T, ...)."""
    return [piece for b, sizes in enumerate(rows) for piece in x[b : b + 1].split(sizes, dim=1)]


def positions(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in sizes]) for sizes in rows])


def ways_to_say(rows: Sequence[Sequence[int]]) -> dict[str, dict[str, Any]]:
    sizes = [n for row in rows for n in row]
    ends = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    index = torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]
    ).to(torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    longest = {"max_length_q": max(sizes), "max_length_k": torch.tensor(max(sizes))}
    return {
        "positions": {"position_ids": positions(rows)},
        "lengths": {**lengths, **longest},
        "index": {"seq_idx": index},
        "collator": {
            "position_ids": positions(rows),
            "seq_idx": index,
            "use_cache": False,
            **lengths,
            **longest,
        },
        "ones": {"seq_idx": index, "attention_mask": torch.ones(index.shape)},
    }


WAYS = ways_to_say(ROWS)


@each
def test_packed_texts_are_what_they_are_alone(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family.model_of()
    for way in family.ways:
        model.config.attn_implementation = family.backend(way, monkeypatch)
        with torch.no_grad():
            alone = [model(ids).logits for ids in texts_of(IDS, ROWS)]
            for name, said in WAYS.items():
                out = model(IDS, **said)
                assert out.past_key_values is None
                for made, right in zip(texts_of(out.logits, ROWS), alone, strict=True):
                    assert relative_error(made, right) < TOLERANCE, (way, name)


@each
def test_packing_any_texts(family: Family) -> None:
    model = family.model_of()

    @settings(
        max_examples=10,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(
        st.lists(st.integers(1, 9), min_size=1, max_size=5),
        st.sampled_from(sorted(WAYS)),
        st.integers(0, 2**30),
    )
    def holds(sizes: list[int], way: str, seed: int) -> None:
        rows = (sizes, sizes[::-1])
        ids = torch.randint(101, (2, sum(sizes)), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            packed = model(ids, **ways_to_say(rows)[way]).logits
            for made, piece in zip(texts_of(packed, rows), texts_of(ids, rows), strict=True):
                assert relative_error(made, model(piece).logits) < TOLERANCE

    holds()


@pytest.mark.parametrize("way", ["positions", "lengths", "index"])
@each
def test_loss_and_gradients_are_those_of_the_texts(family: Family, way: str) -> None:
    """Whether the labels leave out each text's first token, as collators' do, or not."""
    model = family.model_of()
    pieces = texts_of(IDS, ROWS)
    counts = [piece.shape[1] - 1 for piece in pieces]
    found = []
    for labels in (IDS, IDS.masked_fill(positions(ROWS) == 0, -100), None):
        model.zero_grad()
        if labels is None:
            losses = [model(p, labels=p).loss * n for p, n in zip(pieces, counts, strict=True) if n]
            loss = torch.stack(losses).sum() / sum(counts)
        else:
            loss = model(IDS, labels=labels, **WAYS[way]).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    right_loss, right = found[-1]
    largest = max(float(grad.abs().max()) for grad in right.values())
    for loss, grads in found[:-1]:
        assert relative_error(loss, right_loss) < TOLERANCE
        for name, grad in grads.items():
            # A text of one token has a state, and no loss.
            expected = right.get(name, torch.zeros_like(grad))
            assert float((grad - expected).abs().max()) < TOLERANCE * largest, name


@each
def test_weights_of_other_texts_are_zero(family: Family) -> None:
    model = family.model_of()
    out = model(IDS, output_attentions=True, output_hidden_states=True, **WAYS["index"])
    for b, sizes in enumerate(ROWS):
        start = 0
        for n in sizes:
            alone = model(
                IDS[b : b + 1, start : start + n],
                output_attentions=True,
                output_hidden_states=True,
            )
            own = slice(start, start + n)
            for made, right in zip(out.attentions, alone.attentions, strict=True):
                assert relative_error(made[b, :, own, own], right[0]) < TOLERANCE
                assert not made[b, :, own, :start].any()
                assert not made[b, :, own, start + n :].any()
            for made, right in zip(out.hidden_states, alone.hidden_states, strict=True):
                assert relative_error(made[b, own], right[0]) < TOLERANCE
            start += n


@each_head
def test_every_head_takes_texts_apart(family: Family, head: str) -> None:
    model = family.model_of(head)
    with torch.no_grad():
        for said in (WAYS["positions"], WAYS["lengths"]):
            if head == "ForSequenceClassification":
                # One answer a row, read off its last text.
                model.config.pad_token_id = 0
                ids = IDS.clamp(min=1)
                logits = model(ids, **said).logits
                last = [model(piece).logits for piece in (ids[:1, 6:], ids[1:, 9:])]
                assert relative_error(logits, torch.cat(last)) < TOLERANCE
                continue
            made = model(IDS, **said)
            name = {"Model": "last_hidden_state", "ForQuestionAnswering": "start_logits"}
            for got, piece in zip(
                texts_of(made[name.get(head, "logits")], ROWS), texts_of(IDS, ROWS), strict=True
            ):
                right = model(piece)[name.get(head, "logits")]
                assert relative_error(got, right) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"num_nextn_predict_layers": 2}], ids=["one", "two"])
def test_prediction_layers_look_ahead_within_a_text(changes: dict[str, Any]) -> None:
    (family,) = (f for f in FAMILIES if f.prefix == "DeepseekV3")
    model = family.model_of(**{"num_nextn_predict_layers": 1, **changes})
    for said in WAYS.values():
        out = model(IDS, output_mtp_logits=True, labels=IDS, mtp_loss_weight=0.5, **said)
        depths = len(out.mtp_logits)
        sums, counts = [0.0] * depths, [0] * depths
        for b, sizes in enumerate(ROWS):
            start = 0
            for n in sizes:
                ids = IDS[b : b + 1, start : start + n]
                alone = model(ids, output_mtp_logits=True)
                for k, (made, right) in enumerate(
                    zip(out.mtp_logits, alone.mtp_logits, strict=True), start=1
                ):
                    if n > k:
                        own = made[b : b + 1, start : start + n - k]
                        assert relative_error(own, right[:, : n - k]) < TOLERANCE
                    if n > k + 1:
                        sums[k - 1] += float(
                            torch.nn.functional.cross_entropy(
                                right[0, : n - k - 1], ids[0, k + 1 :], reduction="sum"
                            )
                        )
                        counts[k - 1] += n - k - 1
                start += n
        right_loss = sum(s / c for s, c in zip(sums, counts, strict=True)) / depths
        assert abs(float(out.mtp_loss) - right_loss) < TOLERANCE * right_loss


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@each
def test_positions_separate_as_in_transformers(family: Family, backend: str) -> None:
    """Also where they jump ahead; with a mask or a cache of the caller's they separate nothing."""
    if family.prefix == "Zamba2":
        # There, states go on from one text to the next.
        return
    ours, theirs = family.twins("ForCausalLM", {}, backend)
    jumps = torch.tensor(
        [[0, 1, 2, 7, 8, 3, 4, 5, 5, 6, 7, 0], [4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3]]
    )
    rounds: list[dict[str, Any]] = [
        {"position_ids": positions(ROWS), "use_cache": False},
        {"position_ids": jumps, "use_cache": False},
        {"position_ids": positions(ROWS)[:1], "use_cache": False},
        {"position_ids": positions(ROWS), "attention_mask": torch.ones(2, 12), "use_cache": False},
        {"position_ids": positions(ROWS), "use_cache": True},
    ]
    for said in rounds:
        with torch.no_grad():
            made, right = ours(IDS, **said).logits, theirs(IDS, **said).logits
        assert relative_error(made, right) < TOLERANCE, said


@each
def test_a_cache_of_the_callers_holds_one_text(family: Family) -> None:
    model, said = family.model_of(), WAYS["positions"]
    with torch.no_grad():
        whole = model(IDS, **said, use_cache=True)
        given = model(IDS, **said, past_key_values=DynamicCache(model.config))
    assert whole.past_key_values is not None
    assert relative_error(whole.logits, given.logits) < TOLERANCE
    assert relative_error(whole.logits, model(IDS, **said).logits) > 0.01


@each
def test_what_contradicts_itself_is_named(family: Family) -> None:
    model = family.model_of()
    ends, index = WAYS["lengths"]["cu_seq_lens_q"], WAYS["index"]["seq_idx"]
    padding = torch.ones(2, 12)
    padding[0, 0] = 0
    cache = DynamicCache(model.config)
    for said, message in (
        ({"seq_idx": index, "use_cache": True}, "give one as past_key_values"),
        ({"seq_idx": index, "past_key_values": cache}, "cu_seq_lens_q alone"),
        ({"cu_seq_lens_q": ends, "past_key_values": cache}, "one row of input; there are 2"),
        ({"seq_idx": index, "attention_mask": padding}, "no padding"),
        ({"seq_idx": index[:, :4]}, r"seq_idx.*\(2, 12\)"),
        ({"cu_seq_lens_q": ends[:-1]}, r"cu_seq_lens_q=.*24 tokens"),
        ({"cu_seq_lens_k": ends.flip(0)}, "cu_seq_lens_k="),
        ({"cu_seq_lens_q": ends, "max_length_q": 4}, "max_length_q=4, and a text has 9"),
        ({"max_length_k": 4}, "max_length_k says nothing"),
        ({"cu_seq_lens_q": ends, "cu_seq_lens_k": torch.tensor([0, 24])}, "different texts"),
        ({"cu_seq_lens_q": ends, "seq_idx": torch.zeros(2, 12)}, "different texts"),
    ):
        with pytest.raises(InputError, match=message):
            model(IDS, **said)
    with pytest.raises(TypeError, match="'seq_index'"):
        model(IDS, seq_index=index)


def test_states_take_no_mask_but_the_causal_one() -> None:
    (family,) = (f for f in FAMILIES if f.prefix == "Zamba2")
    model = family.model_of()
    causal = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    plain = model(IDS).logits
    for dtype in (torch.float32, torch.float16):
        added = torch.zeros(1, 1, 12, 12, dtype=dtype)
        added = added.masked_fill(~causal, torch.finfo(dtype).min)
        assert torch.equal(model(IDS, attention_mask=added).logits, plain)
    assert torch.equal(model(IDS, attention_mask=causal).logits, plain)
    blocks = causal.clone()
    blocks[..., 6:, :6] = False
    cache = DynamicCache(model.config)
    with pytest.raises(InputError, match=r"4 axes.*recurrent states.*seq_idx"):
        model(IDS, attention_mask=blocks, past_key_values=cache)
    assert cache.get_seq_length() == 0

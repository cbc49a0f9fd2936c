"""No token left, or scores that are not numbers, never become text: an error names row and step."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import FAMILIES, Family, each
from quintet.errors import InputError

NEW = 5
ROW, STEP = 1, 3
NONE = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW}

Spoil = Callable[[Tensor], Tensor]
SPOILS: dict[str, tuple[Spoil, str]] = {
    "nan": (lambda row: row * float("nan"), "NaN"),
    "one-nan": (lambda row: row.index_fill(0, torch.tensor([7]), torch.nan), "NaN"),
    "inf": (lambda row: row.index_fill(0, torch.tensor([7]), torch.inf), "infinity|NaN"),
    "none": (lambda row: torch.full_like(row, -torch.inf), "every one is forbidden|NaN"),
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 5},
    "sampling-of-all": {"do_sample": True, "top_k": 0},
    "warpers": {"do_sample": True, "top_k": 0, "typical_p": 0.9, "min_p": 0.01},
    "recorded": {"return_dict_in_generate": True, "output_scores": True},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "lookup-sampled": {"prompt_lookup_num_tokens": 3, "do_sample": True},
    "guidance": {"guidance_scale": 1.5},
}
each_spoil = pytest.mark.parametrize("spoil", SPOILS)


def prompt(B: int = 3) -> Tensor:
    torch.manual_seed(2)
    return torch.randint(2, 90, (B, 4)).repeat(1, 2)


class At:
    """A processor that spoils the scores of one row at one step."""

    def __init__(self, spoil: Spoil, row: int = ROW, step: int = STEP, width: int = 8) -> None:
        self.spoil, self.row, self.length = spoil, row, width + step - 1

    def __call__(self, ids: Tensor, scores: Tensor, padding: Tensor | None = None) -> Tensor:
        length = ids.shape[1] - (0 if padding is None else int(padding[self.row]))
        scores = scores.clone()
        if length == self.length:
            scores[self.row] = self.spoil(scores[self.row])
        return scores


@each_spoil
@pytest.mark.parametrize("way", WAYS)
def test_the_error_names_row_and_step(way: str, spoil: str) -> None:
    model = FAMILIES[0].model_of()
    damage, why = SPOILS[spoil]
    with pytest.raises(InputError, match=f"row {ROW} has no token .*new token {STEP}: .*({why})"):
        model.generate(prompt(), logits_processor=[At(damage)], **NONE, **WAYS[way])


@each_spoil
@pytest.mark.parametrize("sampled", [False, True])
def test_beams_that_all_fail(sampled: bool, spoil: str) -> None:
    model = FAMILIES[0].model_of()
    damage, _ = SPOILS[spoil]

    def both(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == 8 + STEP - 1:
            scores = scores.clone()
            for row in (2, 3):  # the beams of prompt 1
                scores[row] = damage(scores[row])
        return scores

    with pytest.raises(InputError, match=f"row 1 has no token .*new token {STEP}:"):
        model.generate(prompt(), logits_processor=[both], num_beams=2, do_sample=sampled, **NONE)


def test_a_beam_without_a_token_leaves_the_others() -> None:
    model = FAMILIES[0].model_of()

    def one(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(0, torch.tensor([1]), -torch.inf) if ids.shape[1] > 8 else scores

    made = model.generate(prompt(1), logits_processor=[one], num_beams=2, **NONE)
    assert made.shape == (1, 8 + NEW)


@each
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_weights_that_are_not_numbers(family: Family, options: dict[str, Any]) -> None:
    model = family.model_of()
    with torch.no_grad():
        model.get_output_embeddings().weight[11] = torch.nan
    with pytest.raises(InputError, match=r"row 0 has no token .*new token 1: its scores hold NaN"):
        model.generate(prompt(1), **NONE, **options)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("part", ["q", "k"])
def test_queries_and_keys_that_are_not_numbers(
    part: str, dtype: torch.dtype, family: Family
) -> None:
    names = {"q": ("q_proj", "q_b_proj"), "k": ("k_proj", "kv_b_proj")}[part]
    model = family.model_of().to(dtype)
    weights = [p for name, p in model.named_parameters() if name.split(".")[-2] in names]
    assert weights
    with torch.no_grad():
        for weight in weights:
            weight.fill_(torch.nan)
    with pytest.raises(InputError, match=r"row 0 has no token .*new token 1: its scores hold NaN"):
        model.generate(prompt(1), **NONE)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("name", ["suppress_tokens", "bad_words_ids"])
def test_options_that_ban_everything(name: str, options: dict[str, Any]) -> None:
    model = FAMILIES[0].model_of()
    V = model.config.vocab_size
    banned = list(range(V)) if name == "suppress_tokens" else [[i] for i in range(V)]
    with pytest.raises(InputError, match="has no token to take for new token 1"):
        model.generate(prompt(), **{name: banned}, **NONE, **options)


@pytest.mark.parametrize("options", list(WAYS.values()), ids=list(WAYS))
def test_a_row_at_its_end_needs_none(options: dict[str, Any]) -> None:
    model = FAMILIES[0].model_of()

    def ends(ids: Tensor, scores: Tensor, padding: Tensor | None = None) -> Tensor:
        length = ids.shape[1] - (0 if padding is None else int(padding[ROW]))
        scores = scores.clone()
        if length == 9:
            scores[ROW] = torch.full_like(scores[ROW], -torch.inf).index_fill(
                0, torch.tensor([5]), 0.0
            )
        elif length > 9:
            scores[ROW] = torch.nan
        scores[[i for i in range(len(scores)) if i != ROW], 5] = -torch.inf
        return scores

    made = model.generate(
        prompt(), logits_processor=[ends], **{**NONE, "eos_token_id": 5}, **options
    )
    made = made if isinstance(made, Tensor) else made.sequences
    assert made[ROW, 9:].tolist() == [5] + [0] * (made.shape[1] - 10)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("spoil", ["nan", "inf"])
def test_an_assistant_that_fails_costs_only_its_drafts(sampled: bool, spoil: str) -> None:
    model = FAMILIES[0].model_of()
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_output_embeddings().weight[7] = {"nan": torch.nan, "inf": torch.inf}[spoil]

    def run(**options: Any) -> Any:
        seeds = [torch.Generator().manual_seed(i) for i in range(3)]
        return model.generate(
            prompt(),
            do_sample=sampled,
            generator=seeds,
            return_dict_in_generate=True,
            **NONE,
            **options,
        )

    with pytest.warns(UserWarning, match="the scores of a draft hold"):
        made = run(assistant_model=broken)
    assert made.speculation.accepted_tokens == 0
    if not sampled:
        assert torch.equal(made.sequences, run().sequences)


def test_a_draft_that_is_out_of_tokens_ends_without_a_word() -> None:
    """What an assistant lacks beside a constraint is no fault of anyone's."""
    model = FAMILIES[0].model_of()
    plain = model.generate(prompt(), **NONE)

    def along(row: int, ids: Tensor) -> list[int]:
        tail = ids[-1:].tolist()
        follows = [b for a, b in zip(plain[row, 7:], plain[row, 8:], strict=False) if [a] == tail]
        return [int(token) for token in follows] or list(range(90))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = model.generate(
            prompt(), assistant_model=model, prefix_allowed_tokens_fn=along, **NONE
        )
    alone = model.generate(prompt(), prefix_allowed_tokens_fn=along, **NONE)
    assert torch.equal(made, alone)


def test_prediction_layers_that_fail_cost_only_their_drafts() -> None:
    family = next(f for f in FAMILIES if f.name == "deepseek-v3")
    model = family.model_of(num_nextn_predict_layers=1)
    plain = model.generate(prompt(), **NONE)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "eh_proj" in name:
                weight.fill_(torch.nan)
    with pytest.warns(UserWarning, match="the scores of a draft hold"):
        assert torch.equal(model.generate(prompt(), use_mtp=True, **NONE), plain)


def test_removing_invalid_values_goes_on() -> None:
    model = FAMILIES[0].model_of()
    with torch.no_grad():
        model.get_output_embeddings().weight[11] = torch.nan
    assert model.generate(prompt(), remove_invalid_values=True, **NONE).shape == (3, 8 + NEW)


def test_the_others_of_a_batch_were_streamed_until_then() -> None:
    """A row that fails ends the call; what a streamer got before stays there, and it ends."""
    model = FAMILIES[0].model_of()
    got: list[list[int]] = []
    ended: list[bool] = []

    class Keeping:
        def put(self, value: Tensor) -> None:
            got.append(value.reshape(-1).tolist())

        def end(self) -> None:
            ended.append(True)

    with pytest.raises(InputError, match="row 1"):
        model.generate(
            prompt(), logits_processor=[At(SPOILS["nan"][0])], streamer=Keeping(), **NONE
        )
    plain = model.generate(prompt(), **NONE)
    assert got[1:] == plain[:, 8 : 8 + STEP - 1].T.tolist()
    assert ended == [True]

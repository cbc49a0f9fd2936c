"""Guidance away from a negative prompt, against Transformers on the same weights."""

from typing import Any

import pytest
import torch

from quintet.errors import InputError
from support import twins

PROMPT = torch.tensor([[5, 17, 3, 8], [4, 4, 9, 2]])
NEGATIVE = torch.tensor([[7, 8, 9], [1, 2, 3]])


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    torch.manual_seed(1)
    return twins("Qwen2ForCausalLM", {"initializer_range": 0.2})


def made(model: Any, ids: torch.Tensor = PROMPT, **options: Any) -> list[list[int]]:
    usual = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    rows: list[list[int]] = model.generate(ids, **{**usual, **options}).tolist()
    return rows


@pytest.mark.parametrize("scale", [0.5, 1.5, 3.0])
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_text_is_that_of_transformers(
    pair: tuple[Any, Any], scale: float, use_cache: bool
) -> None:
    ours, theirs = pair
    options: dict[str, Any] = {"guidance_scale": scale, "use_cache": use_cache}
    plain = made(ours, max_new_tokens=12)
    assert made(ours, **options) == made(theirs, **options)
    options["negative_prompt_ids"] = NEGATIVE
    assert made(ours, **options) == made(theirs, **options) != plain
    assert made(ours, guidance_scale=1.0) == plain


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_negative_prompt_is_as_alone(pair: tuple[Any, Any], side: str) -> None:
    model = pair[0]
    rows = [[0, 7, 8] if side == "left" else [7, 8, 0], [1, 2, 3]]
    negative = torch.tensor(rows)
    together = made(
        model,
        guidance_scale=2.0,
        negative_prompt_ids=negative,
        negative_prompt_attention_mask=(negative != 0).long(),
    )
    for row, alone in enumerate([[7, 8], [1, 2, 3]]):
        expected = made(
            model, PROMPT[row][None], guidance_scale=2.0, negative_prompt_ids=torch.tensor([alone])
        )
        assert together[row] == expected[0]


@torch.no_grad()
def test_beams_keep_their_own_guidance(pair: tuple[Any, Any]) -> None:
    """The text of a beam, scored anew, has the score that the search gave it."""
    model = pair[0]
    options = {"guidance_scale": 1.7, "negative_prompt_ids": NEGATIVE, "num_beams": 4}
    out = model.generate(
        PROMPT,
        **options,
        num_return_sequences=4,
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_scores=True,
        length_penalty=0.0,
    )
    for row, (ids, score) in enumerate(zip(out.sequences, out.sequences_scores, strict=True)):
        new, total = ids[4:], 0.0
        for step, token in enumerate(new):
            logs = [
                model(torch.cat((before, new[:step]))[None]).logits[0, -1].log_softmax(dim=-1)
                for before in (PROMPT[row // 4], NEGATIVE[row // 4])
            ]
            total += float((1.7 * (logs[0] - logs[1]) + logs[1])[token])
        assert total == pytest.approx(float(score), rel=1e-4)


def test_bad_guidance(pair: tuple[Any, Any]) -> None:
    model = pair[0]
    with pytest.warns(UserWarning, match="negative_prompt_ids has no effect without guidance"):
        model.generate(PROMPT, negative_prompt_ids=NEGATIVE, max_new_tokens=1)
    with pytest.raises(InputError, match="has 3 rows for a text of 2"):
        made(model, guidance_scale=2.0, negative_prompt_ids=torch.ones(3, 2).long())
    short = {"negative_prompt_ids": NEGATIVE, "negative_prompt_attention_mask": torch.ones(2, 2)}
    with pytest.raises(InputError, match="has to be that of negative_prompt_ids"):
        made(model, guidance_scale=2.0, **short)

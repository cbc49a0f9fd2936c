"""A model that is rounded with a text in view is nearer to what it was, in every family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import FAMILIES, WIDE, Family, each
from quintet.auto import AutoModelForCausalLM
from quintet.conversion import convert
from quintet.errors import InputError
from quintet.ops.error_feedback import spread_of
from quintet.quantization import Int4Config, PackedConfig, calibration
from quintet.quantization.calibration import rounded

TEXT = torch.randint(1, 101, (12, 64), generator=torch.Generator().manual_seed(3))
OTHER = torch.randint(1, 101, (4, 64), generator=torch.Generator().manual_seed(4))
WAYS: dict[str, dict[str, Any]] = {
    "int4": {"quantize": "int4"},
    "by 64": {"quantization_config": Int4Config(group_size=64)},
}


@torch.no_grad()
def logits_of(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    found: Tensor = model(OTHER).logits
    return found


def made(source: Path, folder: Path, how: dict[str, Any], text: list[Tensor]) -> Tensor:
    convert(source, folder, calibrate=text, **how)
    return logits_of(folder)


@pytest.mark.parametrize("way", WAYS)
@each
def test_a_rounded_model_is_nearer_to_what_it_was(family: Family, way: str, tmp_path: Path) -> None:
    family.model_of(**family.shallow, **WIDE[family.name]).save_pretrained(tmp_path / "source")
    right = logits_of(tmp_path / "source")
    plain = made(tmp_path / "source", tmp_path / "plain", WAYS[way], [])
    own = made(tmp_path / "source", tmp_path / "own", WAYS[way], list(TEXT.split(4)))
    names = [{file.name: file.stat().st_size for file in (tmp_path / where).iterdir()} for where in
             ("plain", "own")]  # fmt: skip
    assert names[0] == names[1]
    assert (own - right).square().mean() < 0.9 * (plain - right).square().mean()


@each
def test_every_matrix_that_a_token_comes_to_is_looked_at(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rounds of one matrix are rounds, too.
    monkeypatch.setattr(calibration, "MEMORY", 1)
    sizes = {**family.shallow, **WIDE[family.name]}
    held = family.model_of(**sizes)
    scheme = Int4Config().scheme()
    slots = family.model_of(**sizes).quantize_modules(scheme, torch.float32)
    before = {name: weight.clone() for name, weight in held.named_parameters()}
    found = {place.name for place, _ in rounded(held, slots, [TEXT])}
    beside = {name for name in slots if name not in found}
    assert all("embed_tokens" in name or ".eh_proj" in name or ".layers.2." in name
               for name in beside), beside  # fmt: skip
    # What is behind sees what became of what is before.
    changed = {n for n, weight in held.named_parameters() if not torch.equal(weight, before[n])}
    assert changed >= found & before.keys()


def test_a_head_that_is_the_embedding_is_rounded_by_its_inputs(tmp_path: Path) -> None:
    family = FAMILIES[0]
    family.model_of(tie_word_embeddings=True, **WIDE[family.name]).save_pretrained(tmp_path / "a")
    right = logits_of(tmp_path / "a")
    plain = made(tmp_path / "a", tmp_path / "plain", WAYS["int4"], [])
    own = made(tmp_path / "a", tmp_path / "own", WAYS["int4"], [TEXT])
    assert (own - right).square().mean() < 0.9 * (plain - right).square().mean()


def test_so_are_the_integers_that_other_programs_read(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    FAMILIES[0].model_of(**sizes).save_pretrained(tmp_path / "a")
    right, how = logits_of(tmp_path / "a"), {"quantization_config": PackedConfig(bits=4)}
    plain = made(tmp_path / "a", tmp_path / "plain", how, [])
    own = made(tmp_path / "a", tmp_path / "own", how, [TEXT])
    assert (own - right).square().mean() < 0.8 * (plain - right).square().mean()


def test_an_inverse_that_rounding_spoilt_is_damped_more(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.cholesky_inverse
    tries: list[Tensor] = []

    def rounded_away(factor: Tensor) -> Tensor:
        tries.append(factor)
        return exact(factor) * (-1 if len(tries) == 1 else 1)

    monkeypatch.setattr(torch, "cholesky_inverse", rounded_away)
    upper = spread_of(torch.eye(4), 4).upper
    torch.testing.assert_close(upper, torch.eye(4) / (1 + 0.01 + 0.1) ** 0.5)


def test_experts_without_a_token_are_told(tmp_path: Path) -> None:
    family = next(one for one in FAMILIES if one.name == "qwen2-moe")
    family.model_of(**family.shallow).save_pretrained(tmp_path / "a")
    with pytest.warns(UserWarning, match=r"no token .* came to \d+ of \d+ matrices of experts"):
        convert(tmp_path / "a", tmp_path / "b", quantize="int4", calibrate=[TEXT[:1, :1]])


def test_what_has_nothing_to_gain_is_refused(tmp_path: Path) -> None:
    FAMILIES[0].model_of().save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match="weights of 4 bits"):
        convert(tmp_path / "a", tmp_path / "b", quantize="int8", calibrate=[TEXT])
    with pytest.raises(InputError, match="no text to calibrate with"):
        convert(tmp_path / "a", tmp_path / "b", quantize="int4", calibrate=[TEXT[:, :0]])
    for wrong in (TEXT.float(), TEXT[0], "some text"):
        with pytest.raises(InputError, match="a tensor of ids"):
            convert(tmp_path / "a", tmp_path / "b", quantize="int4", calibrate=[wrong])
    assert not (tmp_path / "b").exists()

"""Files of AWQ, against the numbers they mean."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import packers
from conformance.families import FAMILIES, Family
from quintet import AutoModelForCausalLM
from quintet.errors import ConfigError, UnsupportedModelError
from quintet.quantization import Quantized
from quintet.quantization.awq import AWQConfig
from support import relative_error

IDS = torch.arange(1, 23).view(2, 11)
each = pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name in packers.WIDTHS], ids=repr
)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(IDS).logits.float()  # type: ignore[no-any-return]


def written(family: Family, root: Path, settings: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(3)

    def pack(path: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return packers.awq(weight, **options)

    settings = {"quant_method": "awq", "modules_to_not_convert": None, **settings}
    return packers.packed_checkpoint(
        family, root, pack, settings, **family.rounded, **packers.WIDTHS[family.name]
    )


@pytest.mark.parametrize(("group", "symmetric"), [(32, False), (64, True), (-1, False)])
@each
def test_a_model_computes_with_what_its_files_mean(
    family: Family,
    group: int,
    symmetric: bool,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    settings = {"bits": 4, "group_size": group, "zero_point": not symmetric, "version": "gemm"}
    plain = written(family, tmp_path, settings, group=group, symmetric=symmetric)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32", quantize="none")
    assert relative_error(logits_of(model), logits_of(plain)) < 1e-5
    # Zero points that are always the middle need no place of their own.
    held = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    if symmetric:
        formats = [
            f for m in held.modules() if isinstance(m, Quantized) for f in m.formats.values()
        ]
        assert {one.name for one in formats} == {"int4"}
    assert relative_error(logits_of(held), logits_of(plain)) < (2e-2 if symmetric else 2e-3)
    assert not recwarn.list


def test_older_repositories_say_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    plain = written(FAMILIES[0], tmp_path, {}, group=32)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(settings))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert relative_error(logits_of(model), logits_of(plain)) < 2e-3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 3}, "bits=3 has to be 4"),
        ({"version": "gemv"}, "version='gemv' has to be gemm"),
        ({"q_group_size": "128"}, "group_size='128'"),
        ({"zero_point": 1}, "zero_point=1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        AWQConfig.from_dict(settings)


@pytest.mark.parametrize("settings", [{}, {"version": "gemm"}])
def test_files_for_another_kernel_are_known_by_their_scales(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    def pack(path: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, plain = packers.awq(weight, group=32)
        # The packed bytes do not matter: of a square matrix, they have the shape of "gemm".
        turned = {"scales": tensors["scales"].T.contiguous()}
        return {**tensors, **turned}, plain

    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, **settings}
    packers.packed_checkpoint(FAMILIES[0], tmp_path, pack, settings)
    with pytest.raises(UnsupportedModelError, match=r"version='gemv' says; use another release"):
        AutoModelForCausalLM.from_pretrained(tmp_path)

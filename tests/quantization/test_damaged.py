"""Parts that mean no numbers are named, in our own formats as in those of others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conformance.families import FAMILIES
from quintet.auto import AutoModelForCausalLM
from quintet.errors import CheckpointError
from quintet.quantization import BitsAndBytesConfig

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
WAYS: dict[str, dict[str, Any]] = {
    **{name: {"quantize": name} for name in ("int8", "int4", "fp8", "nf4")},
    "nested": {"quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_use_double_quant=True)},
    "by row": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
}  # fmt: skip


def not_finite(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = float("nan")
    return changed


def integers(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "source"
    FAMILIES[0].model_of(**FAMILIES[0].shallow).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("way", "suffix", "change", "said"),
    [
        ("int8", "_scale", not_finite, "scales that are not finite"),
        ("int8", "_scale", integers, "scales of torch.int64"),
        ("int4", "_scale", not_finite, "scales that are not finite"),
        ("int4", "_offset", not_finite, "scales that are not finite"),
        ("fp8", "_scale_inv", not_finite, "scales that are not finite"),
        ("fp8", "_scale_inv", integers, "scales of torch.int64"),
        ("nf4", ".absmax", not_finite, "scales that are not finite"),
        ("nf4", "", integers, "is torch.int64, and has to be torch.uint8"),
        ("nested", ".absmax", integers, "is torch.int64, and has to be torch.uint8"),
        ("nested", ".nested_absmax", not_finite, "scales that are not finite"),
        ("by row", "SCB", not_finite, "scales that are not finite"),
        ("by row", "SCB", integers, "scales of torch.int64"),
    ],
)
def test_what_means_no_numbers_is_named(
    way: str,
    suffix: str,
    change: Callable[[Tensor], Tensor],
    said: str,
    source: Path,
    tmp_path: Path,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, **WAYS[way])
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = f"{WEIGHT.removesuffix('weight')}SCB" if suffix == "SCB" else WEIGHT + suffix
    save_file({**tensors, name: change(tensors[name])}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"q_proj.weight.*{said}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)

"""Published kernels that are there compute on a device what the definitions do on the CPU."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

from on_triton import attention, mamba2
from quintet.backends import Backend
from quintet.kernels.matrix import Matrix
from quintet.ops import paged
from quintet.ops.quantized import fp8_linears
from quintet.published import BACKENDS, deep_gemm, flash_attention, flash_mla, mamba_ssm

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
CPU = torch.device("cpu")
BY_NAME: Mapping[str, Backend] = MappingProxyType({one.name: one for one in BACKENDS})
SCENES = {
    "steps": attention.Scene([(1, 300), (1, 3), (1, 0)], page=256, sizes=(64, 64)),
    "a window": attention.Scene([(2, 40), (2, 9)], page=256, window=20, sizes=(128, 128)),
    "prompts and steps": attention.Scene([(37, 0), (1, 60), (5, 33)], page=256, sizes=(64, 64)),
    "texts of one row": attention.Scene([(33, 0), (4, 0)], page=0, sizes=(64, 64)),
}


def need(name: str) -> None:
    reason = BY_NAME[name].missing()
    if reason is not None:
        pytest.skip(reason)


def off(made: Any, right: Any) -> float:
    """How far apart, of the largest magnitude."""
    made, right = made.float().cpu(), right.float()
    return float((made - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("scene", SCENES.values(), ids=list(SCENES))
@torch.no_grad()
def test_flash_attn(scene: attention.Scene, device: torch.device) -> None:
    need("flash-attn")
    narrow = attention.Scene(**{**vars(scene), "dtype": torch.bfloat16})
    made = flash_attention.attend_pages(**attention.inputs(device, scene=narrow))
    right = paged.attend_pages.definition(**attention.inputs(CPU, scene=narrow))
    assert made is not None
    assert off(made, right) <= 2**-6


@pytest.mark.parametrize("tokens", [1, 2])
@torch.no_grad()
def test_flash_mla(tokens: int, device: torch.device) -> None:
    need("flash-mla")
    sizes: dict[str, Any] = {"sizes": (512, 64), "shared": True, "heads": (16, 1)}
    scene = attention.Scene([(tokens, 150), (tokens, 9)], page=64, dtype=torch.bfloat16, **sizes)
    known, there = (dict(attention.inputs(at, scene=scene)) for at in (CPU, device))
    whole = torch.cat(there["k"], dim=-1).contiguous()
    made = flash_mla.attend_pages(**{**there, "k": (whole[..., :512], whole[..., 512:])})
    assert made is not None
    assert off(made, paged.attend_pages.definition(**known)) <= 2**-6


@torch.no_grad()
def test_deep_gemm(device: torch.device) -> None:
    need("deep-gemm")
    g = torch.Generator().manual_seed(0)
    numbers = torch.randn(384, 512, generator=g).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 4, generator=g) + 0.5
    x = torch.randn(130, 512, generator=g).bfloat16()
    there = Matrix(numbers.to(device), scale.to(device), block=(128, 128))
    made = deep_gemm.linears(x.to(device), [there])
    right = fp8_linears.definition(x, [Matrix(numbers, scale, block=(128, 128))])
    assert made is not None
    assert off(made[0], right[0]) <= 2**-4


@pytest.mark.parametrize("T", [1, 70])
@torch.no_grad()
def test_mamba_ssm(T: int, device: torch.device) -> None:
    need("mamba-ssm")
    scene = mamba2.Scene([T, T], width=T, heads=(4, 64, 1, 128), dtype=torch.bfloat16)
    made = mamba2.outcome(mamba_ssm.mamba2, **mamba2.inputs(device, scene=scene))
    right = mamba2.outcome(mamba2.stepwise, **mamba2.inputs(CPU, scene=scene))
    assert made is not None
    assert right is not None
    assert all(off(one, other) <= 2**-5 for one, other in zip(made, right, strict=True))

"""Adapters that several processes train are those that one process trains."""

from pathlib import Path
from typing import Any

import pytest

from parallel.cases import adapting, training
from parallel.cases.tensor import family
from parallel.pool import Pool
from quintet.checkpoint import Checkpoint
from quintet.training import train
from trainings import Heard, material, settings

ALL = {"target_modules": "all-linear"}
DORA = {**ALL, "use_dora": True, "lora_bias": True}
EXPERTS = {**ALL, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
HEADS = {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}
WHOLE = {
    "target_modules": ["q_proj", "o_proj", "lm_head", "embed_tokens"],
    "bias": "all",
    "modules_to_save": ["norm", "up_proj"],
}
# An adapter that begins with weights of the model is put on all of it.
WHOLES: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("qwen2", DORA, {"fsdp": 2}),
    ("qwen2", DORA, {"tp": 2}),
    ("qwen2", WHOLE, {"tp": 2}),
    ("qwen2", WHOLE, {"fsdp": 2}),
    ("deepseek-v3", EXPERTS, {"tp": 2}),
    ("qwen2", WHOLE, {"pp": 2}),
]
PARTS: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("qwen2", ALL, {"fsdp": 2}),
    ("zamba2", ALL, {"tp": 2}),
    ("deepseek-v2", ALL, {"tp": 2, "sequence_parallel": True}),
    ("deepseek-v3", EXPERTS, {"tp": 2, "ep": 2}),
    ("qwen2-moe", EXPERTS, {"fsdp": 2, "ep": 2}),
    ("qwen2", HEADS, {"pp": 2}),
    # Stages share blocks, and what adapters do to these in each layer.
    ("zamba2", ALL, {"pp": 2}),
]


@pytest.mark.parametrize(("name", "adapter", "degrees"), WHOLES, ids=str)
def test_an_adapter_learns_in_two_processes_as_in_one(
    name: str, adapter: dict[str, Any], degrees: dict[str, int], two: Pool
) -> None:
    two.run(adapting.learns, name, {}, degrees, adapter)


@pytest.mark.parametrize(("name", "adapter", "degrees"), PARTS, ids=str)
def test_an_adapter_learns_on_a_part_as_on_the_whole(
    name: str, adapter: dict[str, Any], degrees: dict[str, int], tmp_path: Path, two: Pool
) -> None:
    family(name).model_of().save_pretrained(tmp_path)
    two.run(adapting.learns, name, {}, degrees, adapter, tmp_path)


@pytest.mark.parametrize(
    "degrees", [{"tp": 2, "fsdp": 2}, {"tp": 4, "ep": 2}, {"fsdp": 4, "ep": 2}], ids=str
)
def test_an_adapter_learns_in_four_processes_as_in_one(
    degrees: dict[str, int], tmp_path: Path, four: Pool
) -> None:
    family("deepseek-v3").model_of().save_pretrained(tmp_path)
    four.run(adapting.learns, "deepseek-v3", {}, degrees, EXPERTS, tmp_path, seconds=150)


@pytest.mark.parametrize(
    ("parallel", "held_as"),
    [({"fsdp": 2}, None), ({"tp": 2}, "int8"), ({"fsdp": 2, "ep": 2}, None), ({"pp": 2}, "int8")],
    ids=str,
)
def test_an_adapter_of_several_processes_is_one_ordinary_adapter(
    parallel: dict[str, int], held_as: str | None, tmp_path: Path, two: Pool
) -> None:
    root = material(tmp_path)
    base = settings(root, tmp_path / "base", "qwen2_moe", train={"steps": 1})
    start = train(base).path
    tables: dict[str, Any] = {
        "model": {"from": str(start), "config": None, "quantize": held_as},
        "adapter": {"r": 2, "experts": True},
        "report": {"peak_flops": 1e12},
    }
    alone = settings(root, tmp_path / "alone", "qwen2_moe", **tables)
    wanted = train(alone, report=(heard := Heard()))
    made: dict[int, float] = {}
    for steps, resume, processes in ((2, False, 2), (4, True, 1), (6, True, 2)):
        more = {"train": {"steps": steps}, "parallel": parallel if processes == 2 else {}}
        config = settings(root, tmp_path / "parts", "qwen2_moe", **tables, **more)
        if processes == 2:
            made |= two.run(training.run, config, resume)[0][0]
        else:
            train(config, resume=resume, report=(then := Heard()))
            made |= then.losses
    assert made == pytest.approx(heard.losses, rel=1e-4)
    found = []
    for path in (wanted.path, tmp_path / "parts" / wanted.path.name):
        files = Checkpoint.open(path, stem="adapter_model")
        found.append(dict(files.read(files.tensors)))
        assert not (path / "model.safetensors").exists()
    assert found[0].keys() == found[1].keys()
    assert all(found[0][name].shape == x.shape for name, x in found[1].items())
    again = family("qwen2-moe").cls("ForCausalLM").from_pretrained(start)
    again.load_adapter(tmp_path / "parts" / wanted.path.name)

"""What is handed to vLLM, SGLang, Slurm and Kubernetes is as these read it; none of them is run.

Names, shapes and keys are those that the readers of vLLM 0.11 and SGLang 0.5 ask for.
"""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conformance.families import FAMILIES
from quintet import LoraConfig
from quintet.checkpoint.header import TensorInfo, read_header
from quintet.conversion import convert
from quintet.quantization import FineGrainedFP8Config, PackedConfig
from waiting import PATIENCE

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted((EXAMPLES / "slurm").glob("*.sbatch"))
MANIFESTS = sorted((EXAMPLES / "kubernetes").glob("*.yaml"))
# Whole blocks of 128, and whole groups of 64.
WIDE: dict[str, dict[str, Any]] = {
    "qwen2": {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32},
    "deepseek-v3": {
        **{"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128},
        **{"q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "v_head_dim": 32},
        "qk_rope_head_dim": 32,
    },
}
SLURM = {
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_PER_NODE": "8",
}
each = pytest.mark.parametrize("name", WIDE)


def saved(name: str, root: Path) -> Path:
    family = next(one for one in FAMILIES if one.name == name)
    family.model_of(**WIDE[name]).to(torch.bfloat16).save_pretrained(root / "plain")
    return root / "plain"


def tensors_of(root: Path) -> dict[str, TensorInfo]:
    return dict(read_header(root / "model.safetensors").tensors)


def settings_of(root: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((root / "config.json").read_text())
    return settings["quantization_config"]  # type: ignore[no-any-return]


def plain_maps(tensors: dict[str, TensorInfo]) -> set[str]:
    """The linear maps in 16 bits; embedding and head are none to those readers."""
    maps = {n for n, t in tensors.items() if n.endswith(".weight") and len(t.shape) == 2}
    maps = {n for n in maps if tensors[n].dtype == torch.bfloat16}
    return {n.removesuffix(".weight") for n in maps if "embed_tokens" not in n}


@each
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_lie_as_readers_of_packed_ones_want_them(
    name: str, bits: int, tmp_path: Path
) -> None:
    convert(saved(name, tmp_path), tmp_path / "few", quantization_config=PackedConfig(bits=bits))
    settings, tensors = settings_of(tmp_path / "few"), tensors_of(tmp_path / "few")
    assert (settings["quant_method"], settings["format"]) == (
        "compressed-tensors",
        "pack-quantized",
    )
    weights = settings["config_groups"]["group_0"]["weights"]
    assert weights["symmetric"]
    assert weights["num_bits"] == bits
    assert not weights["dynamic"]
    packed = [n for n in tensors if n.endswith(".weight_packed")]
    assert packed
    for path in (n.removesuffix(".weight_packed") for n in packed):
        rows, words = tensors[f"{path}.weight_packed"].shape
        assert tensors[f"{path}.weight_packed"].dtype == torch.int32
        columns = words * 32 // bits
        groups = columns // weights["group_size"] if weights["group_size"] else 1
        assert tensors[f"{path}.weight_scale"].shape == (rows, groups)
        assert tensors[f"{path}.weight_shape"].shape == (2,)
    # Readers take what is not here by its full name for quantised.
    assert set(settings["ignore"]) == plain_maps(tensors) | {"lm_head"}


@each
def test_blocks_of_fp8_lie_as_in_the_released_files(name: str, tmp_path: Path) -> None:
    plain = saved(name, tmp_path)
    kept = [n.removesuffix(".weight") for n in tensors_of(plain) if n.endswith(".kv_b_proj.weight")]
    settings = FineGrainedFP8Config(modules_to_not_convert=kept or None)
    convert(plain, tmp_path / "few", quantization_config=settings)
    written, tensors = settings_of(tmp_path / "few"), tensors_of(tmp_path / "few")
    assert written["quant_method"] == "fp8"
    assert written["activation_scheme"] == "dynamic"
    assert written["weight_block_size"] == [128, 128]
    blocks = [n for n, t in tensors.items() if t.dtype == torch.float8_e4m3fn]
    assert blocks
    for path in blocks:
        scales = tensors[f"{path}_scale_inv"]
        assert scales.dtype == torch.float32
        assert scales.shape == tuple(math.ceil(n / 128) for n in tensors[path].shape)
    # A head that is tied is named as well.
    assert plain_maps(tensors) | {"lm_head"} == set(written["modules_to_not_convert"])


@each
def test_adapters_are_such_as_are_served(name: str, tmp_path: Path) -> None:
    family = next(one for one in FAMILIES if one.name == name)
    model = family.model_of(**WIDE[name])
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj", "down_proj"]))
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    assert settings["target_modules"]
    # What vLLM refuses.
    assert not settings.get("use_dora")
    assert not settings.get("modules_to_save")
    assert settings.get("bias", "none") == "none"
    names = read_header(tmp_path / "adapter_model.safetensors").tensors
    assert names
    for tensor in names:
        assert tensor.startswith("base_model.model.model.layers."), tensor
        assert tensor.endswith((".lora_A.weight", ".lora_B.weight")), tensor


def run(script: Path, *arguments: str, path: Path, **environment: str) -> Any:
    return subprocess.run(
        ["bash", script, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={"PATH": f"{path}:{os.environ['PATH']}", **SLURM, **environment},
        check=False,
    )


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """Commands of Slurm that say what they would start."""
    commands = {
        "scontrol": "printf 'node1\\nnode2\\n'",
        "srun": 'case "$*" in *hostname*) echo 10.0.0.1 ;; *) echo "srun $*" ;; esac',
        "sleep": "true",
    }
    for name, body in commands.items():
        command = tmp_path / name
        command.write_text(f"#!/usr/bin/env bash\n{body}\n")
        command.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_and_says_how_it_is_used(script: Path, cluster: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True, timeout=PATIENCE)
    directives = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert all(line.startswith("#SBATCH --") for line in directives)
    assert "#SBATCH --ntasks-per-node=1" in directives
    used = run(script, path=cluster)
    assert used.returncode == 2
    assert used.stderr.startswith("usage: sbatch")


def test_a_job_starts_a_torchrun_on_each_node(cluster: Path) -> None:
    script = EXAMPLES / "slurm" / "quintet.sbatch"
    started = run(script, "generate", "a/model", "two words", path=cluster)
    assert started.returncode == 0, started.stderr
    words = started.stdout.split()
    assert words[:3] == ["srun", "--kill-on-bad-exit=1", "torchrun"]
    assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-id=123456"} <= set(words)
    assert "--rdzv-endpoint=node1:23456" in words
    assert words[words.index("-m") :] == ["-m", "quintet", "generate", "a/model", "two", "words"]
    fewer = run(script, "info", path=cluster, QUINTET_PROCESSES="2")
    assert "--nproc-per-node=2" in fewer.stdout


def test_a_job_serves_over_all_nodes(cluster: Path) -> None:
    started = run(EXAMPLES / "slurm" / "vllm.sbatch", "/shared/model", path=cluster)
    assert started.returncode == 0, started.stderr
    lines = started.stdout.splitlines()
    assert any("ray start --head --node-ip-address=10.0.0.1 --port=23456" in one for one in lines)
    assert any("ray start --address=10.0.0.1:23456 --num-gpus=8" in one for one in lines)
    served = next(one for one in lines if "vllm serve /shared/model" in one)
    assert "--tensor-parallel-size 8 --pipeline-parallel-size 2" in served


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_parses_and_its_volumes_are_there(manifest: Path) -> None:
    found = documents(manifest)
    assert {one["kind"] for one in found} > {"Service"}
    for document in found:
        assert {"apiVersion", "kind", "metadata", "spec"} <= document.keys()
    for pod in pods(found):
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["limits"]["nvidia.com/gpu"] == 8


def pods(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [pod for one in value for pod in pods(one)]
    if not isinstance(value, dict):
        return []
    own = [value] if "containers" in value else []
    return own + [pod for one in value.values() for pod in pods(one)]


def test_a_training_in_pods_has_a_process_for_each_gpu() -> None:
    service, job = documents(EXAMPLES / "kubernetes" / "quintet-train.yaml")
    spec = job["spec"]
    (pod,) = pods(spec)
    command = pod["containers"][0]["command"]
    assert f"--nnodes={spec['completions']}" in command
    assert spec["completionMode"] == "Indexed"
    assert "--nproc-per-node=8" in command
    name, subdomain = job["metadata"]["name"], pod["subdomain"]
    assert f"--rdzv-endpoint={name}-0.{subdomain}:29400" in command
    assert service["metadata"]["name"] == subdomain
    assert service["spec"]["clusterIP"] == "None"
    assert command[command.index("-m") :][:3] == ["-m", "quintet", "train"]

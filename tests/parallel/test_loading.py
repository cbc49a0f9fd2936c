"""A model that several processes load: what each has, and what happens where one cannot."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from families import zamba2
from parallel.cases import loading
from parallel.cases.tensor import family
from parallel.pool import Pool
from quintet import LoraConfig

CASES: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("qwen2", {}, {"tp": 2}),
    ("qwen2", {"tie_word_embeddings": True}, {"tp": 2}),
    ("qwen2-moe", {}, {"tp": 2}),
    ("qwen2-moe", {}, {"tp": 2, "ep": 2}),
    ("deepseek-v2", {"attention_bias": True, "mlp_bias": True}, {"tp": 2}),
    ("deepseek-v3", {}, {"tp": 2, "ep": 2}),
    ("qwen2", {"tie_word_embeddings": True}, {"pp": 2}),
    ("deepseek-v3", {}, {"pp": 2}),
    ("zamba2", {**zamba2.TWO_BLOCKS, "use_shared_attention_adapter": True}, {"tp": 2}),
]


@pytest.mark.parametrize(("name", "changes", "degrees"), CASES, ids=str)
def test_each_has_its_part_of_the_whole(
    name: str, changes: dict[str, Any], degrees: dict[str, int], tmp_path: Path, two: Pool
) -> None:
    family(name).model_of(**changes).save_pretrained(tmp_path)
    two.run(loading.plain, name, tmp_path, degrees, {})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_converted_part_by_part(dtype: str, tmp_path: Path, two: Pool) -> None:
    family("qwen2").model_of().save_pretrained(tmp_path)
    two.run(loading.plain, "qwen2", tmp_path, {"tp": 2}, {"dtype": dtype})


@pytest.mark.parametrize(
    ("name", "kind", "degrees"),
    [
        *(("qwen2", kind, {"tp": 2}) for kind in loading.KINDS),
        *(("qwen2-moe", kind, {"tp": 2}) for kind in ("int8", "int4", "fp8")),
        ("qwen2-moe", "int4", {"tp": 2, "ep": 2}),
        ("deepseek-v3", "fp8", {"tp": 2, "ep": 2}),
        ("zamba2", "int8", {"tp": 2}),
        ("qwen2-moe", "int4", {"pp": 2}),
    ],
)
def test_quantised_while_it_is_read_it_is_the_cut_of_the_whole(
    name: str, kind: str, degrees: dict[str, int], tmp_path: Path, two: Pool
) -> None:
    family(name).model_of(**loading.WIDE[name]).save_pretrained(tmp_path)
    two.run(loading.quantised, name, tmp_path, degrees, loading.KINDS[kind])


def test_a_state_dict_is_cut_too_and_not_held_on_to(tmp_path: Path, two: Pool) -> None:
    family("qwen2").model_of().save_pretrained(tmp_path)
    two.run(loading.in_memory, "qwen2", tmp_path)


@pytest.mark.parametrize(
    ("head", "options", "overrides"),
    [
        ("ForTokenClassification", {}, {"num_labels": 3}),
        ("ForCausalLM", {"ignore_mismatched_sizes": True}, {"vocab_size": 119}),
    ],
)
def test_what_begins_fresh_is_the_same_for_all(
    head: str, options: dict[str, Any], overrides: dict[str, Any], tmp_path: Path, two: Pool
) -> None:
    family("qwen2").model_of().save_pretrained(tmp_path)
    two.run(loading.fresh, "qwen2", tmp_path, head, options, overrides)


def test_where_one_cannot_load_all_say_which_and_why(tmp_path: Path, two: Pool) -> None:
    family("qwen2").model_of().save_pretrained(tmp_path / "good")
    said = two.run(loading.unlike, "qwen2", [tmp_path / "good", tmp_path / "none"])
    assert said[0] == said[1]
    assert "rank 1 failed before it read weights" in said[0]
    assert str(tmp_path / "none") in said[0]


def test_where_none_can_load_each_says_what_one_process_would(tmp_path: Path, two: Pool) -> None:
    family("qwen2").model_of(num_hidden_layers=1).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        text.replace('"num_hidden_layers": 1', '"num_hidden_layers": 2')
    )
    said = two.run(loading.alike, "qwen2", tmp_path)
    assert said[0] == said[1]
    assert "missing" in said[0]


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"pp_size": 2}], ids=str)
def test_no_adapter_is_put_on_a_part(sizes: dict[str, int], tmp_path: Path, two: Pool) -> None:
    model = family("qwen2").model_of()
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    two.run(loading.with_adapter, tmp_path / "base", tmp_path / "adapter", sizes)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_each_reads_its_bytes_and_no_foreign_expert(tmp_path: Path, two: Pool) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 512, "moe_intermediate_size": 512}
    wide |= {"shared_expert_intermediate_size": 64, "num_experts": 16, "num_hidden_layers": 2}
    model = family("qwen2-moe").model_of(**wide).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    largest = max(p[0].nbytes for p in model.parameters())
    assert size > 40 << 20
    for found in two.run(loading.memory, tmp_path, {"tp": 2, "ep": 2}):
        assert found["held"] < 0.55 * size
        assert found["touched"] < 0.55 * size, found
        # What else is made: an allocator's leftovers, hooks, the tables of the model.
        assert found["peak"] < found["held"] + largest + (20 << 20), found

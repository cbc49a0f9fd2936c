"""Adapters in GGUF: what llama.cpp's converter writes is the adapter that PEFT wrote."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

import quintet
from conformance.families import FAMILIES, Family
from ggufwriting import ARCHITECTURES
from pefts import ATTENTION, logits
from quintet.cli.adapters import facts_of_adapter
from quintet.errors import CheckpointError, UnsupportedModelError
from quintet.folder import AdapterFolderError
from support import relative_error as relative

Pairs = dict[str, tuple[Tensor, Tensor]]
QWEN = FAMILIES[0]
IN_GGUF = FAMILIES[:4]
# A LoRA of kv_b_proj is no pair of matrices of k_b, and the converter says so.
TARGETS = {
    "qwen2": [*ATTENTION["qwen2"], "gate_proj", "up_proj", "down_proj", "lm_head"],
    "qwen2-moe": [*ATTENTION["qwen2-moe"], "shared_expert.gate_proj", "shared_expert_gate"],
    **{
        name: ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "shared_experts.up_proj"]
        for name in ("deepseek-v2", "deepseek-v3")
    },
}


def pairs_of(state: dict[str, Tensor], family: Family) -> Pairs:
    """A and B by the names of GGUF, experts stacked; as convert_lora_to_gguf.py makes them."""
    model_type = family.config().model_type
    names = gguf.get_tensor_name_map(ARCHITECTURES[model_type], 8)
    pairs: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name, tensor in state.items():
        path, leaf = re.fullmatch(
            r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", name
        ).groups()  # type: ignore[union-attr]
        expert = re.search(r"\.experts\.(\d+)", path)
        path = re.sub(r"\.experts\.\d+\.", ".experts.", path)
        base = names.get_name(path)
        assert base is not None, path
        pairs.setdefault(base, {}).setdefault(leaf, {})[int(expert[1]) if expert else 0] = tensor
    made = {}
    for base, own in pairs.items():
        A, B = (torch.stack([of[e] for e in sorted(of)]) for of in (own["A"], own["B"]))
        if not base.endswith("_exps"):
            A, B = A[0], B[0]
        made[f"{base}.weight"] = (A.T if base == "token_embd" else A, B)
    return made


def written(
    path: Path,
    pairs: Pairs,
    architecture: str = "qwen2",
    *,
    alpha: float | None = 16.0,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    general: str = "adapter",
    of: str = "lora",
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(general)
    writer.add_string("adapter.type", of)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    more(writer)
    for base, (A, B) in pairs.items():
        for leaf, tensor in {"lora_a": A, "lora_b": B}.items():
            values = tensor.detach().float().contiguous().numpy()
            chosen = kind if values.shape[-1] % 32 == 0 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(f"{base}.{leaf}", gguf.quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def adapted(family: Family, targets: list[str], **options: Any) -> Any:
    torch.manual_seed(1)
    model = family.model_of(tie_word_embeddings=False)
    config = quintet.LoraConfig(
        r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False, **options
    )
    model.add_adapter(config)
    return model.eval()


def with_experts(state: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    config = family.config()
    if not hasattr(config, "moe_intermediate_size"):
        return state
    C, F = config.hidden_size, config.moe_intermediate_size
    E = getattr(config, "n_routed_experts", None) or config.num_experts
    at = f"base_model.model.model.layers.{family.routes(config)[-1]}.mlp.experts"
    more = {}
    for expert in range(E):
        for part, (O, I) in {"gate": (F, C), "up": (F, C), "down": (C, F)}.items():
            more[f"{at}.{expert}.{part}_proj.lora_A.weight"] = torch.randn(4, I)
            more[f"{at}.{expert}.{part}_proj.lora_B.weight"] = torch.randn(O, 4)
    return {**state, **more}


@pytest.mark.parametrize("family", IN_GGUF, ids=str)
def test_it_is_the_adapter_that_peft_wrote(family: Family, tmp_path: Path) -> None:
    model = adapted(family, [*TARGETS[family.name], "embed_tokens"])
    state = with_experts(model.get_adapter_state_dict(), family)
    peft = {"peft_type": "LORA", "lora_alpha": 16, "target_modules": ["q_proj"]}
    plain = family.model_of(tie_word_embeddings=False).eval()
    before = logits(plain)
    plain.load_adapter(
        peft_config={**peft, "target_modules": []}, adapter_state_dict=state, adapter_name="peft"
    )
    expected = logits(plain)
    assert relative(before, expected) > 1e-3
    architecture = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[family.config().model_type]]
    path = written(tmp_path / "a.gguf", pairs_of(state, family), architecture)
    plain.load_adapter(path, "gguf")
    assert relative(logits(plain), expected) < 1e-6
    plain.save_pretrained(tmp_path / "again")
    plain.load_adapter(tmp_path / "again", "again")
    assert relative(logits(plain), expected) < 1e-6


def test_rows_of_a_llama_are_in_pairs(tmp_path: Path) -> None:
    model = adapted(QWEN, ["q_proj", "k_proj", "v_proj"])
    pairs = pairs_of(model.get_adapter_state_dict(), QWEN)
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for base, (A, B) in pairs.items():
        if H := heads.get(base.split(".")[2]):
            B = B.unflatten(0, (H, 2, -1)).transpose(1, 2).reshape(B.shape)
            pairs[base] = A, B
    plain = QWEN.model_of(tie_word_embeddings=False).eval()
    plain.load_adapter(written(tmp_path / "a.gguf", pairs, "llama"))
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_it_may_be_in_fewer_bits(kind: str, tmp_path: Path) -> None:
    model = adapted(QWEN, ["o_proj"])
    pairs = pairs_of(model.get_adapter_state_dict(), QWEN)
    plain = QWEN.model_of(tie_word_embeddings=False).eval()
    chosen = gguf.GGMLQuantizationType[kind]
    plain.load_adapter(written(tmp_path / "a.gguf", pairs, kind=chosen))
    A = plain.get_adapter_state_dict()[
        "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"
    ]
    stored = gguf.quantize(pairs["blk.0.attn_output.weight"][0].numpy(), chosen)
    assert np.array_equal(A.numpy(), gguf.dequantize(stored, chosen))
    assert relative(logits(plain), logits(model)) < 0.02


@pytest.mark.parametrize("alpha", [0.0, None])
def test_without_an_alpha_nothing_is_scaled(alpha: float | None, tmp_path: Path) -> None:
    model = adapted(QWEN, ["o_proj", "q_proj"], rank_pattern={"q_proj": 2}, use_rslora=True)
    pairs = pairs_of(model.get_adapter_state_dict(), QWEN)
    plain = QWEN.model_of(tie_word_embeddings=False)
    plain.load_adapter(written(tmp_path / "a.gguf", pairs, alpha=alpha))
    one = plain.model.layers[0].self_attn
    scales = [p.adapters["default"]["all"].added["weight"].scale for p in (one.q_proj, one.o_proj)]
    assert scales == [1, 1]


def test_a_folder_with_one_file_is_that(tmp_path: Path) -> None:
    model = adapted(QWEN, ["o_proj"])
    written(tmp_path / "a.gguf", pairs_of(model.get_adapter_state_dict(), QWEN))
    plain = QWEN.model_of(tie_word_embeddings=False).eval()
    plain.load_adapter(tmp_path)
    assert torch.equal(logits(plain), logits(model))


Z = torch.zeros
PAIR = {"blk.0.attn_output.weight": (Z(4, 64), Z(64, 4))}


@pytest.mark.parametrize(
    ("pairs", "options", "error", "match"),
    [
        (PAIR, {"general": "model"}, CheckpointError, "general.type='model'"),
        (PAIR, {"of": "control"}, UnsupportedModelError, "adapter.type='control'"),
        (PAIR, {"architecture": "gemma"}, UnsupportedModelError, "'gemma'"),
        (PAIR, {"architecture": "deepseek2"}, CheckpointError, "'deepseek2', .* is a qwen2"),
        ({"blk.0.attn_k_b.weight": (Z(4, 64), Z(64, 4))}, {}, CheckpointError, "no place"),
        ({"blk.9.attn_q.weight": (Z(4, 64), Z(64, 4))}, {}, CheckpointError, "no place"),
        ({"blk.0.attn_q.weight": (Z(4, 63), Z(64, 4))}, {}, CheckpointError, r"\[4, 64\]"),
        ({"blk.0.attn_q.weight": (Z(2, 4, 64), Z(64, 4))}, {}, CheckpointError, "2 axes"),
        (
            {"blk.0.attn_q.weight": (Z(4, 64), Z(63, 4))},
            {"architecture": "llama"},
            CheckpointError,
            "heads of pairs",
        ),
        (
            PAIR,
            {"more": lambda w: w.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((4, 64), "f"))},
            CheckpointError,
            r"lacks:\n.*attn_q\.weight\.lora_b",
        ),
        (
            PAIR,
            {"more": lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(64, "f"))},
            CheckpointError,
            "has tensors that no adapter has",
        ),
        (
            PAIR,
            {"more": lambda w: w.add_array("adapter.alora.invocation_tokens", [1, 2])},
            UnsupportedModelError,
            "invocation_tokens",
        ),
    ],
)
def test_what_is_another_or_does_not_fit_is_named(
    pairs: Pairs, options: dict[str, Any], error: Any, match: str, tmp_path: Path
) -> None:
    model = QWEN.model_of()
    path = written(tmp_path / "a.gguf", pairs, **options)
    with pytest.raises(error, match=f"(?s){match}"):
        model.load_adapter(path)
    assert model.adapters is None


def test_experts_are_all_there_or_none(tmp_path: Path) -> None:
    model = FAMILIES[1].model_of()
    C, F = model.config.hidden_size, model.config.moe_intermediate_size
    E = model.config.num_experts
    pairs = {"blk.1.ffn_up_exps.weight": (Z(E - 1, 4, C), Z(E - 1, F, 4))}
    with pytest.raises(CheckpointError, match=f"the model has {E} experts"):
        model.load_adapter(written(tmp_path / "a.gguf", pairs, "qwen2moe"))


def test_norms_beside_it_are_left_out_as_in_llama_cpp(tmp_path: Path) -> None:
    model = QWEN.model_of().eval()
    path = written(
        tmp_path / "a.gguf",
        PAIR,
        more=lambda w: w.add_tensor("blk.0.attn_norm.weight", np.zeros(64, "f")),
    )
    before = logits(model)
    with pytest.warns(UserWarning, match=r"(?s)1 vectors of norms.*blk\.0\.attn_norm"):
        model.load_adapter(path)
    assert torch.equal(logits(model), before)


def test_named_as_a_model_it_is_its_model_with_it(tmp_path: Path) -> None:
    model = adapted(QWEN, ["o_proj"])
    pairs = pairs_of(model.get_adapter_state_dict(), QWEN)
    QWEN.model_of(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    path = written(
        tmp_path / "a.gguf", pairs, more=lambda w: w.add_string("general.base_model.0.name", base)
    )
    again: Any = quintet.AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(logits(again.eval()), logits(model))
    unnamed = written(tmp_path / "b.gguf", pairs)
    with pytest.raises(UnsupportedModelError, match="is an adapter, not a model: load its base"):
        quintet.AutoModelForCausalLM.from_pretrained(unnamed)


def test_the_command_line_tells_what_it_is(tmp_path: Path) -> None:
    model = adapted(QWEN, ["o_proj"])
    url = "https://huggingface.co/Owner/Base"
    path = written(
        tmp_path / "a.gguf",
        pairs_of(model.get_adapter_state_dict(), QWEN),
        more=lambda w: w.add_string("general.base_model.0.repo_url", url),
    )
    with pytest.raises(AdapterFolderError):
        quintet.AutoConfig.from_pretrained(path)
    facts = facts_of_adapter(str(path), {})
    told = {key: facts[key].text for key in ("of model", "rank", "changes")}
    assert told == {"of model": "Owner/Base", "rank": "4", "changes": "o_proj"}
    assert facts["alpha"] == 16

"""Models in fewer bits: loaded, saved and loaded again, in all families."""

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quintet
from conformance.families import FAMILIES, Family, each
from quintet import AutoModelForCausalLM, Qwen2ForCausalLM, Qwen2ForSequenceClassification
from quintet.errors import CheckpointError, ConfigError, InputError, UnsupportedModelError
from quintet.modeling.base import PreTrainedModel
from quintet.quantization import (
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    GroupFormat,
    Int4Config,
    Int8Config,
    Int8Format,
    MixedConfig,
    QuantizationConfig,
    Quantized,
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    Scheme,
    WeightFormat,
)
from support import relative_error, small_config

IDS = torch.arange(1, 23).view(2, 11)


class Recipe(MixedConfig):
    """Groups of all kinds beside each other, which files tell apart."""

    def scheme_of(self, held: Mapping[str, WeightFormat]) -> Scheme | None:
        """Return formats by kinds of matrices; those of files where there are any."""
        special: dict[str, WeightFormat] = {
            "down_proj": GroupFormat(8, 16, dtype=torch.float32),
            "o_proj": GroupFormat(4, 32, iq4=True),
            "v_proj": GroupFormat(8, 32, offset=True),
            "k_proj": Int8Format(),
        }
        return Scheme(GroupFormat(4, 32, offset=True), GroupFormat(8, 32), special=special)


CONFIGS: dict[str, QuantizationConfig] = {
    "int8": Int8Config(),
    "int4": Int4Config(),
    "llm.int8": BitsAndBytesConfig(load_in_8bit=True),
    "fp4": BitsAndBytesConfig(load_in_4bit=True),
    "nf4-nested": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "fp8": FineGrainedFP8Config(),
    "mixed": Recipe(),
}
each_config = pytest.mark.parametrize("method", CONFIGS)


def changes_of(family: Family) -> dict[str, Any]:
    # A layer of multi-token prediction, and one whose experts no block of 128 divides.
    return {"num_nextn_predict_layers": 1} if family.name == "deepseek-v3" else {}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One saved model of each family, in bfloat16."""
    made = {}
    for family in FAMILIES:
        made[family.name] = tmp_path_factory.mktemp(family.name)
        family.model_of(**changes_of(family)).to(torch.bfloat16).save_pretrained(made[family.name])
    return made


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits.float()  # type: ignore[no-any-return]


def held(model: PreTrainedModel) -> dict[str, Quantized]:
    return {path: m for path, m in model.named_modules() if isinstance(m, Quantized)}


def numbers(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The plain weights a quantised model stands for, by their names."""
    yield from model.named_parameters()
    for path, module in held(model).items():
        for name in module.matrices:
            yield f"{path}.{name}", module.decoded(name, torch.float32)


def reference(model: PreTrainedModel, plain: PreTrainedModel) -> PreTrainedModel:
    """A model of plain numbers with the very weights that a quantised one stands for."""
    plain = plain.to(torch.float32)
    with torch.no_grad():
        for name, values in numbers(model):
            plain.get_parameter(name).copy_(values)
    plain.tie_weights()
    return plain


@each_config
@each
def test_a_model_computes_with_the_weights_it_stands_for(
    family: Family, method: str, checkpoints: dict[str, Path]
) -> None:
    cls = family.cls("ForCausalLM")
    root = checkpoints[family.name]
    model = cls.from_pretrained(root, quantization_config=CONFIGS[method], dtype="float32")
    expected = logits_of(reference(model, cls.from_pretrained(root)))
    # Kernels for integers round what is multiplied to 16 bits, in groups of 64.
    rounded = method in ("int8", "int4", "llm.int8", "mixed")
    assert relative_error(logits_of(model), expected) < (1e-3 if rounded else 1e-5)


@each_config
@each
def test_saved_and_loaded_again_it_is_the_same(
    family: Family, method: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    cls = family.cls("ForCausalLM")
    model = cls.from_pretrained(checkpoints[family.name], quantization_config=CONFIGS[method])
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    # FP8 becomes plain numbers on a CPU unless somebody insists.
    wish = {"quantize": "fp8"} if method == "fp8" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = cls.from_pretrained(tmp_path, **wish)
    assert again.config.quantization_config == model.config.quantization_config
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(logits_of(model), logits_of(again))


@each
def test_everything_heavy_is_quantised_and_routers_are_not(
    family: Family, checkpoints: dict[str, Path]
) -> None:
    model = family.cls("ForCausalLM").from_pretrained(checkpoints[family.name], quantize="int8")
    left = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | quintet.layers.moe.Experts)
    ]
    kept = ("mlp.gate", "shared_expert_gate", "kv_b_proj")
    assert all(path.endswith(kept) for path in left)
    assert isinstance(model.get_output_embeddings(), QuantizedLinear)
    tied = model.config.tie_word_embeddings
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding) == tied
    if family.name == "deepseek-v3":
        behind = model.model.prediction_layers()[0]
        assert isinstance(behind.eh_proj, QuantizedLinear)
        assert isinstance(behind.mlp.experts, QuantizedExperts)
        assert behind.shared_head["head"] is model.lm_head


@pytest.mark.parametrize("method", ["llm.int8", "fp4", "nf4-nested"])
def test_bitsandbytes_shrinks_the_experts_of_qwen2_moe(
    method: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    config = CONFIGS[method]
    model = AutoModelForCausalLM.from_pretrained(
        checkpoints["qwen2-moe"], quantization_config=config
    )
    model.save_pretrained(tmp_path)

    def expert_bytes(root: Path) -> int:
        tensors = load_file(root / "model.safetensors")
        # Without the tables and texts that every matrix has there once more.
        extra = ("quant_map", "nf4", "fp4")
        return sum(
            t.nbytes for n, t in tensors.items() if ".experts." in n and not n.endswith(extra)
        )

    share = expert_bytes(tmp_path) / expert_bytes(checkpoints["qwen2-moe"])
    # 8 bits and 32 a row; 4 bits and 32 or a little over 8 for 64 numbers.
    assert share < {"llm.int8": 0.6, "fp4": 0.29, "nf4-nested": 0.27}[method]
    in_memory = sum(
        buffer.nbytes
        for module in held(model).values()
        if isinstance(module, QuantizedExperts)
        for buffer in module.buffers()
    )
    assert in_memory == pytest.approx(expert_bytes(tmp_path), rel=0.02)


def test_one_scheme_becomes_another_on_the_way(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(checkpoints["qwen2"])
    model = AutoModelForCausalLM.from_pretrained(checkpoints["qwen2"], quantize="int8")
    model.save_pretrained(tmp_path)
    # Every step of int4 out of int8 is another, and back to plain numbers nothing is lost.
    four = AutoModelForCausalLM.from_pretrained(tmp_path, quantize="int4")
    assert four.config.quantization_config["bits"] == 4
    back = AutoModelForCausalLM.from_pretrained(tmp_path, quantize="none", dtype="float32")
    assert not held(back)
    assert "quantization_config" not in vars(back.config)
    expected = logits_of(reference(model, plain))
    torch.testing.assert_close(logits_of(back), expected, rtol=1e-5, atol=1e-5)


def test_modules_that_are_named_stay_as_they_are(checkpoints: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        checkpoints["qwen2"],
        quantization_config={
            "quant_method": "quintet",
            "bits": 8,
            "group_size": None,
            "modules_to_not_convert": ["lm_head", "layers.1", "mlp.down_proj"],
        },
    )
    kinds = {path: type(model.get_submodule(path)) for path in ("lm_head", "model.embed_tokens")}
    assert QuantizedLinear not in kinds.values()
    assert not [path for path in held(model) if "layers.1." in path or "down_proj" in path]
    assert [path for path in held(model) if "layers.2.mlp.up_proj" in path]


def test_the_compute_dtype_is_that_of_the_products(checkpoints: dict[str, Path]) -> None:
    def loaded(**options: Any) -> PreTrainedModel:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
        return AutoModelForCausalLM.from_pretrained(
            checkpoints["qwen2"], quantization_config=config
        )

    plain, wide = logits_of(loaded()), logits_of(loaded(bnb_4bit_compute_dtype=torch.float32))
    assert not torch.equal(plain, wide)
    torch.testing.assert_close(plain, wide, rtol=0.05, atol=0.05 * float(wide.abs().max()))


def test_moving_to_another_dtype_leaves_the_quantised_weights(
    checkpoints: dict[str, Path],
) -> None:
    for quantize in ("int8", "int4", "fp8"):
        model = AutoModelForCausalLM.from_pretrained(checkpoints["zamba2"], quantize=quantize)
        before = {k: v.clone() for m in held(model).values() for k, v in m.named_buffers()}
        model.to(torch.float32)
        after = {k: v for m in held(model).values() for k, v in m.named_buffers()}
        assert all(before[k].dtype == after[k].dtype for k in before)
        assert model(IDS).logits.dtype == torch.float32


def test_a_quantised_model_refuses_to_be_trained_by_itself(checkpoints: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints["qwen2-moe"], quantize="int8")
    assert model.num_parameters(only_trainable=True) == 0
    assert not model(IDS, labels=IDS).loss.requires_grad
    with pytest.raises(InputError, match="Put an adapter on it"):
        model.train()(IDS, labels=IDS)
    with torch.no_grad():
        assert model(IDS, labels=IDS).loss.isfinite()
    model.get_input_embeddings().requires_grad_(True)
    model(IDS, labels=IDS).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_a_classifier_keeps_its_head_in_plain_numbers(checkpoints: dict[str, Path]) -> None:
    with pytest.warns(UserWarning, match="score"):
        model = Qwen2ForSequenceClassification.from_pretrained(
            checkpoints["qwen2"], quantize="int8", pad_token_id=0
        )
    assert isinstance(model.score, torch.nn.Linear)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
    last = model.model(IDS).last_hidden_state[:, -1]
    assert torch.equal(model(IDS).logits, model.score(last))


def test_a_vocabulary_in_fewer_bits_keeps_its_size(checkpoints: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints["zamba2"], quantize="int8")
    with pytest.raises(InputError, match="resize it"):
        model.resize_token_embeddings(200)


# -- what cannot be ----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    Qwen2ForCausalLM(small_config()).save_pretrained(tmp_path)
    return tmp_path


def with_config(root: Path, values: Any) -> None:
    config = json.loads((root / "config.json").read_text())
    config["quantization_config"] = values
    (root / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        ({"quant_method": "hqq", "bits": 4}, UnsupportedModelError, "quant_method='hqq'"),
        ({"bits": 4}, UnsupportedModelError, "quant_method=None"),
        ("int8", ConfigError, "quantization_config is a builtins.str: 'int8'"),
        ({"quant_method": "quintet", "bits": 3, "group_size": None}, ConfigError, "bits=3"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, ConfigError, "fmt='e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, ConfigError, "two positive"),
        ({"quant_method": "bitsandbytes"}, ConfigError, "exactly one of load_in_8bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bits": True}, ConfigError, "load_in_8bit'?"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_cannot_be_is_refused(
    saved: Path, values: Any, error: type[Exception], said: str
) -> None:
    with_config(saved, values)
    with pytest.raises(error, match=said):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_weights_of_one_byte_are_refused_without_a_config_that_explains_them(
    saved: Path, dtype: torch.dtype
) -> None:
    tensors = load_file(saved / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = (tensors[name] * 100).to(dtype)
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} is stored as {dtype}"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_a_scale_that_is_missing_or_of_another_shape_is_named(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, quantize="int8")
    model.save_pretrained(saved)
    tensors = load_file(saved / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight_scale"
    scale = tensors.pop(name)
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"1 missing:\n  {name}: expected \[96\]"):
        AutoModelForCausalLM.from_pretrained(saved)
    save_file({**tensors, name: scale[:3]}, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}: expected \[96\], found \[3\]"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_a_weight_that_is_not_finite_is_named(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}: a weight that is NaN"):
        AutoModelForCausalLM.from_pretrained(saved, quantize="int8")


def test_wishes_that_contradict_or_do_not_exist_are_refused(saved: Path) -> None:
    load = AutoModelForCausalLM.from_pretrained
    with pytest.raises(InputError, match="one option"):
        load(saved, quantize="int8", quantization_config=Int4Config())
    with pytest.raises(InputError, match="has to be one of int8, int4, nf4, fp8, none"):
        load(saved, quantize="int7")
    with pytest.raises(InputError, match=r"load_in_8bit: .*BitsAndBytesConfig"):
        load(saved, load_in_8bit=True)

"""Adapters' files: read in every form they come in, and refused by name if they are not right."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quintet
from conformance.families import FAMILIES, Family
from pefts import ATTENTION, logits
from quintet import AutoModelForCausalLM, LoraConfig
from quintet.errors import CheckpointError, ConfigError, InputError, UnsupportedModelError
from support import relative_error as relative

QWEN = FAMILIES[0]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
P = "base_model.model."
Q = f"{P}model.layers.0.self_attn.q_proj."
Tensors = dict[str, Tensor]


def written(root: Path, tensors: Tensors, **config: Any) -> Path:
    root.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, root / WEIGHTS)
    content = {"peft_type": "LORA", "target_modules": ["q_proj"], "layers_to_transform": [0]}
    content |= config
    (root / CONFIG).write_text(json.dumps(content))
    return root


def pair(O: int = 64, I: int = 64, r: int = 2, at: str = Q) -> Tensors:
    torch.manual_seed(0)
    return {f"{at}lora_A.weight": torch.randn(r, I), f"{at}lora_B.weight": torch.randn(O, r)}


@pytest.fixture
def model() -> Any:
    return QWEN.model_of()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Tensor]:
    """A model's folder, an adapter's, and what the two make."""
    root = tmp_path_factory.mktemp("whole")
    QWEN.model_of().save_pretrained(root / "base")
    model = AutoModelForCausalLM.from_pretrained(root / "base")
    model.add_adapter(LoraConfig(target_modules=ATTENTION["qwen2"], init_lora_weights=False))
    model.save_pretrained(root / "adapter")
    return root / "base", root / "adapter", logits(model.eval())


@pytest.mark.parametrize("family", FAMILIES[1:4], ids=str)
def test_experts_one_by_one_are_experts_in_a_stack(family: Family, tmp_path: Path) -> None:
    config = family.config()
    C, F = config.hidden_size, config.moe_intermediate_size
    E = getattr(config, "n_routed_experts", None) or config.num_experts
    layer, (O, I) = family.routes(config)[-1], (F, C)
    path = f"{P}model.layers.{layer}.mlp.experts."
    torch.manual_seed(0)
    single: Tensors = {}
    for expert in range(E):
        for part, (rows, columns) in {"gate": (O, I), "up": (O, I), "down": (I, O)}.items():
            at = f"{path}{expert}.{part}_proj."
            single[f"{at}lora_A.weight"] = torch.randn(3, columns)
            single[f"{at}lora_B.weight"] = torch.randn(rows, 3)

    def stacked(part: str) -> tuple[Tensor, Tensor]:
        A = [single[f"{path}{e}.{part}_proj.lora_A.weight"] for e in range(E)]
        B = [single[f"{path}{e}.{part}_proj.lora_B.weight"] for e in range(E)]
        return torch.stack(A), torch.stack(B)

    # Gate and up of rank 3 each are one map of rank 6, with twice the alpha.
    (gate_A, gate_B), (up_A, up_B), (A, B) = map(stacked, ("gate", "up", "down"))
    both_A = torch.cat((gate_A, up_A), dim=1)
    both_B = torch.zeros(E, 2 * F, 6)
    both_B[:, :F, :3], both_B[:, F:, 3:] = gate_B, up_B
    names = {"": (A, B), "base_layer.": (both_A, both_B)}
    stack: Tensors = {}
    for infix, (down, up) in names.items():
        at = f"{path.removesuffix('.')}.{infix}"
        stack[f"{at}lora_A.weight"] = down.flatten(0, 1)
        stack[f"{at}lora_B.weight"] = up.permute(1, 2, 0).flatten(1, 2)
    made = []
    for number, tensors in enumerate((single, stack)):
        options: dict[str, Any] = {"target_modules": [], "lora_alpha": 0.3}
        if number:
            options["alpha_pattern"] = {"experts.gate_up_proj": 0.6}
        model = family.model_of()
        model.load_adapter(written(tmp_path / str(number), tensors, **options))
        made.append(logits(model))
        again = family.model_of()
        model.save_pretrained(tmp_path / f"again-{number}")
        assert set(load_file(tmp_path / f"again-{number}" / WEIGHTS)) == set(tensors)
        again.load_adapter(tmp_path / f"again-{number}")
        assert torch.equal(logits(again), made[-1])
        model.merge_adapter()
        assert relative(logits(model), made[-1]) < 1e-5
    assert relative(made[0], made[1]) < 1e-5
    assert relative(made[0], logits(family.model_of())) > 1e-3


def test_a_folder_of_an_adapter_is_its_model_with_it(whole: tuple[Path, Path, Tensor]) -> None:
    base, adapter, made = whole
    assert json.loads((adapter / CONFIG).read_text())["base_model_name_or_path"] == str(base)
    for cls in (AutoModelForCausalLM, quintet.Qwen2ForCausalLM):
        model = cls.from_pretrained(adapter)
        assert torch.equal(logits(model), made)
        assert model.active_adapters() == ["default"]
    quintet.AutoModel.from_pretrained(adapter)


def test_another_head_and_the_decoder_alone_take_it(whole: tuple[Path, Path, Tensor]) -> None:
    base, adapter, _ = whole
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        full = AutoModelForCausalLM.from_pretrained(adapter).model(ids).last_hidden_state
        alone = quintet.AutoModel.from_pretrained(base)
        assert relative(alone(ids).last_hidden_state, full) > 1e-3
        alone.load_adapter(adapter)
        assert torch.equal(alone(ids).last_hidden_state, full)


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"peft_type": "IA3"}, UnsupportedModelError, "'IA3'"),
        ({"peft_type": None}, UnsupportedModelError, "another kind"),
        ({"layer_replication": [[0, 2]]}, UnsupportedModelError, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, UnsupportedModelError, "alora_invocation_tokens"),
        ({"use_of_tomorrow": 0.5}, UnsupportedModelError, "use_of_tomorrow"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            UnsupportedModelError,
            "original model; or .* merge",
        ),
        ({"r": -1}, ConfigError, "r=-1"),
        ({"lora_alpha": float("inf")}, ConfigError, "lora_alpha"),
        ({"lora_alpha": True}, ConfigError, "lora_alpha"),
        ({"lora_alpha": 10**400}, ConfigError, "lora_alpha"),
        ({"lora_dropout": -(10**400)}, ConfigError, "lora_dropout"),
        ({"rank_pattern": {"q_proj": 10**400}}, ConfigError, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 10**400}}, ConfigError, "alpha_pattern"),
        ({"alpha_pattern": {"(a*)*": 1}}, ConfigError, "alpha_pattern"),
        ({"rank_pattern": {"[": 1}}, ConfigError, "rank_pattern"),
        ({"target_modules": 3}, ConfigError, "target_modules"),
    ],
)
def test_what_a_config_may_not_say(
    model: Any, config: dict[str, Any], error: Any, match: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        model.load_adapter(written(tmp_path, pair(), **config))
    assert model.adapters is None


@pytest.mark.parametrize(
    "config",
    [
        {"use_of_tomorrow": None, "more": False, "still_more": {}},
        {"corda_config": {"a": 1}, "loftq_config": {"bits": 4}, "peft_version": "0.99"},
        {"r": 64, "lora_dropout": 0.5, "inference_mode": True, "megatron_core": "megatron.core"},
    ],
)
def test_what_only_training_reads_changes_nothing(
    model: Any, config: dict[str, Any], tmp_path: Path
) -> None:
    model.load_adapter(written(tmp_path / "a", pair(), **config))
    plain = QWEN.model_of()
    plain.load_adapter(written(tmp_path / "b", pair()))
    assert torch.equal(logits(model), logits(plain))


Spoil = Callable[[Tensors], None]


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (pair(I=63), r"\[2, 63\].*\[2, 64\]"),
        (pair(O=65), r"\[65, 2\].*\[64, 2\]"),
        (pair(r=0), "rank of at least 1"),
        ({f"{Q}lora_A.weight": torch.randn(2, 64)}, "lora_B.weight is missing"),
        ({**pair(), f"{Q}lora_B.bias": torch.randn(63)}, r"\[63\]"),
        ({**pair(), f"{Q}lora_embedding_A": torch.randn(2, 64)}, "no meaning"),
        (pair(at=f"{P}model.layers.7.self_attn.q_proj."), "no place"),
        (pair(at=f"{P}model.layers.0.self_attn."), "no matrix"),
        ({f"{P}model.norm.weight": torch.randn(64)}, "no place"),
        ({f"{P}lm_head.weight": torch.randn(105, 64)}, r"resize_token_embeddings\(105\)"),
        ({k: v.to(torch.int32) for k, v in pair().items()}, "int32"),
        ({k: v[None] for k, v in pair().items()}, r"\[1, 2, 64\]"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(
    model: Any, tensors: Tensors, match: str, tmp_path: Path
) -> None:
    with pytest.raises((CheckpointError, UnsupportedModelError), match=f"(?s){match}"):
        model.load_adapter(written(tmp_path, tensors))
    assert model.adapters is None


@pytest.mark.parametrize("tensors", [pair(I=63), pair(at=f"{P}model.layers.7.self_attn.q_proj.")])
@pytest.mark.parametrize("base", ["Owner/Other-7B", None])
def test_another_models_adapter_is_told_with_both_names(
    tensors: Tensors, base: str | None, tmp_path: Path
) -> None:
    QWEN.model_of().save_pretrained(tmp_path / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    told = f"was trained on '{base}'" if base else "does not say what it was trained on"
    with pytest.raises(CheckpointError, match=rf"(?s){told}.*base, a qwen2 with 3 layers of 64"):
        model.load_adapter(written(tmp_path / "a", tensors, base_model_name_or_path=base))


def test_a_name_alone_makes_no_other_model(model: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(written(tmp_path, pair(), base_model_name_or_path="x/y", bias="none"))


def test_what_is_no_adapter_is_named(model: Any, tmp_path: Path) -> None:
    with pytest.raises(quintet.errors.ModelNotFoundError):
        model.load_adapter(tmp_path / "nothing")
    written(tmp_path / "pickled", pair())
    (tmp_path / "pickled" / WEIGHTS).rename(tmp_path / "pickled" / "adapter_model.bin")
    with pytest.raises(UnsupportedModelError, match="pickled"):
        model.load_adapter(tmp_path / "pickled")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        model.load_adapter(tmp_path / "model")
    with pytest.raises(InputError, match="peft_config"):
        model.load_adapter()


def test_a_target_without_tensors_is_told(model: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"(?s)no tensors for 2 modules.*layers\.1"):
        model.load_adapter(written(tmp_path, pair(), layers_to_transform=None))


@pytest.mark.parametrize(
    ("config", "tensors", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, {}, "lm_head"),
        ({"modules_to_save": ["norm"]}, {f"{P}model.norm.weight": torch.ones(64)}, "layernorm"),
        ({"trainable_token_indices": [3]}, {}, "embed_tokens"),
        ({"target_parameters": ["0.mlp.up_proj.weight"]}, {}, "up_proj"),
        ({"bias": "lora_only"}, {}, r"1 modules or biases.*layers\.0\.self_attn\.q_proj\.bias"),
        ({"bias": "all"}, {f"{Q}bias": torch.ones(64)}, r"8 modules or biases.*k_proj\.bias"),
    ],
)
def test_so_is_what_else_a_config_names(
    model: Any, config: dict[str, Any], tensors: Tensors, named: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=rf"(?s)no tensors for .*{named}"):
        model.load_adapter(written(tmp_path, {**pair(), **tensors}, **config))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "lora_magnitude_vector is missing, .*use_dora=true"),
        ({"lora_bias": True}, r"lora_B\.bias is missing, .*lora_bias=true"),
    ],
)
def test_what_it_would_be_another_adapter_without_is_an_error(
    model: Any, config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=said):
        model.load_adapter(written(tmp_path, pair(), **config))
    assert model.adapters is None


# As Unsloth writes what it was told to train, for models of any kind.
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|"
    r"feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj)))"
)


def test_targets_may_be_written_as_others_do(model: Any, tmp_path: Path) -> None:
    both = {**pair(), **pair(O=32, at=Q.replace("q_proj", "k_proj"))}
    config = {"target_modules": UNSLOTH, "layers_to_transform": None}
    with pytest.warns(UserWarning, match=r"no tensors for 4 modules"):
        model.load_adapter(written(tmp_path, both, **config))


def test_it_is_loaded_as_transformers_loads_one(model: Any, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    written(tmp_path / "inside" / "one", pair())
    where = {"adapter_kwargs": {"subfolder": "one"}, "low_cpu_mem_usage": True}
    for _ in range(2):
        model.load_adapter(tmp_path / "inside", None, hotswap="auto", **where)
        assert model.active_adapters() == ["default"]
    with pytest.raises(InputError, match="there is an adapter 'default'"):
        model.load_adapter(tmp_path / "inside", **where)
    with pytest.raises(InputError, match=r"adapter_kwargs has \['device'\]; there are revision"):
        model.load_adapter(tmp_path / "inside", "b", adapter_kwargs={"device": "cpu"})
    with pytest.raises(InputError, match="hotswap='always' has to be"):
        model.load_adapter(tmp_path / "inside", "b", hotswap="always")


def test_layers_are_found_by_patterns_with_groups(model: Any, tmp_path: Path) -> None:
    for number, pattern in enumerate(("(h|layers)", "h|layers", ["(h)", "(layers)"])):
        model.load_adapter(written(tmp_path, pair(), layers_pattern=pattern), f"a{number}")


def test_names_are_each_once(model: Any, tmp_path: Path) -> None:
    root = written(tmp_path, pair())
    model.load_adapter(root)
    for name in ("default", "", "a.b", "__base__"):
        with pytest.raises(InputError, match="adapter"):
            model.load_adapter(root, name)
    with pytest.raises(InputError, match="it has 'default'"):
        model.set_adapter("other")
    with pytest.raises(InputError, match="once"):
        model.set_adapter(["default", "default"])
    with pytest.raises(InputError, match=r"weights=.* finite numbers"):
        model.set_adapter(["default"], [10**400])
    with pytest.raises(InputError, match="2 rows"):
        model(torch.tensor([[5]]), adapter_names=["default", None])
    with pytest.raises(InputError, match="2 rows"):
        model.generate(torch.tensor([[5]]), adapter_names=["default", None], max_new_tokens=1)
    with pytest.raises(InputError, match="adapter_names goes with one generation_config"):
        model.generate(torch.tensor([[5]]), [{}], adapter_names=["default"], max_new_tokens=1)
    model.delete_adapter("default")
    with pytest.raises(InputError, match="no adapter on this model"):
        model.active_adapters()

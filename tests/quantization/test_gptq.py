"""Files of GPTQ: all that their writers vary, in all families, against the numbers they mean."""

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import packers
from conformance.families import FAMILIES, Family, each
from quintet import AutoModelForCausalLM
from quintet.checkpoint import TensorInfo
from quintet.errors import CheckpointError, ConfigError, InputError, UnsupportedModelError
from quintet.quantization import Quantized, stored
from quintet.quantization.gptq import GPTQConfig, ZeroPointWarning
from support import relative_error

IDS = torch.arange(1, 23).view(2, 11)
QWEN = FAMILIES[0]


def unpacked(config: Any, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """Read one matrix, as files are read: what is there is first held against what should be."""
    infos = {
        f"a.{name}": TensorInfo(f"a.{name}", t.dtype, tuple(t.shape), Path("file"))
        for name, t in tensors.items()
    }
    (entry,) = stored({"a.weight": shape}, infos, config).values()
    one = entry.format
    assert one is not None
    assert {name: infos[name].shape for name, _ in entry.files.values()} == dict(
        entry.files.values()
    )
    found = {key: tensors[name.removeprefix("a.")] for key, (name, _) in entry.files.items()}
    parts = one.unpack("a.weight", found, shape)
    whole = one.decode(parts, shape, torch.float32)
    if one.model_format is not None:
        recast = one.recast(parts, shape, one.model_format)
        assert recast is not None
        # Kernels read rows.
        assert all(part.is_contiguous() for part in recast.values())
        again = one.model_format.decode(recast, shape, torch.float32)
        # int4 has bfloat16 scales.
        assert relative_error(again, whole) < 4e-3
    return whole


@pytest.mark.parametrize("shape", [(24, 128), (20, 96)], ids=["whole", "filled-up"])
def test_a_matrix_is_what_its_packer_was_given(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    truths = (True, False)
    for bits, group, symmetric, shuffled, first in itertools.product(
        (4, 8), (-1, 32, 64, 128), truths, truths, truths
    ):
        tensors, meant = packers.gptq(
            weight,
            bits=bits,
            group=group,
            symmetric=symmetric,
            shuffled=shuffled,
            stored_less_one=first,
        )
        config = GPTQConfig(
            bits=bits,
            group_size=group,
            sym=symmetric,
            desc_act=shuffled,
            checkpoint_format="gptq" if first else "gptq_v2",
        )
        assert torch.equal(unpacked(config, tensors, shape), meant)
        if symmetric:
            # Files with zero points of the second version under the label of the first exist.
            config.checkpoint_format = "gptq_v2" if first else "gptq"
            assert torch.equal(unpacked(config, tensors, shape), meant)
        if not shuffled:
            del tensors["g_idx"]
            assert torch.equal(unpacked(config, tensors, shape), meant)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Packed checkpoints, and models of the numbers they stand for."""

    @functools.cache
    def make(family: Family, **options: Any) -> tuple[Path, Any]:
        root = tmp_path_factory.mktemp(family.name)
        torch.manual_seed(3)
        settings = {
            "quant_method": "gptq",
            "bits": options.get("bits", 4),
            "group_size": options.get("group", 64),
            "sym": options.get("symmetric", True),
            "desc_act": options.get("shuffled", False),
            "damp_percent": 0.1,
            "meta": {"quantizer": ["gptqmodel:2.0.0"]},
        }

        def pack(path: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            return packers.gptq(weight, **options)

        return root, packers.packed_checkpoint(family, root, pack, settings, **family.rounded)

    return make


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(IDS).logits.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "options",
    [
        {"scale_dtype": torch.bfloat16},
        {"symmetric": False, "group": 32},
        {"bits": 8, "group": -1},
        {"shuffled": True, "scale_dtype": torch.bfloat16},
        {"shuffled": True, "bits": 8, "symmetric": False, "group": 16},
    ],
    ids=["int4", "asymmetric", "int8", "act-order", "int8-act-order"],
)
@each
def test_a_model_computes_with_what_its_files_mean(
    family: Family, options: dict[str, Any], made: Any, recwarn: pytest.WarningsRecorder
) -> None:
    root, plain = made(family, **options)
    model = AutoModelForCausalLM.from_pretrained(root, dtype="float32")
    assert relative_error(logits_of(model), logits_of(plain)) < 2e-3
    decoded = AutoModelForCausalLM.from_pretrained(root, dtype="float32", quantize="none")
    assert "quantization_config" not in vars(decoded.config)
    assert relative_error(logits_of(decoded), logits_of(plain)) < 1e-5
    assert not recwarn.list


def test_symmetric_groups_stay_in_four_bits(made: Any, tmp_path: Path) -> None:
    root, _ = made(QWEN, scale_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(root)
    held = [m for m in model.modules() if isinstance(m, Quantized)]
    assert len(held) == 7 * model.config.num_hidden_layers
    assert {m.format.name for m in held} == {"int4"}
    assert not isinstance(model.lm_head, Quantized)
    # What is saved is in our own format, and means the same.
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "quintet"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(model), logits_of(again))
    assert not isinstance(again.lm_head, Quantized)


def test_it_becomes_another_format_without_a_detour(made: Any) -> None:
    root, plain = made(QWEN, shuffled=True)
    model = AutoModelForCausalLM.from_pretrained(root, quantize="int8")
    found = model.model.layers[0].mlp.up_proj.decoded("weight", torch.float32)
    weight = plain.model.layers[0].mlp.up_proj.weight
    assert bool(((found - weight).abs() <= weight.abs().amax(-1, keepdim=True) * 0.51 / 127).all())


def change(root: Path, to: Path, settings: dict[str, Any], **tensors: Any) -> Path:
    """Copy a checkpoint with other settings, and with tensors that functions make of theirs."""
    config = json.loads((root / "config.json").read_text())
    config["quantization_config"] |= settings
    (to / "config.json").write_text(json.dumps(config))
    held = load_file(root / "model.safetensors")
    for ending, make in tensors.items():
        name = f"model.layers.1.mlp.up_proj.{ending}"
        if (new := make(held.pop(name, None))) is not None:
            held[name] = new
    save_file(held, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_older_repositories_say_it_in_a_file_of_its_own(made: Any, tmp_path: Path) -> None:
    root, plain = made(QWEN, symmetric=False, group=32)
    change(root, tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert relative_error(logits_of(model), logits_of(plain)) < 2e-3


DOWN: dict[str, Any] = {"bits": 8, "group_size": 32, "sym": False}
QUERIES = r"model\.layers\.1\.self_attn\."


@pytest.mark.parametrize(
    "settings",
    [
        {
            "quant_method": "gptq",
            "dynamic": {
                r"+:.*\.layers\.0\..*down_proj": DOWN,
                QUERIES: {"group_size": -1},
                "-:.*nothing": {},
            },
        },
        {
            "quant_method": "auto-round",
            "extra_config": {
                QUERIES + ".*": {"group_size": -1},
                "model.layers.0.mlp.down_proj": DOWN,
                "model.embed_tokens": {"bits": 16, "data_type": "float"},
            },
        },
    ],
)
def test_modules_may_be_quantised_in_other_ways(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(5)

    def pack(path: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        if "layers.0.mlp.down" in path:
            return packers.gptq(weight, bits=8, group=32, symmetric=False)
        return packers.gptq(weight, group=-1 if "layers.1.self_attn" in path else 64)

    settings = {"bits": 4, "group_size": 64, "desc_act": False, "lm_head": True, **settings}
    plain = packers.packed_checkpoint(QWEN, tmp_path, pack, settings, also=("lm_head.weight",))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert isinstance(model.lm_head, Quantized)
    decoded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32", quantize="none")
    assert relative_error(logits_of(decoded), logits_of(plain)) < 1e-5


def test_biases_of_zeros_are_no_loss_and_others_are(
    made: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    root, _ = made(QWEN, scale_dtype=torch.bfloat16)
    rows = load_file(root / "model.safetensors")["model.layers.1.mlp.up_proj.scales"].shape[1]
    change(root, tmp_path, {}, bias=lambda _: torch.zeros(rows))
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not recwarn.list
    change(root, tmp_path, {}, bias=lambda _: torch.ones(rows))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.bias is not zero"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "tensors", "said"),
    [
        ({}, {"scales": lambda t: None}, r"1 missing:\s+model\.layers\.1\.mlp\.up_proj\.scales"),
        ({}, {"qweight": lambda t: None}, r"1 missing:\s+model\.layers\.1\.mlp\.up_proj\.qweight"),
        (
            {},
            {"qweight": lambda t: t[:-1].clone()},
            r"up_proj\.qweight: expected \[8, 96\], found \[7, 96\]",
        ),
        ({"group_size": 16}, {}, r"q_proj\.qzeros: expected \[4, 8\], found \[2, 8\]"),
        ({"bits": 8}, {}, r"\.qweight: expected \["),
        ({"sym": True}, {}, "zero points from 3 to 10 are not all 8"),
        ({}, {"scales": lambda t: t * float("nan")}, "scales that are not finite"),
        ({}, {"scales": lambda t: t.int()}, "scales of torch.int32"),
        ({}, {"qweight": lambda t: t.float()}, "packed in torch.float32"),
        ({}, {"g_idx": lambda t: t.flip(0)}, "desc_act=false"),
        ({"desc_act": True}, {"g_idx": lambda t: t + 7}, "g_idx goes from 7 to 8"),
        ({"desc_act": True}, {"g_idx": lambda t: t[:-1].clone()}, "for each of 64 inputs"),
    ],
)
def test_what_is_wrong_is_named(
    settings: dict[str, Any], tensors: dict[str, Any], said: str, made: Any, tmp_path: Path
) -> None:
    root, _ = made(QWEN, symmetric=False, group=32)
    change(root, tmp_path, settings, **tensors)
    with pytest.raises(CheckpointError, match=said):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 3}, "bits=3 has to be 4 or 8"),
        ({"bits": True}, "bits=True"),
        ({"group_size": 0}, "group_size=0"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin' has to be one of gptq"),
        ({"is_marlin_format": True}, "is_marlin_format=True"),
        ({"pack_dtype": "int16"}, "pack_dtype='int16'"),
        ({"dynamic": {"+:(": {}}}, "no plain regular expression"),
        ({"dynamic": {"-:(a+)+b": {}}}, "no plain regular expression"),
        ({"dynamic": {"a": {"bits": 2}}}, "dynamic has bits=2"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        GPTQConfig.from_dict(settings)


def test_files_decide_and_a_wish_that_differs_is_refused(made: Any) -> None:
    root, _ = made(QWEN, scale_dtype=torch.bfloat16)
    settings = json.loads((root / "config.json").read_text())["quantization_config"]
    AutoModelForCausalLM.from_pretrained(root, quantization_config=settings)
    with pytest.raises(InputError, match="says how files are"):
        AutoModelForCausalLM.from_pretrained(
            root, quantization_config={**settings, "group_size": 32}
        )


@pytest.mark.parametrize("last", [0, 10**6, -1])
def test_an_order_that_is_none_is_refused(last: int, made: Any, tmp_path: Path) -> None:
    root, _ = made(QWEN, shuffled=True)
    AutoModelForCausalLM.from_pretrained(root).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight_order"
    order = tensors[name].sort().values
    order[-1] = last
    save_file({**tensors, name: order}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="weight_order has to name each of 64 inputs once"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_zero_points_that_an_old_packer_may_have_damaged_are_told_once(
    made: Any, tmp_path: Path
) -> None:
    root, _ = made(QWEN, symmetric=False, group=32)
    damaged = change(root, tmp_path, {}, qzeros=lambda t: torch.full_like(t, -137))
    with pytest.warns(ZeroPointWarning, match=r"layers\.1\.mlp\.up_proj\.weight") as told:
        AutoModelForCausalLM.from_pretrained(damaged)
    assert len(told) == 1


def test_a_format_may_be_called_as_in_programs() -> None:
    assert GPTQConfig.from_dict({"format": "gptq_v2"}).checkpoint_format == "gptq_v2"
    both = {"format": "gptq_v2", "checkpoint_format": "gptq"}
    assert GPTQConfig.from_dict(both).checkpoint_format == "gptq"
    with pytest.raises(ConfigError, match="checkpoint_format='marlin'"):
        GPTQConfig.from_dict({"format": "marlin"})


def test_other_layouts_of_auto_round_are_refused() -> None:
    from quintet.quantization.request import read

    settings = {"quant_method": "auto-round", "bits": 4, "group_size": 64}
    assert read({**settings, "packing_format": "auto_round:auto_gptq"}).quant_method == "auto-round"
    with pytest.raises(UnsupportedModelError, match="packing_format='auto_round:auto_awq'"):
        read({**settings, "packing_format": "auto_round:auto_awq"})

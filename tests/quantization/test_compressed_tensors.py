"""Files of compressed-tensors, against that package: every scheme, made and read by it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import packers
from conformance.families import FAMILIES, Family
from quintet import AutoModelForCausalLM
from quintet.checkpoint import TensorInfo
from quintet.conversion import convert
from quintet.errors import CheckpointError, ConfigError, UnsupportedModelError
from quintet.ops.words import unpack_words
from quintet.quantization import Quantized, stored
from quintet.quantization.compressed import CompressedTensorsConfig
from quintet.quantization.compressed_formats import PackedFormat
from support import relative_error

# It logs with a package that is a dependency of it alone.
pytest.importorskip("loguru", reason="compressed-tensors cannot be imported without it")
compressors = pytest.importorskip("compressed_tensors.compressors")
quantization = pytest.importorskip("compressed_tensors.quantization")
utils = pytest.importorskip("compressed_tensors.quantization.utils")

IDS = torch.arange(1, 23).view(2, 11)
QWEN = FAMILIES[0]


def scheme_of(preset: str, **changes: Any) -> Any:
    scheme = quantization.preset_name_to_scheme(preset, ["Linear"])
    if changes:
        weights = scheme.weights.model_dump() | changes
        scheme = scheme.model_copy(update={"weights": type(scheme.weights)(**weights)})
    return scheme


def compress(weight: Tensor, scheme: Any, packing: str) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a matrix as the package makes them, and the weight as it reads them."""
    args, (rows, columns) = scheme.weights, weight.shape
    state: dict[str, Tensor] = {"weight": weight}
    strategy = str(args.strategy)
    if strategy == "tensor":
        low, high = weight.min().view(1), weight.max().view(1)
    elif strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    elif strategy == "block":
        padded = torch.nn.functional.pad(weight, (0, -columns % 128, 0, -rows % 128))
        blocks = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        index = torch.arange(columns) // args.group_size
        groups = [weight[:, index == g] for g in range(int(index.max()) + 1)]
        low = torch.stack([g.amin(1) for g in groups], 1)
        high = torch.stack([g.amax(1) for g in groups], 1)
    more = {}
    if strategy == "tensor_group":
        state["weight_global_scale"] = utils.generate_gparam(weight.min(), weight.max())
        more["global_scale"] = state["weight_global_scale"]
    scale, zero = utils.calculate_qparams(low, high, args, **more)
    state |= {"weight_scale": scale.to(weight.dtype) if not more else scale}
    state["weight_zero_point"] = zero
    compressor = compressors.BaseCompressor.get_value_from_registry(packing)
    made = compressor.compress(state, scheme)
    made = {name: tensor.detach().clone() for name, tensor in made.items()}
    return made, compressor.decompress(dict(made), scheme)["weight"].to(torch.float32)


SCHEMES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "w4a16": ("pack-quantized", "W4A16", {}),
    "w4a16-by-32": ("pack-quantized", "W4A16", {"group_size": 32}),
    "w4a16-asymmetric": ("pack-quantized", "W4A16_ASYM", {"group_size": 32}),
    "w4a16-ordered": ("pack-quantized", "W4A16", {"group_size": 32, "actorder": "weight"}),
    "w8a16": ("pack-quantized", "W8A16", {}),
    "w8a16-by-32": ("pack-quantized", "W8A16", {"strategy": "group", "group_size": 32}),
    "w8a16-asymmetric": (
        "pack-quantized",
        "W8A16",
        {"symmetric": False, "strategy": "channel", "group_size": None},
    ),
    "w8a8": ("int-quantized", "W8A8", {}),
    "w8a8-tensor": ("int-quantized", "W8A8", {"strategy": "tensor"}),
    "w8a8-asymmetric": ("int-quantized", "W8A8", {"symmetric": False}),
    "fp8": ("float-quantized", "FP8", {}),
    "fp8-dynamic": ("float-quantized", "FP8_DYNAMIC", {}),
    "fp8-block": ("float-quantized", "FP8_BLOCK", {}),
    "nvfp4": ("nvfp4-pack-quantized", "NVFP4A16", {}),
    "mxfp4": ("mxfp4-pack-quantized", "MXFP4A16", {}),
}
each_scheme = pytest.mark.parametrize("name", SCHEMES)


def settings_of(packing: str, scheme: Any) -> dict[str, Any]:
    group = json.loads(scheme.model_dump_json())
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "global_compression_ratio": 1.6,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.1",
        "config_groups": {"group_0": group},
    }


@each_scheme
@pytest.mark.parametrize("shape", [(24, 128), (200, 256)], ids=str)
def test_a_matrix_is_what_the_package_reads(name: str, shape: tuple[int, int]) -> None:
    packing, preset, changes = SCHEMES[name]
    scheme = scheme_of(preset, **changes)
    torch.manual_seed(0)
    tensors, meant = compress(torch.randn(shape), scheme, packing)
    held = check(settings_of(packing, scheme), tensors, meant)
    assert (held is None) == ("fp4" in name)


def check(settings: dict[str, Any], tensors: dict[str, Tensor], meant: Tensor) -> Any:
    """Read a matrix as files are read, compare it, and return what it is held as."""
    config, shape = CompressedTensorsConfig.from_dict(settings), tuple(meant.shape)
    infos = {
        f"a.{key}": TensorInfo(f"a.{key}", t.dtype, tuple(t.shape), Path("file"))
        for key, t in tensors.items()
    }
    (entry,) = stored({"a.weight": shape}, infos, config).values()
    one = entry.format
    assert one is not None
    assert {n: infos[n].shape for n, _ in entry.files.values()} == dict(entry.files.values())
    assert all(config.idle(n) for n in infos.keys() - {n for n, _ in entry.files.values()})
    found = {key: tensors[n.removeprefix("a.")] for key, (n, _) in entry.files.items()}
    parts = one.unpack("a.weight", found, shape)
    # They decode four-bit numbers in bfloat16.
    most = 4e-3 if one.name == "fp4" else 1e-6
    assert relative_error(one.decode(parts, shape, torch.float32), meant) < most
    held = one.model_format
    if held is not None:
        recast = one.recast(parts, shape, held)
        assert recast is not None
        assert all(part.is_contiguous() for part in recast.values())
        again = held.decode(recast, shape, torch.float32)
        assert relative_error(again, meant) < (4e-3 if held.name.startswith("int4") else 1e-6)
    return held


def test_inputs_may_be_in_an_order_of_their_own() -> None:
    # What releases of that package before 0.20 wrote.
    torch.manual_seed(0)
    scheme = scheme_of("W4A16_ASYM", group_size=32)
    order = torch.randperm(128)
    tensors, meant = compress(torch.randn(24, 128), scheme, "pack-quantized")
    numbers = unpack_words(tensors["weight_packed"], 4)
    tensors["weight_packed"] = packers.words(numbers[:, order], 4)
    tensors["weight_g_idx"] = (torch.arange(128) // 32)[order].to(torch.int32)
    settings = settings_of("pack-quantized", scheme)
    settings["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    check(settings, tensors, meant[:, order])


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(IDS).logits.float()  # type: ignore[no-any-return]


def written(family: Family, root: Path, name: str, **changes: Any) -> Any:
    packing, preset, more = SCHEMES[name]
    scheme = scheme_of(preset, **more)

    def pack(path: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, meant = compress(weight, scheme, packing)
        tensors["input_scale"] = torch.ones(1)
        return tensors, meant

    settings = settings_of(packing, scheme)
    return packers.packed_checkpoint(family, root, pack, settings, **family.rounded, **changes)


@pytest.mark.parametrize("name", ["w8a8", "w8a8-asymmetric", "fp8", "fp8-dynamic", "fp8-block"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in packers.WIDTHS], ids=repr)
def test_a_model_computes_with_what_its_files_mean(
    family: Family, name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    plain = written(family, tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert relative_error(logits_of(model), logits_of(plain)) < 2e-3
    held = [m for m in model.modules() if isinstance(m, Quantized)]
    # No CPU multiplies FP8.
    assert bool(held) == (not name.startswith("fp8"))
    assert ("quantization_config" in vars(model.config)) == bool(held)
    assert not [w for w in recwarn.list if "compressed" not in str(w.filename)]


@pytest.mark.parametrize("name", ["w4a16-by-32", "w4a16-asymmetric", "fp8-dynamic", "fp8-block"])
def test_what_is_held_is_saved_and_read_again(name: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16}
    written(QWEN, tmp_path / "theirs", name, **sizes)
    # `quintet convert` keeps FP8, whatever the machine multiplies.
    convert(tmp_path / "theirs", tmp_path / "ours")
    settings = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "quintet"
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / root, dtype="float32")
        for root in ("theirs", "ours")
    )
    assert torch.equal(logits_of(one), logits_of(other))


def test_embeddings_are_a_class_of_their_own() -> None:
    four, eight = {"num_bits": 4, "group_size": 32}, {"num_bits": 8, "strategy": "channel"}
    groups = {
        "group_0": {"targets": ["Embedding"], "weights": eight},
        "group_1": {"targets": ["Linear"], "weights": four},
    }
    config = CompressedTensorsConfig(format="pack-quantized", config_groups=groups)
    bits = {}
    for path in ("model.embed_tokens", "model.layers.0.mlp.up_proj"):
        name = f"{path}.weight"
        infos = {
            f"{name}_{part}": TensorInfo(f"{name}_{part}", dtype, (64, 8), Path("file"))
            for part, dtype in (("packed", torch.int32), ("scale", torch.float16))
        }
        found = config.stored(name, (64, 64), infos)
        assert isinstance(found, PackedFormat)
        bits[path] = found.bits
    assert list(bits.values()) == [8, 4]


def test_groups_of_modules_differ(tmp_path: Path) -> None:
    eight, four = scheme_of("W8A8"), scheme_of("W4A16_ASYM", group_size=32)

    def pack(path: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        if "down_proj" in path:
            return compress(weight, eight, "int-quantized")
        return compress(weight, four, "pack-quantized")

    settings = settings_of("mixed-precision", four)
    groups = settings["config_groups"]
    groups["group_0"] |= {"targets": ["Linear"], "format": "pack-quantized"}
    groups["group_1"] = {
        **json.loads(eight.model_dump_json()),
        "targets": [r"re:.*down_proj$"],
        "format": "int-quantized",
    }
    plain = packers.packed_checkpoint(QWEN, tmp_path, pack, settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert model.model.layers[0].mlp.down_proj.format.name == "int8"
    assert relative_error(logits_of(model), logits_of(plain)) < 2e-3


def test_experts_may_be_stacked(tmp_path: Path) -> None:
    moe = next(f for f in FAMILIES if f.name == "qwen2-moe")
    plain = written(moe, tmp_path, "w8a16-asymmetric", **packers.WIDTHS["qwen2-moe"])
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(plain.config.num_hidden_layers):
        path = f"model.layers.{layer}.mlp.experts."
        for stacked, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            for ending in ("packed", "scale", "zero_point"):
                of_experts = [
                    torch.cat([tensors.pop(f"{path}{e}.{p}_proj.weight_{ending}") for p in parts])
                    for e in range(plain.config.num_experts)
                ]
                tensors[f"{path}{stacked}_{ending}"] = torch.stack(of_experts)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert isinstance(model.model.layers[0].mlp.experts, Quantized)
    assert relative_error(logits_of(model), logits_of(plain)) < 2e-3


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"format": "marlin-24"}, UnsupportedModelError, "format='marlin-24'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, UnsupportedModelError, "sparsity"),
        ({"transform_config": {"config_groups": {"a": 1}}}, UnsupportedModelError, "transform"),
        ({"config_groups": [1]}, ConfigError, "config_groups"),
        ({"config_groups": {"a": 1}}, ConfigError, "has to be a mapping"),
        ({"config_groups": {"a" * 9_000: 1}}, ConfigError, r"a{20,90}…'?\] has to be a mapping"),
        ({"config_groups": {"a": {"weights": {"num_bits": 6}}}}, ConfigError, "num_bits=6"),
        (
            {"config_groups": {"a": {"targets": ["re:("]}}},
            ConfigError,
            "no plain regular expression",
        ),
        (
            {"config_groups": {"a": {"targets": ["re:" + "(?:.|.)" * 40]}}},
            ConfigError,
            "no plain regular expression",
        ),
        (
            {"config_groups": {"a": {"weights": {"strategy": "block"}}}},
            ConfigError,
            "needs a block_structure",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(
    change: dict[str, Any], error: type[Exception], said: str
) -> None:
    settings = {**settings_of("int-quantized", scheme_of("W8A8")), **change}
    with pytest.raises(error, match=said):
        CompressedTensorsConfig.from_dict(settings)


@pytest.mark.parametrize("form", ["w4a16-asymmetric", "w8a8-asymmetric"])
def test_zero_points_are_as_many_as_the_strategy_says(form: str, tmp_path: Path) -> None:
    written(QWEN, tmp_path, form, num_hidden_layers=1)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in list(tensors):
        if name.endswith("weight_scale"):
            tensors[name] = tensors[name].flatten()[:1].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"] |= {"strategy": "tensor", "group_size": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="zero points, and has to have one for the matrix"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"weight_scale": lambda t: None}, r"1 missing:\s+model.*weight_scale"),
        ({"weight_packed": lambda t: None}, r"1 missing:\s+model.*weight_packed"),
        ({"weight_zero_point": lambda t: None}, r"1 missing:\s+model.*weight_zero_point"),
        ({"weight_packed": lambda t: t[:, :-1].clone()}, r"weight_packed: expected"),
        ({"weight_shape": lambda t: t + 1}, r"weight_shape says \[97, 65\], and config"),
        ({"weight_scale": lambda t: t * float("inf")}, "scales that are not finite"),
    ],
)
def test_what_is_wrong_is_named(tensors: dict[str, Any], said: str, tmp_path: Path) -> None:
    written(QWEN, tmp_path, "w4a16-asymmetric", num_hidden_layers=1)
    held = load_file(tmp_path / "model.safetensors")
    for ending, make in tensors.items():
        name = f"model.layers.0.mlp.up_proj.{ending}"
        if (new := make(held.pop(name))) is not None:
            held[name] = new
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        AutoModelForCausalLM.from_pretrained(tmp_path)

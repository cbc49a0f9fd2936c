"""From a directory to a model and back: completely, or not at all with the tensors named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import quintet
from quintet.errors import (
    CheckpointError,
    InputError,
    ModelNotFoundError,
    UnsupportedBackendError,
)
from quintet.modeling.loading import NewHeadWarning, UnusedTensorWarning
from support import SMALL, small_config

CLASSES = [
    "Qwen2Model",
    "Qwen2ForCausalLM",
    "Qwen2ForSequenceClassification",
    "Qwen2ForTokenClassification",
    "Qwen2ForQuestionAnswering",
]
each_class = pytest.mark.parametrize("name", CLASSES)
each_size = pytest.mark.parametrize("size", ["5GB", "20KB"], ids=["one-file", "sharded"])
TINY = {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 40, "pad_token_id": 0}
IDS = torch.tensor([[5, 6, 7, 8, 9], [7, 9, 4, 3, 2]])


def made(name: str, **changes: Any) -> Any:
    model = getattr(quintet, name)(small_config(**TINY, **changes)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)
    return model


def saved(root: Path, name: str = "Qwen2ForCausalLM", **changes: Any) -> Any:
    model = made(name, **changes)
    model.save_pretrained(root)
    return model


def change(root: Path, **edits: torch.Tensor | None) -> None:
    """Replace tensors of a one-file checkpoint; None takes them out. Dots are written `__`."""
    weights = load_file(root / "model.safetensors")
    for key, tensor in edits.items():
        weights.pop(key.replace("__", "."), None)
        if tensor is not None:
            weights[key.replace("__", ".")] = tensor
    save_file(weights, root / "model.safetensors", {"format": "pt"})


def assert_same(ours: Any, theirs: Any) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for key in mine:
        assert torch.equal(mine[key], other[key]), key


def scores(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        out = model(IDS)
    return [out[key] for key in out if "logits" in key or key == "last_hidden_state"]


# -- load ∘ save = identity ------------------------------------------------------------------


@each_class
@each_size
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_is_saved_comes_back(tmp_path: Path, name: str, size: str, tied: bool) -> None:
    model = made(name, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors").is_file() == (size == "5GB")
    again = getattr(quintet, name).from_pretrained(tmp_path)
    assert_same(again, model)
    assert not again.training
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())
    assert all(torch.equal(x, y) for x, y in zip(scores(again), scores(model), strict=True))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == ([name], "float32")
    if tied and name == "Qwen2ForCausalLM":
        assert again.lm_head.weight is again.model.embed_tokens.weight


@each_class
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_reads_it_and_computes_the_same(tmp_path: Path, name: str, tied: bool) -> None:
    model = made(name, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    theirs, report = getattr(transformers, name).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values())
    for x, y in zip(scores(model), scores(theirs.eval()), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@each_class
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_transformers_saved_computes_the_same(tmp_path: Path, name: str, tied: bool) -> None:
    config = transformers.Qwen2Config(**{**SMALL, **TINY}, tie_word_embeddings=tied)
    theirs = getattr(transformers, name)(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    ours = getattr(quintet, name).from_pretrained(tmp_path)
    assert_same(ours, theirs)
    for x, y in zip(scores(ours), scores(theirs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_saving_over_another_checkpoint_replaces_all_of_it(tmp_path: Path) -> None:
    for size in ("20KB", "5GB", "20KB", "20KB"):
        model = made("Qwen2ForCausalLM")
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert_same(quintet.Qwen2ForCausalLM.from_pretrained(tmp_path), model)
        loaded, report = transformers.Qwen2ForCausalLM.from_pretrained(
            tmp_path, output_loading_info=True
        )
        assert not any(report.values())
        assert_same(model, loaded)


def test_only_weights_are_written(tmp_path: Path) -> None:
    model = saved(tmp_path, tie_word_embeddings=True)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == {n for n, _ in model.named_parameters()}
    assert not any("rotary" in name or "lm_head" in name for name in names)
    with pytest.raises(InputError, match="pickled weights are never written"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(InputError, match="pickled weights are never read"):
        quintet.Qwen2Model.from_pretrained(tmp_path, use_safetensors=False)


def test_a_state_dict_is_written_in_place_of_the_own_one(tmp_path: Path) -> None:
    model = made("Qwen2Model")
    doubled = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=doubled)
    again = quintet.Qwen2Model.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in doubled.items())


# -- other heads -----------------------------------------------------------------------------


def test_the_base_of_a_language_model(tmp_path: Path) -> None:
    model = saved(tmp_path)
    assert_same(quintet.Qwen2Model.from_pretrained(tmp_path), model.model)


def test_a_language_model_needs_its_head_unless_tied(tmp_path: Path) -> None:
    saved(tmp_path, "Qwen2Model")
    with pytest.raises(
        CheckpointError, match=r"1 missing:\n  lm_head\.weight: expected \[40, 32\]"
    ):
        quintet.Qwen2ForCausalLM.from_pretrained(tmp_path)
    tied = quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_a_tied_tensor_may_be_there_under_its_second_name_alone(tmp_path: Path) -> None:
    model = saved(tmp_path, tie_word_embeddings=True)
    table = model.lm_head.weight.detach()
    change(tmp_path, model__embed_tokens__weight=None, lm_head__weight=table)
    assert_same(quintet.Qwen2ForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("source", ["Qwen2ForCausalLM", "Qwen2Model"])
@pytest.mark.parametrize(
    ("name", "head"),
    [
        pytest.param("Qwen2ForSequenceClassification", ["score.weight"], id="sequence"),
        pytest.param("Qwen2ForTokenClassification", ["score.bias", "score.weight"], id="token"),
        pytest.param(
            "Qwen2ForQuestionAnswering", ["qa_outputs.bias", "qa_outputs.weight"], id="answer"
        ),
    ],
)
def test_a_new_head_starts_fresh_and_is_named(
    tmp_path: Path, source: str, name: str, head: list[str]
) -> None:
    model = saved(tmp_path, source, initializer_range=0.5)
    with pytest.warns(NewHeadWarning, match="has to be trained") as caught:
        ours = getattr(quintet, name).from_pretrained(tmp_path, num_labels=2)
    assert len(caught) == 1
    assert all(tensor in str(caught[0].message) for tensor in head)
    assert_same(ours.base_model, model.base_model)
    fresh = dict(ours.named_parameters())
    assert sorted(set(fresh) - {n for n in fresh if n.startswith(("model.", "tr"))}) == head
    assert 0.3 < float(fresh[head[-1]].detach().std()) < 0.7
    assert len(head) == 1 or not fresh[head[0]].any()


def test_the_number_of_labels_can_be_chosen(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.warns(NewHeadWarning):
        model = quintet.Qwen2ForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
    assert (model.score.out_features, model.config.num_labels) == (7, 7)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(
        CheckpointError, match=r"score\.weight: expected \[3, 32\], found \[7, 32\]"
    ):
        quintet.Qwen2ForSequenceClassification.from_pretrained(tmp_path / "trained", num_labels=3)


def test_a_head_that_is_there_in_part_keeps_that_part(tmp_path: Path) -> None:
    model = saved(tmp_path, "Qwen2ForSequenceClassification")
    with pytest.warns(NewHeadWarning, match=r"has no score\.bias: this head"):
        tokens = quintet.Qwen2ForTokenClassification.from_pretrained(tmp_path)
    assert torch.equal(tokens.score.weight, model.score.weight)
    assert not tokens.score.bias.any()


# -- what does not fit is named --------------------------------------------------------------


def test_a_missing_and_a_misshapen_tensor_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    change(tmp_path, model__norm__weight=None, model__layers__0__self_attn__k_proj__bias=None)
    with pytest.raises(CheckpointError) as error:
        quintet.Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert "2 missing" in str(error.value)
    assert "model.norm.weight: expected [32]" in str(error.value)
    assert "model.layers.0.self_attn.k_proj.bias: expected [16]" in str(error.value)
    saved(tmp_path)
    change(tmp_path, model__norm__weight=torch.ones(31))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: expected \[32\], found \[31"):
        quintet.Qwen2ForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"norm\.weight: expected \[32\], found \[31\]"):
        quintet.Qwen2Model.from_pretrained(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    made("Qwen2ForCausalLM").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=shard.name):
        quintet.Qwen2ForCausalLM.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"1 is missing:\n  {shard.name}"):
        quintet.Qwen2ForCausalLM.from_pretrained(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"never read(.|\n)*pytorch_model\.bin"):
        quintet.Qwen2ForCausalLM.from_pretrained(tmp_path)


def test_tensors_without_a_place_are_pointed_out(tmp_path: Path) -> None:
    model = saved(tmp_path)
    change(tmp_path, model__layers__7__odd=torch.ones(2))
    with pytest.warns(UnusedTensorWarning, match=r"1 tensors .*\n  model\.layers\.7\.odd"):
        again = quintet.Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert_same(again, model)


def test_a_file_an_empty_folder_and_no_folder(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    for path, reason in (
        (tmp_path / "model" / "model.safetensors", r"is a file.*did you mean '.*/model'"),
        (tmp_path, r"has no config\.json"),
        (tmp_path / "nothing", "no directory"),
    ):
        with pytest.raises(ModelNotFoundError, match=reason):
            quintet.Qwen2ForCausalLM.from_pretrained(path)
    shutil.move(tmp_path / "model", tmp_path / "repository" / "inner")
    quintet.Qwen2Model.from_pretrained(tmp_path / "repository", subfolder="inner")


# -- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keyword", "nearest"),
    [
        ("dtypes", "dtype"),
        ("devce_map", "device_map"),
        ("atn_implementation", "attn_implementation"),
        ("num_label", "num_labels"),
    ],
)
def test_a_misspelt_option_is_named_with_the_nearest(
    tmp_path: Path, keyword: str, nearest: str
) -> None:
    saved(tmp_path)
    with pytest.raises(InputError, match=f"no option '{keyword}'.*did you mean '{nearest}'"):
        quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, **{keyword: "x"})


def test_a_config_in_place_of_the_checkpoints(tmp_path: Path) -> None:
    saved(tmp_path)
    config = small_config(**TINY, attn_implementation="eager")
    model = quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, config=config)
    assert model.config.attn_implementation == "eager"
    assert model.config is not config
    with pytest.raises(InputError, match="vocab_size: give either a config or keys"):
        quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, config=config, vocab_size=40)
    eager = quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.config.attn_implementation == "eager"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, torch.bfloat16, id="as-saved"),
        pytest.param({"dtype": "auto"}, torch.bfloat16, id="auto"),
        pytest.param({"dtype": None}, torch.float32, id="none"),
        pytest.param({"dtype": "float16"}, torch.float16, id="text"),
        pytest.param({"dtype": "torch.float32"}, torch.float32, id="text-with-torch"),
        pytest.param({"dtype": torch.float64}, torch.float64, id="dtype"),
        pytest.param({"torch_dtype": torch.float32}, torch.float32, id="torch_dtype"),
        pytest.param({"torch_dtype": "auto"}, torch.bfloat16, id="torch_dtype-auto"),
    ],
)
@pytest.mark.parametrize("told", [True, False], ids=["config-tells", "weights-tell"])
def test_dtype(tmp_path: Path, options: Any, expected: torch.dtype, told: bool) -> None:
    model = made("Qwen2ForCausalLM").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    if not told:
        config = json.loads((tmp_path / "config.json").read_text())
        del config["dtype"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    again = quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, **options)
    assert {p.dtype for p in again.parameters()} == {expected} == {again.dtype}
    assert again.config.torch_dtype is expected
    assert again.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(again.model.norm.weight, model.model.norm.weight.to(expected))


@pytest.mark.parametrize("dtype", ["bf16", "int8", torch.int8, torch.float8_e4m3fn, 5], ids=str)
def test_a_dtype_that_does_not_compute_is_refused(tmp_path: Path, dtype: Any) -> None:
    saved(tmp_path)
    with pytest.raises(InputError, match="has to be 'auto' or one of"):
        quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    with pytest.raises(InputError, match="are one option; give dtype alone"):
        quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, dtype="float16", torch_dtype=dtype)


@pytest.mark.parametrize(
    "device_map",
    [None, "cpu", torch.device("cpu"), {"": "cpu"}, {"": torch.device("cpu")}],
    ids=str,
)
def test_device_map_names_one_device(tmp_path: Path, device_map: Any) -> None:
    saved(tmp_path)
    model = quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert {p.device.type for p in model.parameters()} == {"cpu"} == {model.device.type}
    assert model.model.rotary_emb.inv_freq.device.type == "cpu"


@pytest.mark.parametrize(
    "device_map",
    ["disk", "meta", "cuda:99", 99, {"model": "cpu", "lm_head": 0}, {}, ["cpu"]],
    ids=str,
)
def test_a_device_map_that_cannot_be_followed_is_named(tmp_path: Path, device_map: Any) -> None:
    with pytest.raises(UnsupportedBackendError, match="device_map"):
        quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, device_map=device_map)

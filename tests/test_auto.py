"""From a directory or a hub id to the right class, offline."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import quintet
from quintet import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from quintet.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    ModelNotFoundError,
    OfflineError,
    UnsupportedModelError,
)
from quintet.modeling.loading import NewHeadWarning

HEADS = {
    "AutoModel": "Qwen2Model",
    "AutoModelForCausalLM": "Qwen2ForCausalLM",
    "AutoModelForQuestionAnswering": "Qwen2ForQuestionAnswering",
    "AutoModelForSequenceClassification": "Qwen2ForSequenceClassification",
    "AutoModelForTokenClassification": "Qwen2ForTokenClassification",
}
EVERY_HEAD = pytest.mark.parametrize(("auto", "expected"), HEADS.items(), ids=HEADS)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def saved(root: Path, config: dict[str, Any]) -> Path:
    root.mkdir(exist_ok=True)
    (root / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return root


@pytest.fixture
def hub(chat_model: Path, tmp_path: Path) -> Path:
    """A hub cache as a download leaves it: blobs, a snapshot of links to them, and a branch."""
    repo = tmp_path / "hub" / "models--owner--name"
    snapshot = repo / "snapshots" / COMMIT
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(chat_model.iterdir())):
        blob = repo / "blobs" / f"{number:040x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return repo.parent


# -- directories -----------------------------------------------------------------------------


@EVERY_HEAD
def test_a_checkpoint_of_each_head_loads_as_saved(auto: str, expected: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = getattr(quintet, auto).from_config(config)
    assert type(model).__name__ == expected
    model.save_pretrained(tmp_path)
    again = getattr(quintet, auto).from_pretrained(tmp_path)
    assert type(again).__name__ == expected
    assert not again.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize("auto", [name for name in HEADS if name.startswith("AutoModelForS")])
def test_a_head_the_checkpoint_lacks_is_new_and_told(auto: str, chat_model: Path) -> None:
    with pytest.warns(NewHeadWarning, match=r"score\.weight.*has to be trained"):
        model = getattr(quintet, auto).from_pretrained(chat_model, num_labels=3)
    assert model.num_labels == 3


def test_a_base_model_loads_from_a_checkpoint_with_a_head(chat_model: Path) -> None:
    base = AutoModel.from_pretrained(chat_model)
    whole = AutoModelForCausalLM.from_pretrained(str(chat_model))
    assert torch.equal(base.state_dict()["norm.weight"], whole.state_dict()["model.norm.weight"])


def test_a_config_can_be_given(chat_model: Path) -> None:
    config = AutoConfig.from_pretrained(chat_model, num_hidden_layers=1)
    with pytest.warns(UserWarning, match="no place for"):
        model = AutoModelForCausalLM.from_pretrained(chat_model, config=config)
    assert len(model.get_submodule("model.layers")) == 1


@pytest.mark.parametrize("wrong", [5, [], True], ids=str)
def test_what_is_no_config_is_named(wrong: Any, chat_model: Path) -> None:
    with pytest.raises(InputError, match="config is a "):
        AutoModelForCausalLM.from_pretrained(chat_model, config=wrong)
    with pytest.raises(InputError, match="config is a "):
        AutoModelForCausalLM.from_config(wrong)
    with pytest.raises(UnsupportedModelError, match="model_type=None"):
        AutoModelForCausalLM.from_config({})  # type: ignore[arg-type]


def test_the_tokenizer_is_that_of_the_checkpoint(chat_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    assert tokenizer.decode(tokenizer.encode("Hello 🙂")) == "Hello 🙂"
    assert tokenizer.name_or_path == str(chat_model)


def test_a_subfolder_is_a_model(chat_model: Path) -> None:
    where = {"subfolder": chat_model.name}
    assert AutoConfig.from_pretrained(chat_model.parent, **where).model_type == "qwen2"
    assert AutoTokenizer.from_pretrained(chat_model.parent, **where).vocab_size
    assert AutoModelForCausalLM.from_pretrained(chat_model.parent, **where).config.hidden_size == 32


@pytest.mark.parametrize("outside", ["..", "../..", "/"])
def test_a_subfolder_does_not_lead_out(chat_model: Path, outside: str) -> None:
    with pytest.raises(ModelNotFoundError, match="leads out"):
        AutoConfig.from_pretrained(chat_model, subfolder=outside)


def test_the_familiar_recipe_of_a_chat(chat_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(chat_model, device_map="auto", torch_dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    messages = [{"role": "user", "content": "Hello there"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    model_inputs = tokenizer([text], return_tensors="pt").to(model.device)
    generated_ids = model.generate(model_inputs.input_ids, max_new_tokens=30, do_sample=True)
    generated_ids = [
        output_ids[len(input_ids) :]
        for input_ids, output_ids in zip(model_inputs.input_ids, generated_ids, strict=True)
    ]
    (response,) = tokenizer.batch_decode(generated_ids, skip_special_tokens=True)
    assert response == tokenizer.decode(generated_ids[0].tolist(), skip_special_tokens=True)
    assert 0 < len(generated_ids[0]) <= 30


# -- what is not a model ---------------------------------------------------------------------


@EVERY_HEAD
def test_an_unknown_family_is_named(auto: str, expected: str, tmp_path: Path) -> None:
    saved(tmp_path, {"model_type": "gpt2"})
    with pytest.raises(UnsupportedModelError, match=r"model_type='gpt2' is not supported.*qwen2"):
        getattr(quintet, auto).from_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="model_type=''"):
        getattr(quintet, auto).from_config(PreTrainedConfig())


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({}, UnsupportedModelError, "has no model_type; there are deepseek_v2, "),
        ({"model_type": ["qwen2"]}, UnsupportedModelError, r"model_type=\['qwen2'\]"),
        ({"model_type": None}, UnsupportedModelError, "model_type=None"),
        ([], CheckpointError, "JSON object, not list"),
        ({"model_type": "qwen2", "hidden_size": -1}, ConfigError, "hidden_size=-1"),
    ],
)
def test_a_config_that_is_none_is_named(
    config: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        AutoConfig.from_pretrained(saved(tmp_path, config))


def test_a_directory_without_a_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ModelNotFoundError, match=r"has no config\.json; it is not a model"):
            auto.from_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match="tokenizer"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_a_file_is_not_a_model_but_its_directory(chat_model: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=rf"is a file.*did you mean '{chat_model}'"):
        AutoModelForCausalLM.from_pretrained(chat_model / "model.safetensors")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "..", "own er/name", ""])
def test_what_is_neither_path_nor_hub_id_is_not_looked_up(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError) as caught:
        AutoConfig.from_pretrained(name)
    assert not isinstance(caught.value, OfflineError)


def test_a_misspelt_option_is_named(chat_model: Path) -> None:
    with pytest.raises(InputError, match=r"'dtipe'.*did you mean 'dtype'"):
        AutoModelForCausalLM.from_pretrained(chat_model, dtipe="float32")
    with pytest.raises(InputError, match="did you mean 'padding_side'"):
        AutoTokenizer.from_pretrained(chat_model, paddingside="left")


@pytest.mark.parametrize("auto", [*HEADS, "AutoTokenizer"])
def test_an_auto_class_is_not_an_object(auto: str) -> None:
    with pytest.raises(InputError, match="use from_pretrained"):
        getattr(quintet, auto)()


# -- hub ids, offline ------------------------------------------------------------------------


@pytest.mark.parametrize("auto", [AutoConfig, AutoTokenizer, AutoModelForCausalLM])
def test_a_hub_id_that_is_not_there_says_that_offline_mode_is_set(auto: Any, hub: Path) -> None:
    with pytest.raises(OfflineError, match=r"'owner/other'.*offline mode is set"):
        auto.from_pretrained("owner/other", cache_dir=hub)


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_hub_id_in_the_cache_loads(hub: Path, revision: str | None) -> None:
    where: dict[str, Any] = {"cache_dir": hub, "revision": revision}
    assert AutoConfig.from_pretrained("owner/name", **where).name_or_path == "owner/name"
    tokenizer = AutoTokenizer.from_pretrained("owner/name", **where)
    model = AutoModelForCausalLM.from_pretrained("owner/name", **where)
    ids = tokenizer("Hello", return_tensors="pt")
    assert model.generate(**ids).shape[1] == ids["input_ids"].shape[1] + 20


def test_a_revision_that_is_not_there_is_named(hub: Path) -> None:
    with pytest.raises(OfflineError, match="at revision 'v2'"):
        AutoConfig.from_pretrained("owner/name", cache_dir=hub, revision="v2")


def test_local_files_only_is_offline_too(hub: Path) -> None:
    where: dict[str, Any] = {"cache_dir": hub, "local_files_only": True}
    assert AutoModelForCausalLM.from_pretrained("owner/name", **where)
    with pytest.raises(OfflineError, match="local_files_only"):
        AutoModelForCausalLM.from_pretrained("owner/other", **where)


def test_a_directory_wins_over_a_hub_id(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    saved(tmp_path / "owner" / "name", {"model_type": "qwen2", "vocab_size": 5})
    assert AutoConfig.from_pretrained("owner/name", cache_dir=hub).vocab_size == 5


def test_the_variables_of_the_hub_are_obeyed(hub: Path) -> None:
    code = "import quintet; print(quintet.AutoConfig.from_pretrained('owner/name').hidden_size)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "32\n"

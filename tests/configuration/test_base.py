"""What all configurations share: files, unknown keys, overrides, labels, errors."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet import AutoConfig, Qwen2Config
from quintet.configuration.base import UnknownKeyWarning
from quintet.errors import CheckpointError, ConfigError, ModelNotFoundError, SaveError
from support import small_config


def written(root: Path, **values: Any) -> Path:
    (root / "config.json").write_text(json.dumps({"model_type": "qwen2", **values}))
    return root


# -- files -----------------------------------------------------------------------------------


def test_a_saved_configuration_comes_back_equal(tmp_path: Path) -> None:
    config = small_config(
        rope_scaling={"type": "yarn", "factor": 4.0},
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=1,
        num_labels=3,
        eos_token_id=[5, 7],
        pad_token_id=0,
        dtype=torch.bfloat16,
        tie_word_embeddings=True,
        problem_type="regression",
        something={"nested": [1, None, {"deep": True}]},
    )
    config.save_pretrained(tmp_path / "new" / "folder")
    again = Qwen2Config.from_pretrained(tmp_path / "new" / "folder")
    assert again.name_or_path == str(tmp_path / "new" / "folder")
    again.name_or_path = ""
    assert again == config
    assert again.something == {"nested": [1, None, {"deep": True}]}
    assert Qwen2Config.from_dict(config.to_dict()) == config


def test_to_dict_is_a_copy() -> None:
    config = small_config(extra=[1])
    config.to_dict()["extra"].append(2)
    config.to_dict()["rope_parameters"]["rope_theta"] = 1.0
    assert config.extra == [1]
    assert config.rope_theta == 10_000


def test_a_file_holds_both_vintages_of_names(tmp_path: Path) -> None:
    small_config(rope_theta=5.0, rope_scaling={"type": "linear", "factor": 2.0}).save_pretrained(
        tmp_path
    )
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["rope_theta"] == 5.0
    assert values["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert values["rope_parameters"] == {**values["rope_scaling"], "rope_theta": 5.0}
    assert not {"name_or_path", "attn_implementation", "layer_types", "head_dim"} & set(values)


def test_unknown_keys_survive_a_round_trip_without_a_word(tmp_path: Path) -> None:
    unknown = {"transformers_version": "9", "hiden_size": 3, "auto_map": {"AutoModel": "m.Evil"}}
    config = Qwen2Config.from_pretrained(written(tmp_path, **unknown))
    config.save_pretrained(tmp_path / "again")
    values = json.loads((tmp_path / "again" / "config.json").read_text())
    assert unknown.items() <= values.items()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        pytest.param("[1]", CheckpointError, id="not-an-object"),
        pytest.param('{"a": ', CheckpointError, id="cut-off"),
        pytest.param("[" * 100_000, CheckpointError, id="deep"),
        pytest.param('{"hidden_size": %s}' % ("9" * 5000), CheckpointError, id="long-number"),
        pytest.param('{"initializer_range": NaN}', ConfigError, id="nan"),
        pytest.param('{"rms_norm_eps": 1e999}', ConfigError, id="infinity"),
        pytest.param('{"num_hidden_layers": 1000000000000}', ConfigError, id="memory"),
        pytest.param('{"model_type": "llama"}', ConfigError, id="other-family"),
        pytest.param('{"model_type": ["qwen2"]}', ConfigError, id="type-not-text"),
    ],
)
def test_a_bad_file_is_refused_by_a_typed_error(
    tmp_path: Path, text: str, error: type[Exception]
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(error):
        Qwen2Config.from_pretrained(tmp_path)


def test_a_folder_without_one_and_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is empty"):
        Qwen2Config.from_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no directory"):
        Qwen2Config.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match="is a file"):
        Qwen2Config.from_pretrained(written(tmp_path) / "config.json")


def test_saving_is_whole_or_not_at_all(tmp_path: Path) -> None:
    small_config().save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        small_config(hidden_act=torch.relu).save_pretrained(tmp_path)
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        small_config(extra=loop).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    with pytest.raises(SaveError, match="is a file"):
        small_config().save_pretrained(tmp_path / "config.json")


# -- what a file may not do ------------------------------------------------------------------


def test_a_file_cannot_reach_internals(tmp_path: Path) -> None:
    hostile = {
        "__class__": "str",
        "__dict__": {},
        "_labels": 1,
        "to_dict": "x",
        "validate": None,
        "windows": 5,
        "model_type": "qwen2",
        "auto_map": {"AutoConfig": "evil.Config"},
    }
    config = AutoConfig.from_pretrained(written(tmp_path, **hostile))
    assert type(config) is Qwen2Config
    config.validate()
    assert config.windows() == [None] * 32
    values = config.to_dict()
    assert not {"__class__", "__dict__", "_labels", "to_dict", "validate", "windows"} & set(values)
    assert values["auto_map"] == hostile["auto_map"]


# -- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [torch.bfloat16, "bfloat16", "torch.bfloat16"], ids=str)
def test_dtype_has_two_names_and_two_forms(key: str, value: Any) -> None:
    config = Qwen2Config(**{key: value})
    assert config.dtype == "bfloat16"
    assert config.torch_dtype is torch.bfloat16
    assert config.to_dict()["dtype"] == "bfloat16"
    assert Qwen2Config.from_dict({"torch_dtype": "float16"}, **{key: value}) == config


def test_labels_follow_from_their_number_and_the_other_way_round() -> None:
    config = Qwen2Config(num_labels=3)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    config = Qwen2Config(id2label={"0": "no", "1": "yes", "2": "both", "3": "?"})
    assert config.num_labels == 4
    assert config.id2label[2] == "both"
    assert config.label2id["both"] == 2
    config.num_labels = 1
    assert config.id2label == {0: "LABEL_0"}
    assert Qwen2Config().num_labels == 2


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"num_labels": 0}, id="none"),
        pytest.param({"num_labels": True}, id="bool"),
        pytest.param({"num_labels": 10**12}, id="memory"),
        pytest.param({"num_labels": 3, "id2label": {0: "a"}}, id="contradiction"),
        pytest.param({"id2label": {"x": "a"}}, id="no-number"),
        pytest.param({"id2label": {None: "a"}}, id="null"),
        pytest.param({"id2label": ["a"]}, id="list"),
        pytest.param({"label2id": {"a": "b"}}, id="label2id"),
        pytest.param({"label2id": 3}, id="label2id-number"),
    ],
)
def test_bad_labels_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"num_labels|id2label|label2id"):
        Qwen2Config(**values)


# -- overrides -------------------------------------------------------------------------------


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    root = written(
        tmp_path,
        hidden_size=64,
        num_hidden_layers=4,
        layer_types=["full_attention"] * 4,
        id2label={"0": "a"},
        label2id={"a": 0},
        torch_dtype="float32",
        mine=1,
    )
    config = Qwen2Config.from_pretrained(
        root, hidden_size=128, num_hidden_layers=2, num_labels=5, mine=2, torch_dtype="bfloat16"
    )
    assert (config.hidden_size, config.num_hidden_layers, config.mine) == (128, 2, 2)
    assert config.layer_types == ["full_attention"] * 2
    assert (config.num_labels, len(config.label2id), config.dtype) == (5, 5, "bfloat16")
    named = Qwen2Config.from_pretrained(root, id2label={0: "x", 1: "y"})
    assert named.label2id == {"x": 0, "y": 1}


@pytest.mark.parametrize("value", ["x", -1, 2.5, None, [1]], ids=repr)
def test_a_bad_override_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        Qwen2Config.from_dict({"layer_types": ["full_attention"] * 32}, num_hidden_layers=value)


def test_only_the_callers_own_misspelling_warns() -> None:
    with pytest.warns(UnknownKeyWarning, match="'hiden_size'.*did you mean 'hidden_size'"):
        Qwen2Config(hiden_size=3)
    with pytest.warns(UnknownKeyWarning, match="'num_hidden_layer'"):
        Qwen2Config.from_dict({}, num_hidden_layer=3)
    Qwen2Config.from_dict({"hiden_size": 3})
    Qwen2Config.from_dict({"hiden_size": 3}, hiden_size=4)


# -- any value for any key -------------------------------------------------------------------

KEYS = [*Qwen2Config.accepted_keys(), "torch_dtype", "model_type", "anything", "_private"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.sampled_from([0, 1, 2, -1, 10**400, 1e999, "default", "yarn", "linear", "llama3"])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rope_type", "type", "factor", "rope_theta", "0"]), inner, max_size=4
        )
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    file=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3),
    overrides=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=2),
)
def test_any_value_for_any_key_gives_a_configuration_or_a_config_error(
    file: dict[str, Any], overrides: dict[str, Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = Qwen2Config.from_dict(file, **overrides)
        except ConfigError:
            return
        assert Qwen2Config.from_dict(json.loads(config.to_json_string())).hidden_size >= 1
        repr(config)

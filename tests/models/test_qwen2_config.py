"""Qwen2Config: the documented defaults, the rules between keys, and files that travel both ways."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quintet import Qwen2Config, Qwen2Model
from quintet.configuration.base import UnknownKeyWarning
from quintet.errors import ConfigError
from support import SMALL, small_config

DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "use_cache": True,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "attention_dropout": 0.0,
}
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(("key", "value"), DEFAULTS.items(), ids=DEFAULTS)
def test_documented_default(key: str, value: Any) -> None:
    signature = inspect.signature(Qwen2Config)
    assert signature.parameters[key].default == value
    assert type(signature.parameters[key].default) is type(value)
    # The window's size is only there while it is used.
    config = Qwen2Config(use_sliding_window=True) if key == "sliding_window" else Qwen2Config()
    assert getattr(config, key) == value


def test_what_the_page_calls_with_works() -> None:
    config = small_config()
    assert Qwen2Model(config).config == config
    assert Qwen2Config.model_type == "qwen2"
    assert Qwen2Config().to_dict()["model_type"] == "qwen2"


def test_heads_that_are_not_given_follow() -> None:
    config = Qwen2Config(num_attention_heads=16, num_key_value_heads=None)
    assert (config.num_key_value_heads, config.head_dim) == (16, 256)
    assert Qwen2Config(hidden_size=30, num_attention_heads=32, head_dim=6).head_dim == 6


@pytest.mark.parametrize(
    ("values", "named"),
    [
        pytest.param({"hidden_size": 65}, "hidden_size=65 .*num_attention_heads=4", id="width"),
        pytest.param(
            {"num_key_value_heads": 3}, "num_key_value_heads=3 .*num_attention_heads=4", id="kv"
        ),
        pytest.param({"hidden_size": 12}, "head_dim=3 .*even", id="odd-head"),
        pytest.param({"hidden_size": -64}, "hidden_size=-64 .*at least 1", id="negative"),
        pytest.param({"vocab_size": 0}, "vocab_size=0 .*at least 1", id="no-vocabulary"),
        pytest.param({"num_hidden_layers": True}, "num_hidden_layers=True .*integer", id="bool"),
        pytest.param({"num_hidden_layers": 10**12}, "num_hidden_layers=1000", id="layers"),
        pytest.param({"intermediate_size": 96.0}, "intermediate_size=96.0 .*integer", id="float"),
        pytest.param({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan .*finite", id="nan"),
        pytest.param({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0 .*greater than 0", id="eps"),
        pytest.param({"attention_dropout": 1.5}, "attention_dropout=1.5 .*at most 1", id="dropout"),
        pytest.param({"use_cache": 1}, "use_cache=1 .*true or false", id="int-for-bool"),
        pytest.param({"hidden_act": "swishy"}, "hidden_act='swishy' .*'silu'", id="activation"),
        pytest.param({"hidden_act": 5}, "hidden_act=5 .*string or a function", id="act-number"),
        pytest.param(
            {"pad_token_id": 101}, "pad_token_id=101 .*less than vocab_size=101", id="pad"
        ),
        pytest.param({"pad_token_id": -1}, "pad_token_id=-1 .*at least 0", id="pad-negative"),
        pytest.param({"eos_token_id": [1, -2]}, r"eos_token_id=\[1, -2\]", id="eos"),
        pytest.param(
            {"layer_types": [FULL] * 2}, "layer_types=.*num_hidden_layers=3", id="too-few-types"
        ),
        pytest.param({"layer_types": [FULL, FULL, "mamba"]}, "layer_types=.*'mamba'", id="type"),
        pytest.param(
            {"layer_types": [SLIDING] * 3}, "sliding_window=None .*use_sliding_window", id="window"
        ),
        pytest.param(
            {"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0", id="window-zero"
        ),
        pytest.param({"dtype": "int8"}, "dtype='int8' .*bfloat16", id="dtype"),
        pytest.param({"attn_implementation": "fast"}, "attn_implementation='fast'", id="backend"),
        pytest.param({"problem_type": "ranking"}, "problem_type='ranking'", id="problem"),
    ],
)
def test_a_broken_rule_is_named_with_key_value_and_rule(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        small_config(**values)


@pytest.mark.parametrize(
    ("values", "windows"),
    [
        pytest.param({}, [None] * 3, id="off"),
        pytest.param({"sliding_window": 5, "max_window_layers": 0}, [None] * 3, id="size-alone"),
        pytest.param({"use_sliding_window": True}, [None] * 3, id="above-all-layers"),
        pytest.param(
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
            [None, None, 5],
            id="top-layer",
        ),
        pytest.param(
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
            [5] * 3,
            id="all",
        ),
        pytest.param({"use_sliding_window": True, "max_window_layers": 0}, [4096] * 3, id="4096"),
        pytest.param(
            {"use_sliding_window": True, "sliding_window": 5, "layer_types": [SLIDING, FULL, FULL]},
            [5, None, None],
            id="spelt-out",
        ),
    ],
)
def test_layer_i_slides_from_max_window_layers_on(
    values: dict[str, Any], windows: list[int | None]
) -> None:
    config = small_config(**values)
    assert config.windows() == windows
    assert [layer.self_attn.window for layer in Qwen2Model(config).layers] == windows
    theirs = transformers.Qwen2Config(**{**SMALL, **values})
    assert theirs.layer_types == config.layer_types
    assert theirs.sliding_window == config.sliding_window


def test_a_window_that_is_switched_on_needs_a_size() -> None:
    with pytest.raises(ConfigError, match=r"sliding_window=None .* use_sliding_window is true"):
        small_config(use_sliding_window=True, sliding_window=None)


def test_switching_the_window_on_wins_over_the_layers_of_a_file() -> None:
    saved = {**small_config().to_dict(), "layer_types": [FULL] * 3}
    config = Qwen2Config.from_dict(
        saved, use_sliding_window=True, sliding_window=5, max_window_layers=1
    )
    assert config.windows() == [None, 5, 5]


def test_what_a_constructor_cannot_keep_is_told() -> None:
    with pytest.raises(ConfigError, match="model_type='llama'"):
        Qwen2Config(model_type="llama")
    for key in ("_private", "validate"):
        with pytest.warns(UnknownKeyWarning, match=f"{key!r}; it is left out"):
            Qwen2Config(**{key: 1})


# -- both directions with Transformers -------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CASES = [
    pytest.param({}, id="small"),
    pytest.param({"rope_theta": 1e6}, id="theta"),
    pytest.param({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, id="linear"),
    pytest.param({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, id="dynamic"),
    pytest.param({"rope_scaling": YARN, "rope_theta": 5e5}, id="yarn"),
    pytest.param(
        {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False}},
        id="yarn-mscale",
    ),
    pytest.param(
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        id="llama3",
    ),
    pytest.param(
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, id="sliding"
    ),
    pytest.param(
        {"tie_word_embeddings": True, "pad_token_id": 3, "eos_token_id": [5, 6], "bos_token_id": 1},
        id="tokens",
    ),
    pytest.param({"id2label": {0: "a", 1: "b", 2: "c"}, "problem_type": "regression"}, id="labels"),
    pytest.param({"hidden_act": "gelu", "attention_dropout": 0.1, "use_cache": False}, id="other"),
]
COMPARED = [
    *(key for key in DEFAULTS if key != "rope_theta"),
    "layer_types",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "id2label",
    "num_labels",
    "problem_type",
    "rope_parameters",
]


def assert_equal(ours: Qwen2Config, theirs: Any) -> None:
    for key in COMPARED:
        assert getattr(ours, key) == getattr(theirs, key), key


def deep(values: dict[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = json.loads(json.dumps(values))
    if "id2label" in copied:
        copied["id2label"] = {int(key): name for key, name in copied["id2label"].items()}
    return copied


@pytest.mark.parametrize("values", CASES)
def test_transformers_reads_what_is_written_here(tmp_path: Path, values: dict[str, Any]) -> None:
    ours = small_config(**deep(values), dtype="bfloat16")
    ours.save_pretrained(tmp_path)
    theirs = transformers.Qwen2Config.from_pretrained(tmp_path)
    assert_equal(ours, theirs)
    assert theirs.dtype is torch.bfloat16
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == "qwen2"


@pytest.mark.parametrize("values", CASES)
def test_what_transformers_writes_is_read_here(tmp_path: Path, values: dict[str, Any]) -> None:
    theirs = transformers.Qwen2Config(**deep({**SMALL, **values}), dtype="bfloat16")
    theirs.save_pretrained(tmp_path)
    ours = Qwen2Config.from_pretrained(tmp_path)
    assert_equal(ours, theirs)
    assert ours.dtype == "bfloat16"
    ours.save_pretrained(tmp_path / "again")
    assert_equal(ours, transformers.Qwen2Config.from_pretrained(tmp_path / "again"))

"""Numbers that JSON does not have, and the names by which tools read a config."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import transformers

import quintet
from conformance.families import Family, each
from quintet.configuration.numbers import is_finite
from quintet.errors import ConfigError, InputError, UnsupportedModelError

LIMITS = '{"__float__": "Infinity"}', "Infinity"


@pytest.mark.parametrize("limit", LIMITS)
def test_infinity_is_read_as_transformers_writes_it_and_bare(tmp_path: Path, limit: str) -> None:
    (tmp_path / "config.json").write_text(
        f'{{"model_type": "zamba2", "time_step_limit": [0.0, {limit}], "odd": {{"a": [{limit}]}}}}'
    )
    config = quintet.AutoConfig.from_pretrained(tmp_path)
    assert vars(config)["time_step_limit"] == [0.0, math.inf]
    assert vars(config)["odd"] == {"a": [math.inf]}


@each
def test_what_is_written_is_json_and_transformers_reads_it(family: Family, tmp_path: Path) -> None:
    odd = {"a": [math.inf, -math.inf, 1.5], "b": (math.inf,)}
    config = family.config(odd=odd)
    config.save_pretrained(tmp_path)

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    values = json.loads((tmp_path / "config.json").read_text(), parse_constant=refuse)
    assert values["odd"]["a"][0] == {"__float__": "Infinity"}
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    assert theirs.odd == again.odd == {"a": [math.inf, -math.inf, 1.5], "b": [math.inf]}
    theirs.save_pretrained(tmp_path / "theirs")
    assert type(config).from_pretrained(tmp_path / "theirs").odd == theirs.odd


def test_a_number_may_be_larger_than_any_float() -> None:
    for value in (0, -1.5, 10**300, -(10**308)):
        assert is_finite(value)
    for value in (10**400, -(10**400), math.inf, -math.inf, math.nan, True, None, "1", [1]):
        assert not is_finite(value)


def test_a_file_that_is_such_a_number_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(LIMITS[0])
    with pytest.raises(UnsupportedModelError, match="no model_type"):
        quintet.AutoConfig.from_pretrained(tmp_path)
    assert quintet.Qwen2Config.from_dict({"__float__": "Infinity"}) == quintet.Qwen2Config()


def test_not_a_number_comes_back(tmp_path: Path) -> None:
    quintet.Qwen2Config(odd=math.nan).save_pretrained(tmp_path)
    assert math.isnan(vars(quintet.Qwen2Config.from_pretrained(tmp_path))["odd"])
    with pytest.raises(ConfigError, match="initializer_range"):
        quintet.Qwen2Config.from_dict({"initializer_range": {"__float__": "NaN"}})


@each
def test_tools_read_a_config_by_their_names(family: Family, tmp_path: Path) -> None:
    config = family.config()
    assert not config.is_encoder_decoder
    assert config.get_text_config() is config
    assert config._attn_implementation == config.attn_implementation
    assert "hidden_size" in config
    assert "no_such_key" not in config
    assert config.to_diff_dict() == json.loads(config.to_json_string())
    assert type(config).from_dict(config.to_diff_dict()) == config
    config.to_json_file(tmp_path / "any.json")
    assert json.loads((tmp_path / "any.json").read_text()) == config.to_diff_dict()
    config.update({"hidden_act": "gelu", "odd": {"inner": config.to_dict()}})
    assert config.hidden_act == "gelu"
    assert type(config).from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="vocab_size='many'"):
        config.update({"vocab_size": "many"})


def test_objects_of_transformers_are_told_from_ours(tmp_path: Path) -> None:
    theirs = transformers.Qwen2Config(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with pytest.raises(InputError, match=r"takes a quintet\.Qwen2Config, not a transformers\."):
        quintet.Qwen2ForCausalLM(theirs)  # type: ignore[arg-type]
    wish = transformers.BitsAndBytesConfig(load_in_8bit=True)
    config = quintet.Qwen2Config.from_dict(theirs.to_dict())
    quintet.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    for given in (wish, wish.to_dict()):
        model = quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, quantization_config=given)
        assert vars(model.config)["quantization_config"]["load_in_8bit"]

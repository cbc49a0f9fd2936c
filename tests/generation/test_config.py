"""generation_config.json, in both directions with Transformers, and what it refuses."""

import copy
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers

from quintet import GenerationConfig, Qwen2Config
from quintet.errors import CheckpointError, InputError, ModelNotFoundError, SaveError

# What the released chat models of the family say.
RELEASED = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
}


def written(root: Path, values: Any) -> Path:
    (root / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    return root


def test_a_file_of_transformers_is_read(tmp_path: Path) -> None:
    transformers.GenerationConfig(**RELEASED, max_new_tokens=99).save_pretrained(tmp_path)
    config = GenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in RELEASED} == RELEASED
    assert config.max_new_tokens == 99
    assert config.eos_token_ids == [151645, 151643]


def test_a_file_of_ours_is_read_by_transformers(tmp_path: Path) -> None:
    GenerationConfig(**RELEASED, min_new_tokens=3, min_p=0.1).save_pretrained(tmp_path)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(theirs, name) for name in RELEASED} == RELEASED
    assert (theirs.min_new_tokens, theirs.min_p) == (3, 0.1)


def test_a_round_trip_keeps_everything(tmp_path: Path) -> None:
    values = {**RELEASED, "transformers_version": "4.37.0", "length_penalty": 1.0}
    config = GenerationConfig.from_pretrained(written(tmp_path, values))
    config.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert saved == values
    assert GenerationConfig.from_pretrained(tmp_path / "again") == config


def test_what_is_not_set_is_not_written() -> None:
    assert json.loads(GenerationConfig().to_json_string()) == {}
    assert json.loads(GenerationConfig(top_p=0.5).to_json_string()) == {"top_p": 0.5}


@pytest.mark.parametrize(
    ("eos", "ids"), [(None, []), (3, [3]), (0, [0]), ([3, 4], [3, 4]), ([], [])]
)
def test_the_end_tokens_are_a_list(eos: Any, ids: list[int]) -> None:
    assert GenerationConfig(eos_token_id=eos).eos_token_ids == ids


def test_a_model_config_gives_the_tokens() -> None:
    model_config = Qwen2Config(bos_token_id=1, eos_token_id=[2, 3], pad_token_id=4)
    config = GenerationConfig.from_model_config(model_config)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, [2, 3], 4)


def test_an_option_that_is_not_supported_is_told_and_kept(tmp_path: Path) -> None:
    values = {"num_beam_groups": 4, "penalty_alpha": 0.6, "top_k": 5}
    with pytest.warns(UserWarning, match="num_beam_groups=4, penalty_alpha=0.6.*without effect"):
        config = GenerationConfig.from_pretrained(written(tmp_path, values))
    assert json.loads(config.to_json_string()) == values


def test_an_option_without_effect_at_its_default_is_not_told(tmp_path: Path) -> None:
    values = {"num_beams": 1, "bad_words_ids": None, "early_stopping": False, "typical_p": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GenerationConfig.from_pretrained(written(tmp_path, values))


def test_null_is_the_default(tmp_path: Path) -> None:
    values = {"temperature": None, "top_k": None, "do_sample": None, "eos_token_id": None}
    assert GenerationConfig.from_pretrained(written(tmp_path, values)).to_dict() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature=0 has to be a finite number greater than 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_p": 0}, "top_p=0 leaves no token"),
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"eos_token_id": [1, -2]}, r"eos_token_id=\[1, -2\]"),
        ({"do_sample": "yes"}, "do_sample='yes'"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged'.*'static'"),
        ({"num_return_sequences": 0}, "num_return_sequences=0"),
        ({"early_stopping": "soon"}, "early_stopping='soon' has to be True or False or 'never'"),
        ({"typical_p": 0}, "typical_p=0 leaves no token"),
        ({"epsilon_cutoff": 1}, "epsilon_cutoff=1 leaves no token"),
        ({"exponential_decay_length_penalty": [1]}, "has to be a start and a factor"),
        ({"watermarking_config": {"bais": 1}}, "watermarking_config={'bais': 1} has other keys"),
        ({"watermarking_config": {"greenlist_ratio": 1}}, "greenlist_ratio=1 has to be between"),
        ({"bad_words_ids": [1]}, "bad_words_ids=.1. has to be a list of a list of"),
    ],
)
def test_a_value_that_breaks_its_rule_is_named(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        GenerationConfig(**options)
    with pytest.raises(InputError, match=message):
        GenerationConfig.from_pretrained(written(tmp_path, options))


def test_replace_returns_a_copy() -> None:
    config = GenerationConfig(top_k=5)
    assert config.replace(top_k=7, temperature=None) == GenerationConfig(top_k=7)
    assert config.top_k == 5


def test_replace_names_the_nearest_option() -> None:
    with pytest.raises(InputError, match="'repetition_penalti'; did you mean 'repetition_penalty'"):
        GenerationConfig().replace(repetition_penalti=2.0)
    with pytest.raises(InputError, match="'atention_mask'; did you mean 'attention_mask'"):
        GenerationConfig().replace(atention_mask=2.0)
    with pytest.raises(InputError, match="no option 'zzz'; there are max_new_tokens, "):
        GenerationConfig().replace(zzz=1)


def test_what_generate_takes_is_what_is_suggested() -> None:
    from quintet.generation import option_names
    from quintet.generation.mixin import GenerationMixin

    taken = set(inspect.signature(GenerationMixin.generate).parameters)
    assert set(option_names.ARGUMENTS) <= taken


def test_update_changes_in_place_and_returns_the_rest() -> None:
    config = GenerationConfig(top_k=5)
    assert config.update(top_p=0.5, attention_mask=3) == {"attention_mask": 3}
    assert config == GenerationConfig(top_k=5, top_p=0.5)
    with pytest.raises(InputError, match="temperature=0"):
        config.update(temperature=0)


def test_what_is_no_json_is_written_as_some_and_read_again(tmp_path: Path) -> None:
    config = GenerationConfig(
        sequence_bias={(1, 2): 0.5},
        watermarking_config={"bias": 1.0},
        exponential_decay_length_penalty=(3, 1.5),
        early_stopping="never",
        num_beams=2,
        bad_words_ids=[[1], [2, 3]],
    )
    config.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    assert again.sequence_bias == [[[1, 2], 0.5]]
    assert again.watermarking_config == config.watermarking_config
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert theirs.watermarking_config.bias == 1.0
    assert theirs.early_stopping == "never"


def test_only_what_is_set_goes_over_another_config() -> None:
    base = GenerationConfig(do_sample=True, temperature=0.5, top_k=3, eos_token_id=9)
    assigned = GenerationConfig(do_sample=False)
    assigned.top_k = 4
    expected = base.replace(do_sample=False, top_k=4)
    assert assigned.over(base) == expected
    assert copy.deepcopy(assigned).over(base) == expected
    assert assigned.replace(top_k=4).over(base) == expected
    assert GenerationConfig().over(base) == base


def test_the_options_can_be_looked_up() -> None:
    names = list(inspect.signature(GenerationConfig).parameters)
    assert names[:2] == ["max_new_tokens", "max_length"]
    assert "self" not in names


def test_an_option_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match="max_tokens"):
        GenerationConfig(max_tokens=3)


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is empty"):
        GenerationConfig.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has to hold a JSON object, not list"):
        GenerationConfig.from_pretrained(written(tmp_path, [1]))
    with pytest.raises(SaveError, match="is a file"):
        GenerationConfig().save_pretrained(tmp_path / "generation_config.json")


def test_bits_of_a_cache_have_one_meaning() -> None:
    assert GenerationConfig().cache.kind == "dynamic"
    assert GenerationConfig(cache_implementation="quantized").cache.bits == 8
    config = GenerationConfig(cache_config={"nbits": 4})
    assert config.cache == ("quantized", 4)
    assert GenerationConfig(cache_dtype="int6", cache_config={"nbits": 6}).cache.bits == 6
    for wrong, rule in (
        ({"cache_dtype": "fp8"}, "int8"),
        ({"cache_dtype": "int8", "cache_config": {"nbits": 4}}, "different bits"),
        ({"cache_dtype": "int8", "cache_implementation": "static"}, "'quantized'"),
        ({"cache_config": {"nbits": 2}}, "8, 6 or 4"),
        ({"cache_config": {"residual_length": 128}}, "residual_length"),
    ):
        with pytest.raises(InputError, match=rule):
            GenerationConfig(**wrong)
    with pytest.warns(UserWarning, match="backend='quanto'"):
        GenerationConfig(cache_implementation="quantized", cache_config={"backend": "quanto"})


def test_what_breaks_a_rule_or_has_no_effect_is_not_saved(tmp_path: Path) -> None:
    config = GenerationConfig(temperature=0.5)
    with pytest.raises(InputError, match=r"temperature=0.5 has no effect without do_sample=True"):
        config.save_pretrained(tmp_path)
    config.do_sample = True
    config.save_pretrained(tmp_path)
    config.top_p = 7.0
    with pytest.raises(InputError, match=r"top_p=7.0"):
        config.save_pretrained(tmp_path)
    for changes in ({"temperature": 0.5}, {"length_penalty": 2.0}, {"output_scores": True}):
        with pytest.raises(ValueError, match="invalid"):
            transformers.GenerationConfig(**changes).save_pretrained(tmp_path)
        with pytest.raises(InputError, match="has no effect without"):
            GenerationConfig(**changes).save_pretrained(tmp_path)


def test_a_file_that_is_not_changed_is_written_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 3}')
    config = GenerationConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "again")
    assert GenerationConfig.from_pretrained(tmp_path / "again") == config
    config.update(top_k=4)
    with pytest.raises(InputError, match=r"temperature=0.5 has no effect"):
        config.save_pretrained(tmp_path)


def test_another_file_and_options_beside_it(tmp_path: Path) -> None:
    config = GenerationConfig(do_sample=True, top_k=3, eos_token_id=4)
    config.save_pretrained(tmp_path, config_file_name="mine.json")
    read = GenerationConfig.from_pretrained(tmp_path, "mine.json", top_k=None, top_p=0.5)
    assert (read.top_k, read.top_p, read.eos_token_id) == (None, 0.5, 4)
    theirs = transformers.GenerationConfig.from_pretrained(
        tmp_path, "mine.json", top_k=None, top_p=0.5
    )
    assert (theirs.top_k, theirs.top_p, theirs.eos_token_id) == (None, 0.5, 4)
    with pytest.raises(InputError, match="did you mean 'top_p'"):
        GenerationConfig.from_pretrained(tmp_path, "mine.json", topp=0.5)
    with pytest.raises(ModelNotFoundError, match=r"other.json"):
        GenerationConfig.from_pretrained(tmp_path, "other.json")
    with pytest.raises(InputError, match="without a folder"):
        GenerationConfig.from_pretrained(tmp_path, "../mine.json")
    config.to_json_file(tmp_path / "third.json")
    assert GenerationConfig.from_pretrained(tmp_path, "third.json") == config


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"num_beams": 3},
        {"num_beams": 3, "do_sample": True},
        {"prompt_lookup_num_tokens": 3},
        {"use_mtp": True, "do_sample": True},
    ],
    ids=str,
)
def test_the_mode_is_that_of_transformers(options: dict[str, Any]) -> None:
    ours, theirs = GenerationConfig(**options), transformers.GenerationConfig(**options)
    assert ours.get_generation_mode() == theirs.get_generation_mode()
    if "num_beams" not in options:
        assert ours.get_generation_mode(object()) == "assisted_generation"


def test_updating_defaults_and_keeping_further_keys() -> None:
    for kind in (GenerationConfig, transformers.GenerationConfig):
        config: Any = kind(top_k=5, do_sample=True)
        given = {"top_k": 7, "top_p": 0.5, "mine": 1}
        assert config.update(**given, defaults_only=True) == {"top_k": 7, "mine": 1}
        assert (config.top_k, config.top_p) == (5, 0.5)
        assert config.update(mine=1, allow_custom_entries=True) == {}
        assert config.to_dict()["mine"] == 1
    config = GenerationConfig(top_k=5)
    with pytest.raises(InputError, match="top_p=7"):
        config.update(top_k=6, top_p=7)
    assert config.top_k == 5


def test_a_mapping_of_a_model_is_read() -> None:
    values = {"eos_token_id": [3, 4], "pad_token_id": 0, "hidden_size": 5}
    assert GenerationConfig.from_model_config(values) == GenerationConfig(
        eos_token_id=[3, 4], pad_token_id=0
    )
    assert GenerationConfig.from_dict({"top_k": 4}, top_p=0.5) == GenerationConfig(
        top_k=4, top_p=0.5
    )

"""Rotary parameters: both vintages of names mean the same, and bad ones are refused by name."""

from typing import Any

import pytest

from quintet import Qwen2Config
from quintet.configuration.rope import RopeParameters, merge_rope
from quintet.errors import ConfigError

YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = [
    pytest.param("default", {}, id="default"),
    pytest.param("linear", {"factor": 2.0}, id="linear"),
    pytest.param("dynamic", {"factor": 2.0}, id="dynamic"),
    pytest.param("yarn", YARN, id="yarn"),
    pytest.param("llama3", LLAMA3, id="llama3"),
]


@pytest.mark.parametrize(("kind", "values"), KINDS)
def test_every_spelling_gives_the_same_parameters(kind: str, values: dict[str, Any]) -> None:
    new = Qwen2Config(rope_parameters={"rope_type": kind, "rope_theta": 5e5, **values})
    spellings = [
        Qwen2Config(rope_theta=5e5, rope_scaling={"rope_type": kind, **values}),
        Qwen2Config(rope_theta=5e5, rope_scaling={"type": kind, **values}),
        Qwen2Config(rope_theta=5e5, rope_parameters={"type": kind, **values}),
        Qwen2Config(rope_scaling={"type": kind, "rope_theta": 5e5, **values}),
        Qwen2Config(rope_theta=1.5, rope_parameters={"type": kind, "rope_theta": 5e5, **values}),
    ]
    for old in spellings:
        assert old.rope() == new.rope()
        assert old == new
    assert new.rope().rope_type == kind
    assert new.rope().rope_theta == new.rope_theta == 5e5


@pytest.mark.parametrize(("kind", "values"), KINDS)
def test_a_null_counts_as_not_given(kind: str, values: dict[str, Any]) -> None:
    nulls = {"attention_factor": None, "mscale": None, "rope_theta": None}
    config = Qwen2Config(rope_theta=1e6, rope_scaling={"rope_type": kind, **nulls, **values})
    assert config.rope_theta == config.rope().rope_theta == 1e6
    assert Qwen2Config(rope_parameters={"rope_type": None, "type": kind, **values}).rope() == (
        Qwen2Config(rope_parameters={"rope_type": kind, **values}).rope()
    )


def test_without_any_it_is_the_plain_rotation() -> None:
    for config in (Qwen2Config(), Qwen2Config(rope_scaling=None, rope_parameters=None)):
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
        assert config.rope_scaling is None


def test_scaling_and_theta_can_be_set_later() -> None:
    config = Qwen2Config(rope_theta=7.0)
    config.rope_scaling = {"type": "linear", "factor": 3.0}
    assert (config.rope().rope_type, config.rope().factor, config.rope_theta) == ("linear", 3, 7)
    config.rope_theta = 9.0
    assert config.rope().rope_theta == 9
    config.rope_scaling = None
    assert (config.rope().rope_type, config.rope_theta) == ("default", 9)


def test_what_was_passed_in_is_not_changed() -> None:
    given = {"type": "linear", "factor": 2.0}
    config = Qwen2Config(rope_scaling=given)
    config.rope_theta = 3.0
    assert given == {"type": "linear", "factor": 2.0}
    assert Qwen2Config().rope_theta == 10_000


def test_the_original_length_is_the_models_own_unless_told() -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0}
    assert RopeParameters.parse(yarn, max_position_embeddings=77) == RopeParameters(
        rope_type="yarn", factor=2.0, original_max_position_embeddings=77
    )
    told = RopeParameters.parse(yarn | YARN, max_position_embeddings=77)
    assert told.original_max_position_embeddings == 32


@pytest.mark.parametrize(
    ("values", "named"),
    [
        pytest.param({"rope_type": "su"}, "rope_type='su'", id="unknown-kind"),
        pytest.param({"rope_type": []}, r"rope_type=\[\]", id="kind-not-text"),
        pytest.param({"type": ""}, "rope_type=''", id="empty-kind"),
        pytest.param({"rope_type": "linear"}, "needs factor", id="no-factor"),
        pytest.param(
            {"rope_type": "llama3", "factor": 2}, "needs high_freq_factor, low", id="llama3-short"
        ),
        pytest.param({"rope_type": "linear", "factor": 0.5}, "factor=0.5 .*at least 1", id="small"),
        pytest.param({"rope_type": "linear", "factor": "2"}, "factor='2'", id="text-factor"),
        pytest.param({"rope_type": "linear", "factor": True}, "factor=True", id="bool-factor"),
        pytest.param({"rope_theta": 0}, "rope_theta=0 .*greater than 0", id="theta-zero"),
        pytest.param({"rope_theta": -1.0}, "rope_theta=-1.0", id="theta-negative"),
        pytest.param({"rope_theta": float("nan")}, "rope_theta=nan", id="theta-nan"),
        pytest.param({"rope_theta": 10**400}, "rope_theta=1000", id="theta-too-long"),
        pytest.param({"rope_type": "yarn", **YARN, "rope_theta": 1}, "rope_theta=1", id="yarn-1"),
        pytest.param(
            {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 0},
            "original_max_position_embeddings=0 .*at least 1",
            id="no-length",
        ),
        pytest.param({"rope_type": "yarn", **YARN, "beta_slow": 0}, "beta_slow=0", id="beta"),
        pytest.param({"rope_type": "yarn", **YARN, "truncate": 1}, "truncate=1", id="truncate"),
        pytest.param(
            {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 0},
            "low_freq_factor=0 .*greater than 0",
            id="low-zero",
        ),
        pytest.param(
            {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0},
            "high_freq_factor=4.0 .*greater than low_freq_factor=4.0",
            id="low-not-below-high",
        ),
    ],
)
def test_bad_parameters_are_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Qwen2Config(rope_parameters=values)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", [3, "linear", [], True], ids=repr)
def test_anything_but_a_mapping_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.* mapping or null"):
        Qwen2Config(**{name: value})


def test_parameters_of_another_kind_are_pointed_out() -> None:
    with pytest.warns(UserWarning, match="'linear' does not use 'beta_fast', 'mscale'"):
        Qwen2Config(rope_scaling={"type": "linear", "factor": 2.0, "beta_fast": 1, "mscale": 1})


def test_the_nested_mapping_wins() -> None:
    values = {"rope_theta": 1.0, "rope_scaling": {"type": "linear", "factor": 2, "rope_theta": 3.0}}
    assert merge_rope(values, 5.0) == {"rope_type": "linear", "factor": 2, "rope_theta": 3.0}
    assert values == {}


FILE = {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}


@pytest.mark.parametrize("file", [FILE, Qwen2Config(**FILE).to_dict()], ids=["old", "both"])
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        pytest.param({"rope_theta": 5.0}, ("linear", 2.0, 5.0), id="theta-alone"),
        pytest.param({"rope_scaling": None}, ("default", 1.0, 1e6), id="scaling-off"),
        pytest.param(
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ("dynamic", 4.0, 1e6), id="other"
        ),
        pytest.param(
            {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 9.0}},
            ("dynamic", 4.0, 9.0),
            id="parameters",
        ),
        pytest.param(
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_theta": 9.0},
            ("dynamic", 4.0, 9.0),
            id="scaling-and-theta",
        ),
    ],
)
def test_an_override_wins_over_the_file(
    file: dict[str, Any], overrides: dict[str, Any], expected: tuple[str, float, float]
) -> None:
    rope = Qwen2Config.from_dict(file, **overrides).rope()
    assert (rope.rope_type, rope.factor, rope.rope_theta) == expected

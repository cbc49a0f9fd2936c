"""Settings: read from TOML by their annotations, refused by name, written back equal."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintet.errors import ConfigError, ModelNotFoundError
from quintet.training import settings
from quintet.training.settings import SettingError


@dataclass(frozen=True)
class Cosine:
    kind: Literal["cosine"] = "cosine"
    peak: float = 1e-3


@dataclass(frozen=True)
class Steps:
    kind: Literal["steps"] = "steps"
    at: tuple[float, ...] = ()


@dataclass(frozen=True)
class Source:
    files: str
    weight: float = 1.0


@dataclass(frozen=True)
class Rates:
    rate: float | Cosine | Steps = 3e-4
    steps: int | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    names: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.rate, float) and self.rate < 0:
            raise SettingError.value("rate", self.rate, "has to be at least 0")


@dataclass(frozen=True)
class Whole:
    from_: str = ""
    fused: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    raw: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Rates = Rates()
    sources: tuple[Source, ...] = ()
    other: Rates | None = None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("optimizer.rat = 1", r"\[optimizer\] rat: there is no such key; the nearest is rate"),
        ("optimizer.rate = -1.0", r"\[optimizer\] rate = -1.0: has to be at least 0"),
        ('optimizer.rate = "fast"', r'rate = "fast": has to be a number or a table'),
        ("optimizer.rate = { at = [1] }", r"\[optimizer.rate\] at: there is no such key"),
        ("optimizer.betas = [1]", r"betas = \[1\]: has to be a list of 2: a number, a number"),
        ("optimizer.rate = { kind = 'cos' }", r"kind = \"cos\": has to be one of"),
        ("optimizer.rate = { kind = 'steps', at = [1, true] }", r"\[optimizer.rate.at\] 1 = true"),
        ("optimizer.rate = { kind = {} }", r"kind = {}: has to be one of"),
        (f"fused = '{'a' * 999}'", r'fused = "a{150,160}…: has to be true or false$'),
        ("optimizer = 3", r"optimizer = 3: has to be a table with the keys rate, steps, betas"),
        ("optimizer.steps = 1.5", "steps = 1.5: has to be a whole number"),
        ("optimizer.steps = true", "steps = true: has to be a whole number"),
        ("fused = 1", "fused = 1: has to be true or false"),
        ("dtype = 'half'", r'dtype = "half": has to be one of "float32", "bfloat16"'),
        ("sources = [{ weight = 1 }]", r"\[sources.0\] files: is missing; it has to be text"),
        ("optimizer.names = { a = 'b' }", r"\[optimizer.names\] a = \"b\": has to be a number"),
        ("a b", "is no TOML: .*line 1, column 3"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"train.toml.*{told}"):
        settings.read(Whole, path)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"none\.toml"):
        settings.read(Whole, tmp_path / "none.toml")


def test_changes_replace_what_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text("dtype = 'float32'\n[optimizer]\nsteps = 1\n")
    changes = ["optimizer.steps=2e3", "dtype=bfloat16", "other.rate={kind='cosine'}", "from=a/b"]
    found = settings.read(Whole, path, changes)
    assert found == Whole(
        from_="a/b", dtype="bfloat16", optimizer=Rates(steps=2000), other=Rates(rate=Cosine())
    )
    assert type(found.optimizer.steps) is int


@pytest.mark.parametrize("change", ["steps", "=1", "optimizer.=1", "dtype.steps=1"])
def test_a_change_that_names_no_key_is_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text("dtype = 'float32'")
    with pytest.raises(ConfigError, match="setting"):
        settings.read(Whole, path, [change])


texts = st.text(st.sampled_from('aB1-_. "\\\n\t\x01\x7fä\u2028🙂'), max_size=6)
numbers = st.floats(0, allow_nan=False)
rates = st.builds(
    Rates,
    numbers | st.builds(Cosine, peak=numbers) | st.builds(Steps, at=st.tuples(numbers, numbers)),
    st.none() | st.integers(-(2**40), 2**40),
    st.tuples(numbers, numbers),
    st.dictionaries(texts, numbers, max_size=2),
)
raw = st.booleans() | st.integers() | numbers | texts
raw |= st.lists(raw, max_size=2) | st.dictionaries(texts, raw, max_size=2)


@given(
    st.builds(
        Whole,
        from_=texts,
        raw=st.dictionaries(texts, raw, max_size=2),
        optimizer=rates,
        sources=st.lists(st.builds(Source, texts, numbers), max_size=2).map(tuple),
        other=st.none() | rates,
    )
)
def test_settings_that_are_written_read_equal(whole: Whole) -> None:
    assert settings.build(Whole, settings.parse(settings.written(whole))) == whole

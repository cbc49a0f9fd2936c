import ctypes
import logging
from collections.abc import Callable

import pytest
import torch

from kernels.formulas import Maker
from quintet.kernels import layout, native
from quintet.kernels.layout import disagreement
from quintet.kernels.stack import Stack


def table(level: str) -> str:
    library = native.native().library
    assert library is not None
    described = library.quintet_layout
    described.restype = ctypes.c_char_p
    return str(described().decode("ascii"))


def test_the_library_reads_what_is_written(level: str) -> None:
    assert disagreement(table(level)) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(" H:i K:i", " H:i K:i more:i"),
        lambda text: text.replace(" H:i K:i", " K:i H:i"),
        lambda text: text.replace("window:i rotates:i", "rotates:i"),
        lambda text: text.replace("norm.eps:d norm.of:i", "norm.of:i norm.eps:d"),
        lambda text: text.replace("state:p state:b record:p record:b", "state:p state:b"),
        lambda text: text.replace("rules.A:i rules.groups:i", "rules.groups:i rules.A:i"),
        lambda text: "\n".join(text.splitlines()[:-2]),
    ],
    ids=["added", "swapped", "left out", "of another kind", "kept", "nested", "no such part"],
)
def test_a_field_on_one_side_alone_is_found(level: str, change: Callable[[str], str]) -> None:
    doctored = change(table(level))
    assert doctored != table(level)
    assert disagreement(doctored) is not None


def test_a_library_that_differs_runs_no_layers(
    level: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    part = Maker("plain", torch.float32, 64).mlp(72).part
    assert Stack.of([part], 64, torch.float32) is not None
    monkeypatch.setattr(layout, "disagreement", lambda described: "MLP, fields: one is missing")
    layout._agrees.cache_clear()
    with caplog.at_level(logging.WARNING, logger="quintet.kernels"):
        assert Stack.of([part], 64, torch.float32) is None
    assert "one is missing" in caplog.text
    layout._agrees.cache_clear()

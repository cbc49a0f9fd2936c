"""Every class, argument, default and output that the five pages document."""

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import quintet
from mission.pages import PAGES, blocks
from quintet.modeling import outputs

OUTPUTS = [value for value in vars(outputs).values() if dataclasses.is_dataclass(value)]


@dataclass(frozen=True)
class Signature:
    """`Class(arguments)` or `Class.method(arguments) -> (outputs)`, as a page has it."""

    owner: str
    method: str
    required: list[str]
    defaults: dict[str, Any]
    returns: list[str]

    def __str__(self) -> str:
        return f"{self.owner}.{self.method}" if self.method else self.owner


def signatures() -> Iterator[Signature]:
    for page in PAGES:
        for block in blocks(page, "signature"):
            for line in block.body.splitlines():
                call, _, returned = line.partition(" -> ")
                node = ast.parse(call, mode="eval").body
                assert isinstance(node, ast.Call)
                owner, _, method = ast.unparse(node.func).partition(".")
                yield Signature(
                    owner,
                    method,
                    [ast.unparse(argument) for argument in node.args],
                    {str(k.arg): ast.literal_eval(k.value) for k in node.keywords},
                    [name.strip(" ()") for name in returned.split(",")] if returned else [],
                )


SIGNATURES = list(signatures())


def each(suffix: str) -> pytest.MarkDecorator:
    found = [one for one in SIGNATURES if str(one).endswith(suffix)]
    return pytest.mark.parametrize("documented", found, ids=str)


@each("")
def test_a_class_is_public(documented: Signature) -> None:
    assert inspect.isclass(getattr(quintet, documented.owner))


@each("Config")
def test_a_default_is_the_documented_one(documented: Signature) -> None:
    config = getattr(quintet, documented.owner)
    plain = config()
    for name, value in documented.defaults.items():
        # A window that is switched off has no size; None stands for what follows from others.
        of = config(use_sliding_window=True) if name == "sliding_window" else plain
        if value is not None:
            assert getattr(of, name) == value, name
        assert config(**{name: value}).to_dict() == plain.to_dict(), name
    assert config(**documented.defaults).to_dict() == plain.to_dict()


@each("forward")
def test_a_forward_has_the_documented_arguments(documented: Signature) -> None:
    forward = getattr(quintet, documented.owner).forward
    known = inspect.signature(forward).parameters
    assert [name for name in documented.required if name not in known] == []
    # Each can be left out, and most come by position as on the page.
    assert [p.name for p in known.values() if p.name != "self" and p.default is p.empty] == []
    assert list(known)[1:3] == documented.required[:2]


@each("forward")
def test_a_forward_returns_the_documented_outputs(documented: Signature) -> None:
    fields = [[field.name for field in dataclasses.fields(one)] for one in OUTPUTS]
    assert any(set(documented.returns) <= set(names) for names in fields)


@pytest.mark.parametrize("documented", [s for s in SIGNATURES if "Tokenizer" in str(s)], ids=str)
def test_a_tokenizer_takes_the_documented_arguments(documented: Signature) -> None:
    found: Any = getattr(quintet, documented.owner)
    known = inspect.signature(getattr(found, documented.method) if documented.method else found)
    taken = [name for name in known.parameters if name != "self"]
    assert set(documented.required) <= set(taken)
    for name, value in documented.defaults.items():
        assert known.parameters[name].default == value, name
    # The first two come by position on the page.
    assert taken[:2] == [*documented.required, *documented.defaults][:2]

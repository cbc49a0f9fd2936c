"""An output is a dataclass, a dict and a tuple at once, and is rebuilt by whatever rebuilds one."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.parallel import scatter_gather
from torch.utils import _pytree as pytree

from quintet.cache import DynamicCache
from quintet.generation.outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from quintet.modeling import outputs
from quintet.modeloutput import ModelOutput
from support import small_config

ALL = [
    *(getattr(outputs, name) for name in outputs.__all__ if name != "ModelOutput"),
    GenerateDecoderOnlyOutput,
    GenerateBeamDecoderOnlyOutput,
]
each_output = pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)


@dataclass(eq=False)
class Scored(ModelOutput):
    """What someone adds to the outputs of a model of theirs."""

    loss: Tensor | None = None
    score: Tensor | None = None
    states: tuple[Tensor, ...] | None = None
    past_key_values: DynamicCache | None = None


@dataclass
class Theirs(transformers.utils.ModelOutput):
    loss: Tensor | None = None
    score: Tensor | None = None
    states: tuple[Tensor, ...] | None = None
    past_key_values: DynamicCache | None = None


@dataclass(eq=False)
class Further(Scored):
    """A subclass of a subclass, with a field more."""

    further: Tensor | None = None


both = pytest.mark.parametrize("cls", [Scored, Theirs], ids=["ours", "theirs"])


def some(cls: Any) -> Any:
    """An output that lacks a field in the middle."""
    names = [field.name for field in dataclasses.fields(cls)]
    values = {name: torch.rand(2) for name in (names[0], *names[2:4])}
    return cls(**values)


def same(one: Any, two: Any) -> bool:
    """Whether both hold the same tensors, as attributes and as items, in the same order."""
    names = [field.name for field in dataclasses.fields(one)]
    set_ = [name for name in names if getattr(one, name) is not None]
    return (
        type(one) is type(two)
        and set_ == list(one) == list(two) == list(one.keys())
        and all(one[name] is getattr(one, name) for name in set_)
        and all(two[name] is getattr(two, name) for name in set_)
        and all(torch.equal(one[name], two[name]) for name in set_)
        and all(getattr(two, name) is None for name in names if name not in set_)
    )


REBUILT: dict[str, Callable[[Any], Any]] = {
    "mapping": lambda out: type(out)(dict(out)),
    "itself": lambda out: type(out)(out),
    "pairs": lambda out: type(out)(list(out.items())),
    "iterator": lambda out: type(out)((name, out[name]) for name in out),
    "named": lambda out: type(out)(**out),
    "copy": copy.copy,
    "copy method": lambda out: out.copy(),
    "deep copy": copy.deepcopy,
    "pickle": lambda out: pickle.loads(pickle.dumps(out)),
    "replace": lambda out: dataclasses.replace(out),
    "union": lambda out: out | {},
    "pytree": lambda out: pytree.tree_map(lambda leaf: leaf, out),
    "moved": lambda out: pytree.tree_map_only(Tensor, lambda x: x.to("cpu"), out),
}


@pytest.mark.parametrize("way", REBUILT)
@each_output
def test_what_rebuilds_a_container_rebuilds_an_output(cls: Any, way: str) -> None:
    out = some(cls)
    assert same(out, REBUILT[way](out))


@both
def test_ours_and_theirs_behave_alike(cls: Any) -> None:
    a, b, c = torch.rand(2), torch.rand(2), torch.rand(2)
    out = cls(loss=a, states=(b, c))
    assert isinstance(out, dict)
    assert list(out) == ["loss", "states"]
    assert list(out.items()) == [("loss", a), ("states", (b, c))]
    assert len(out) == 2
    assert "loss" in out
    assert "score" not in out
    assert out.get("score") is None
    assert out[0] is out["loss"] is out.loss is a
    assert out[-1] == out[1:][0] == (b, c)
    assert out[:1] == (a,)
    assert out.to_tuple() == (a, (b, c))
    with pytest.raises(KeyError):
        out["score"]
    with pytest.raises(IndexError):
        out[2]
    out.loss = b
    assert out["loss"] is out[0] is b
    out["loss"] = c
    assert out.loss is out[0] is c
    out["extra"] = a
    assert out.extra is out["extra"] is out[2] is a
    assert cls(dict(out)).extra is a
    with pytest.raises(TypeError):
        cls(lost=a)
    assert out == out
    assert cls(a).loss is a
    assert cls((b, c)).loss == (b, c)
    assert cls().to_tuple() == ()


def test_a_field_that_is_set_or_taken_away_is_so_under_every_name() -> None:
    a, b = torch.rand(2), torch.rand(2)
    out = Scored(score=a)
    out.loss = b
    out.states = (a,)
    assert list(out) == ["loss", "score", "states"]
    out.score = None
    assert list(out) == ["loss", "states"]
    assert out[1] == (a,)
    out.update(score=b, loss=None)
    assert list(out) == ["score", "states"]
    assert out.loss is None
    assert out.pop("score") is b
    assert out.score is None
    assert out.pop("score", 5) == 5
    del out["states"]
    assert out.states is None
    out |= {"loss": a}
    del out.loss
    assert (out.loss, len(out)) == (None, 0)
    assert out.setdefault("states", (b,)) == out.states == (b,)
    out.loss = a
    assert out.popitem() == ("states", (b,))
    out.clear()
    assert (out.loss, out.states, len(out)) == (None, None, 0)


def test_a_note_that_is_no_field_is_copied_and_is_no_item() -> None:
    out = Scored(loss=torch.rand(2))
    out.note = "mine"
    assert list(out) == ["loss"]
    for again in (copy.copy(out), pickle.loads(pickle.dumps(out))):
        assert (again.note, list(again)) == ("mine", ["loss"])


def test_a_subclass_has_to_be_a_dataclass() -> None:
    class Bare(ModelOutput):
        pass

    for cls in (Bare, ModelOutput):
        with pytest.raises(TypeError, match=f"{cls.__name__} has no fields; .* a dataclass"):
            cls()


# -- trees -----------------------------------------------------------------------------------


@each_output
def test_leaves_keep_their_fields_through_a_written_structure(cls: Any) -> None:
    out = some(cls)
    leaves, spec = pytree.tree_flatten({"out": [out, out]})
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    read = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert read == spec
    assert all(same(out, again) for again in pytree.tree_unflatten(leaves, read)["out"])


def test_leaves_are_named_by_their_fields() -> None:
    x = torch.rand(2)
    paths, _ = pytree.tree_flatten_with_path(Further(score=x, states=(x, x), further=x))
    assert [pytree.keystr(path) for path, _ in paths] == [
        "['score']",
        "['states'][0]",
        "['states'][1]",
        "['further']",
    ]


def test_a_cache_is_a_leaf_and_comes_back() -> None:
    cache = DynamicCache(small_config())
    out = Scored(loss=torch.rand(2), past_key_values=cache)
    leaves, spec = pytree.tree_flatten(out)
    assert leaves[1] is cache
    assert pytree.tree_unflatten(leaves, spec).past_key_values is cache


def test_a_leaf_that_becomes_none_is_not_set() -> None:
    out = pytree.tree_map(lambda leaf: None, some(Scored))
    assert (out.loss, len(out)) == (None, 0)


def test_outputs_of_replicas_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only tensors of GPUs can be gathered by the function itself.
    monkeypatch.setattr(
        scatter_gather.Gather, "apply", lambda device, dim, *tensors: torch.cat(tensors, dim)
    )
    parts = [Scored(score=torch.rand(2, 3), states=(torch.rand(2, 1),)) for _ in range(2)]
    whole = scatter_gather.gather(parts, "cpu")
    assert type(whole) is Scored
    assert torch.equal(whole.score, torch.cat([part.score for part in parts]))
    assert whole.states[0].shape == (4, 1)

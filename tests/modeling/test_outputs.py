"""What the models of all families return goes through DDP, export and whatever maps over trees."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from comparisons import TOLERANCE
from conformance.families import Family, each, each_head
from conformance.heads import ids_of, labels_of, made, result
from quintet.cache import Cache
from support import relative_error

TESTS = Path(__file__).parents[1]


def test_two_processes_train_as_one_does() -> None:
    paths = os.pathsep.join(path for path in (str(TESTS), *sys.path) if path)
    subprocess.run(
        [sys.executable, str(TESTS / "together.py")],
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": paths},
    )


@torch.no_grad()
@each_head
def test_an_output_is_a_tree_of_tensors_and_a_cache(family: Family, head: str) -> None:
    model = made(family, head)
    out = model(ids_of(), **labels_of(head), output_hidden_states=True, output_attentions=True)
    leaves, spec = pytree.tree_flatten(out)
    caches = [leaf for leaf in leaves if isinstance(leaf, Cache)]
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves if leaf not in caches)
    assert caches == ([out.past_key_values] if "past_key_values" in out else [])
    again = pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(out)
    assert list(again) == list(out)
    assert all(again[name] is out[name] for name in out if not isinstance(out[name], tuple))


@torch.no_grad()
@each
def test_a_model_is_exported(family: Family) -> None:
    model, ids = family.model_of(**family.shallow), ids_of()
    out = torch.export.export(model, (ids,), {"use_cache": False}).module()(ids, use_cache=False)
    expected = model(ids)
    assert type(out) is type(expected)
    assert relative_error(result(out), result(expected)) < TOLERANCE


@torch.no_grad()
@each
def test_what_a_generation_returns_is_a_tree(family: Family) -> None:
    model = made(family, "ForCausalLM")
    for options in ({}, {"num_beams": 2}):
        out = model.generate(
            ids_of(),
            max_new_tokens=2,
            return_dict_in_generate=True,
            output_scores=True,
            output_hidden_states=True,
            **options,
        )
        leaves, spec = pytree.tree_flatten(out)
        assert any(leaf is out.sequences for leaf in leaves)
        assert any(leaf is out.hidden_states[1][0] for leaf in leaves)
        assert list(pytree.tree_unflatten(leaves, spec)) == list(out)

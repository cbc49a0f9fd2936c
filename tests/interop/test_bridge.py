"""A model that is an instance of Transformers' class, too."""

import copy
import pickle
import sys

import pytest
import torch
import transformers

from conformance.families import Family, each, each_head
from quintet.interop import as_transformers

IDS = torch.arange(5)[None]


@each_head
def test_it_is_the_same_model_with_one_more_class(family: Family, head: str) -> None:
    model = family.model_of(head)
    names, kind = set(model.state_dict()), type(model)
    plain = model(IDS).to_tuple()[0]
    assert as_transformers(model) is model
    assert isinstance(model, transformers.PreTrainedModel)
    assert isinstance(model.base_model, transformers.PreTrainedModel)
    assert isinstance(model, kind)
    assert set(model.state_dict()) == names
    assert torch.equal(model(IDS).to_tuple()[0], plain)
    once = type(model)
    assert type(as_transformers(model)) is once
    assert once.__name__ == kind.__name__
    # What was there before is another class still.
    assert not isinstance(family.model_of(head), transformers.PreTrainedModel)


@each
def test_it_is_copied_pickled_and_saved(family: Family, tmp_path: object) -> None:
    model = as_transformers(family.model_of())
    plain = model(IDS).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is type(model)
        assert torch.equal(again(IDS).logits, plain)
    model.save_pretrained(tmp_path)
    cls = family.cls("ForCausalLM")
    read = cls.from_pretrained(tmp_path)
    assert type(read) is cls
    assert torch.equal(read(IDS).logits, plain)
    assert torch.equal(read.generate(IDS), model.generate(IDS))


def test_without_transformers_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from conformance.families import FAMILIES
    from quintet.errors import MissingDependencyError
    from quintet.models.qwen2 import Qwen2Model

    class Another(Qwen2Model):
        """A class that was not bridged before."""

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match="pip install transformers"):
        as_transformers(Another(FAMILIES[0].config()))

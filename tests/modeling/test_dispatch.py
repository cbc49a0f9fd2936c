"""A model over several devices: shared by threads, copied and pickled, and nothing stays behind."""

import copy
import gc
import pickle
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import FAMILIES, Family, each
from quintet import DynamicCache
from quintet.layers.context import ForwardContext

IDS = torch.tensor([[5, 6, 7, 8, 9], [7, 9, 4, 3, 2]])
# Two names of one device: everything is moved, as between two.
DEVICES = "cpu", "cpu:0"


@pytest.fixture
def model(family: Family, tmp_path: Path) -> Any:
    """A model of which every second layer is on the second device."""
    whole = family.model_of()
    whole.save_pretrained(tmp_path)
    layers = {f"model.layers.{i}": DEVICES[i % 2] for i in range(len(whole.model.layers))}
    device_map = {"": DEVICES[0], **layers, "lm_head": DEVICES[1]}
    return family.cls("ForCausalLM").from_pretrained(tmp_path, device_map=device_map)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    made: Tensor = model(ids, use_cache=False).logits
    return made


@each
def test_another_thread_s_forward_in_the_middle_of_one_changes_nothing(
    family: Family, model: Any
) -> None:
    alone, other = logits(model), logits(model, IDS[:1])
    errors: list[BaseException] = []

    def run() -> None:
        try:
            assert torch.equal(logits(model, IDS[:1]), other)
        except BaseException as error:
            errors.append(error)

    def between(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()

    for module in model.modules():
        # Also between what brings arguments to a shared block and what sends its output back.
        module.register_forward_pre_hook(between)
    made = logits(model)
    assert not errors
    assert torch.equal(made, alone)


@each
def test_copies_compute_the_same_and_keep_nothing_of_a_forward(family: Family, model: Any) -> None:
    expected = logits(model)
    # So that looking for garbage is not looking through all that tests have loaded so far.
    gc.freeze()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert torch.equal(logits(copied), expected)
        cache = DynamicCache(copied.config)
        with torch.no_grad():
            copied(IDS, past_key_values=cache)
        gone = weakref.ref(cache)
        del cache
        gc.collect()
        assert gone() is None


@each
def test_after_a_failure_the_next_forward_is_right(family: Family, model: Any) -> None:
    expected = logits(model)
    deep = [m for m in model.model.layers[1].modules() if not list(m.children())]
    for module in deep:

        def fail(*_: Any) -> None:
            raise RuntimeError("halfway")

        handle = module.register_forward_pre_hook(fail)
        # Adapters of another use are not called.
        with suppress(RuntimeError):
            logits(model)
        handle.remove()
        assert torch.equal(logits(model), expected)
    assert deep


@each
def test_layers_on_one_device_share_one_step(family: Family, model: Any) -> None:
    steps: list[ForwardContext] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda module, given, named: steps.append(named["context"]), with_kwargs=True
        )
    logits(model)
    assert len(steps) >= 3
    assert len({id(step) for step in steps}) == 2


def test_what_prediction_layers_join_is_given_to_them() -> None:
    # As what is given to a layer is brought to where it is.
    (family,) = (family for family in FAMILIES if family.name == "deepseek-v3")
    model = family.model_of(num_nextn_predict_layers=2)
    given: list[set[str]] = []
    for layer in model.model.prediction_layers():
        layer.register_forward_pre_hook(
            lambda module, args, named: given.append(set(named)), with_kwargs=True
        )
    with torch.no_grad():
        model(IDS, output_mtp_logits=True)
    assert given == [{"context", "ahead"}] * 2
    model.generate(IDS, use_mtp=True, max_new_tokens=3, do_sample=False)
    assert len(given) > 2
    assert all(names == {"context", "ahead"} for names in given)

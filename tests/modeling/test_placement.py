"""Which part of a model is on which device, and that what runs follows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.families import FAMILIES, Family
from quintet.errors import DoesNotFitError, InputError, UnsupportedBackendError
from quintet.modeling import dispatch
from quintet.modeling.placement import ModelPart, layout, parts, place
from simulated_gpu import cuda_memory

FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 0)
GPU = torch.device("cuda", 0)
IDS = torch.tensor([[5, 6, 7, 8, 9], [7, 9, 4, 0, 0]])
each_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


def devices(*sizes: int) -> dict[torch.device, int]:
    return {torch.device("cuda", index): size for index, size in enumerate(sizes)}


def placed(sizes: list[int], capacity: dict[torch.device, int], strategy: str) -> list[int]:
    found = layout([ModelPart(f"p{i}", size) for i, size in enumerate(sizes)], capacity, strategy)
    return [found[f"p{i}"].index for i in range(len(sizes))]


# -- the layout ------------------------------------------------------------------------------


def test_sequential_fills_one_device_after_the_other() -> None:
    assert placed([4, 4, 4, 4], devices(9, 9, 9), "sequential") == [0, 0, 1, 1]
    assert placed([4, 9, 1], devices(5, 10), "sequential") == [0, 1, 1]


def test_balanced_gives_each_the_same_share() -> None:
    assert placed([4] * 6, devices(99, 99, 99), "balanced") == [0, 0, 1, 1, 2, 2]
    assert placed([6, 1, 1, 1, 1, 6], devices(99, 99), "balanced") == [0, 0, 0, 1, 1, 1]
    # Where a share has no room, it is filled up.
    assert placed([4] * 6, devices(4, 99), "balanced") == [0, 1, 1, 1, 1, 1]


def test_auto_takes_as_few_as_it_needs() -> None:
    assert placed([4] * 4, devices(99, 99), "auto") == [0, 0, 0, 0]
    assert placed([4] * 4, devices(9, 9, 9), "auto") == [0, 0, 1, 1]


def test_auto_takes_those_with_most_room() -> None:
    assert placed([4] * 4, devices(9, 99), "auto") == [1, 1, 1, 1]
    assert placed([4] * 4, devices(9, 5, 9), "auto") == [0, 0, 2, 2]


def test_what_is_free_is_measured_and_a_tenth_is_left() -> None:
    whole = [ModelPart(f"layers.{i}", 10) for i in range(8)]
    with cuda_memory(100, 30):
        assert set(place("auto", whole).devices.values()) == {GPU}
    with cuda_memory(50, 50):
        found = place("auto", whole)
    assert [found.device_of(part.path).index for part in whole] == [0] * 4 + [1] * 4
    assert found.in_words(whole) == "0.00 GB on cuda:0, 0.00 GB on cuda:1"
    # 80 of 88 is more than nine tenths, unless torch keeps some of what was freed.
    with cuda_memory(88):
        assert place("auto", whole).several
    with cuda_memory(88, kept=1):
        assert not place("auto", whole).several
    huge = [ModelPart(f"layers.{i}", 10**9) for i in range(5)]
    with cuda_memory(2 * 10**9, 3 * 10**9):
        spread = place("auto", huge)
    where = [str(spread.device_of(part.path)) for part in huge]
    assert where == ["cuda:0", "cuda:1", "cuda:1", "cpu", "cpu"]
    assert spread.in_words(huge) == "1.00 GB on cuda:0, 2.00 GB on cuda:1, 2.00 GB on cpu"


def test_the_order_of_a_forward_is_kept() -> None:
    for strategy in ("auto", "balanced", "sequential"):
        where = placed([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], devices(20, 20, 20, 20), strategy)
        assert where == sorted(where)


def test_too_little_room_says_how_much_is_missing() -> None:
    with pytest.raises(DoesNotFitError, match=r"needs 0\.02 GB.*cuda:0: 0\.01 GB"):
        placed([10**7, 10**7], devices(10**7), "auto")
    assert DoesNotFitError.exit_code == 5


@each_family
def test_the_parts_hold_each_weight_once(family: Family) -> None:
    model = family.model_of("ForCausalLM", tie_word_embeddings=True)
    found = parts(model, torch.bfloat16, model.keep_in_fp32)
    tensors = {id(p): (name, p) for name, p in model.named_parameters()}
    persistent = {id(t) for t in model.state_dict(keep_vars=True).values()}
    buffers = [b for b in model.buffers() if id(b) in persistent and b.dtype == torch.float32]
    weights = sum(
        p.numel() * (4 if model.keep_in_fp32 and name.endswith(model.keep_in_fp32) else 2)
        for name, p in tensors.values()
    )
    rest = sum(b.nbytes for b in buffers) + model.model.rotary_emb.inv_freq.nbytes
    assert sum(part.nbytes for part in found) == weights + rest
    paths = [part.path for part in found]
    assert paths[0] == "model.embed_tokens"
    assert "model.layers.0" in paths
    assert paths[-1] == "lm_head"
    assert found[-1].nbytes == 0, "a tied head has no weights of its own"


# -- maps ------------------------------------------------------------------------------------

PARTS = [ModelPart(path, 4) for path in ("model.embed_tokens", "model.layers.0", "lm_head")]


def test_a_mapping_is_followed_by_the_longest_path() -> None:
    placement = place({"model": "cpu:0", "model.layers": "cpu", "lm_head": "cpu"}, PARTS)
    assert placement.device_of("model.embed_tokens.weight") == SECOND
    assert placement.device_of("model.layers.0.mlp.up_proj.weight") == FIRST
    assert placement.several
    assert place({"": "cpu"}, PARTS).device_of("anything.at.all") == FIRST


@pytest.mark.parametrize(
    ("device_map", "reason"),
    [
        ({"model": "cpu"}, "leaves out lm_head"),
        ({"": "cpu", "modle": "cpu"}, "names 'modle'.*did you mean 'model'"),
        ({"": "cpu", "model.layers.7": "cpu"}, "no part of the model.*did you mean"),
    ],
    ids=str,
)
def test_a_mapping_that_does_not_fit_is_named(device_map: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        place(device_map, PARTS)


def test_a_disk_is_refused_with_what_happens_anyway() -> None:
    for device_map in ("disk", {"": "cpu", "lm_head": "disk"}):
        with pytest.raises(UnsupportedBackendError, match="mapped from their files already"):
            place(device_map, PARTS)


def test_max_memory() -> None:
    assert place("auto", PARTS, {"cpu": "12B"}).device_of("lm_head") == FIRST
    with pytest.raises(DoesNotFitError):
        place("auto", PARTS, {"cpu": 11})
    for wrong in ({}, {"cpu": "much"}, {"cpu": 0}, 7):
        with pytest.raises(InputError, match="max_memory"):
            place("auto", PARTS, wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_memory goes with"):
        place("cpu", PARTS, {"cpu": "1GB"})


def test_the_one_device_of_this_machine_is_found(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    family = FAMILIES[0]
    family.model_of().save_pretrained(tmp_path)
    for device_map in ("auto", "balanced", "sequential"):
        model = family.cls("ForCausalLM").from_pretrained(tmp_path, device_map=device_map)
        assert model.device == FIRST
    with pytest.raises(DoesNotFitError, match=r"needs 0\.00 GB"):
        family.cls("ForCausalLM").from_pretrained(
            tmp_path, device_map="auto", max_memory={"cpu": "1KB"}
        )


# -- several devices -------------------------------------------------------------------------


def split(model: Any, first: Any, second: Any) -> dict[str, Any]:
    """Every second layer on the second device, the embedding on the first, the head on both."""
    layers = {f"model.layers.{i}": (first, second)[i % 2] for i in range(len(model.model.layers))}
    return {"": first, **layers, "lm_head": second}


@torch.no_grad()
@each_family
def test_a_model_over_two_names_of_one_device_computes_the_same(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = family.model_of()
    whole.save_pretrained(tmp_path)
    moves: list[torch.device] = []
    real = dispatch.moved

    def spied(value: Any, device: torch.device) -> Any:
        if isinstance(value, torch.Tensor):
            moves.append(device)
        return real(value, device)

    monkeypatch.setattr(dispatch, "moved", spied)
    model = family.cls("ForCausalLM").from_pretrained(
        tmp_path, device_map=split(whole, "cpu", "cpu:0")
    )
    mask = (IDS != 0).long()
    ours = model(IDS, attention_mask=mask, output_hidden_states=True)
    theirs = whole(IDS, attention_mask=mask, output_hidden_states=True)
    close: Any = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours.logits, theirs.logits, **close)
    torch.testing.assert_close(ours.hidden_states, theirs.hidden_states, **close)
    assert {SECOND, FIRST} <= set(moves)
    step = {"attention_mask": torch.cat((mask, mask[:, -1:]), dim=1)}
    after = model(IDS[:, :1], past_key_values=ours.past_key_values, **step)
    wanted = whole(IDS[:, :1], past_key_values=theirs.past_key_values, **step)
    torch.testing.assert_close(after.logits, wanted.logits, **close)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
@torch.no_grad()
@each_family
def test_a_model_over_cpu_and_gpu_computes_the_same(family: Family, tmp_path: Path) -> None:
    whole = family.model_of()
    whole.save_pretrained(tmp_path)
    model = family.cls("ForCausalLM").from_pretrained(tmp_path, device_map=split(whole, "cpu", GPU))
    assert {p.device for p in model.parameters()} == {FIRST, GPU}
    ours = model.generate(IDS[:1], max_new_tokens=8, do_sample=False)
    theirs = whole.generate(IDS[:1], max_new_tokens=8, do_sample=False)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(model(IDS).logits, whole(IDS).logits, rtol=1e-3, atol=1e-4)


def test_what_is_given_is_kept_in_kind() -> None:
    pair = dispatch.moved((torch.ones(1), None, "text"), SECOND)
    assert pair[1:] == (None, "text")
    assert dispatch.moved({"a": torch.ones(1)}, SECOND)["a"].item() == 1

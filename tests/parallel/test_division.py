"""Among how many processes what of a model is divided: what is asked for, and what goes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.distributed import DistributedConfig as Theirs

from parallel.cases import dividing
from parallel.cases.tensor import family
from parallel.launching import launch
from quintet import AutoModelForCausalLM, DistributedConfig, demo_model
from quintet.errors import InputError
from quintet.modeling.init_on_meta import init_on_meta
from quintet.parallel.division import degrees_for, requested_division
from quintet.parallel.world import Degrees


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")


def on_meta(name: str, **changes: Any) -> Any:
    known = family(name)
    return init_on_meta(known.cls("ForCausalLM"), known.config(**changes))


def load(**options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(demo_model(), **options)


# -- what is asked for -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"tp_plan": "auto"},
        {"tp_plan": "auto", "device_map": "auto"},
        {"tp_size": 1},
        {"distributed_config": DistributedConfig()},
        {"distributed_config": {"tp_plan": "auto"}},
        {"distributed_config": Theirs(tp_plan="auto")},
    ],
    ids=str,
)
def test_one_process_has_the_whole_model(options: dict[str, Any]) -> None:
    assert load(**options).world is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp_plan": {"layers.*": "colwise"}}, "has to be 'auto': each layer says itself"),
        ({"tp_plan": "colwise"}, "has to be 'auto'"),
        ({"tp_size": 2}, "tp_size=2: there is one process; start as many by torchrun"),
        ({"tp_size": 0}, "tp_size=0 has to be a number of processes"),
        ({"distributed_config": {"pp_size": 2, "ep_size": 2}}, "pp_size=2, ep_size=2: there is"),
        ({"distributed_config": {"tp": 2}}, "did you mean tp_size"),
        ({"distributed_config": 2}, "has to be a DistributedConfig, or a mapping"),
        ({"distributed_config": {"fsdp_size": 2}}, "fsdp_size=2 is not here: slices of weights"),
        ({"distributed_config": {"ep_implementation": "deepgemm_megamoe"}}, "'all_reduce'"),
        ({"distributed_config": {}, "tp_plan": "auto"}, "say the same thing twice"),
    ],
    ids=str,
)
def test_what_does_not_go_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load(**options)
    assert message in str(caught.value)


@pytest.mark.usefixtures("several")
def test_a_device_map_asks_for_all_processes_where_it_is_auto() -> None:
    assert requested_division(None, None, None, None, auto=True) == DistributedConfig()
    assert requested_division(None, None, None, None, auto=False) is None


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("device_map", ["cuda:0", 0, "balanced", {"": "cpu"}], ids=str)
def test_where_weights_go_is_not_said_twice(device_map: object) -> None:
    with pytest.raises(InputError, match="says where one process puts a whole model"):
        load(tp_plan="auto", device_map=device_map)


@pytest.mark.usefixtures("several")
def test_memory_of_devices_is_for_one_process() -> None:
    with pytest.raises(InputError, match="max_memory is for one process"):
        load(device_map="auto", max_memory={"cpu": "1GB"})


# -- what goes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "count", "degrees"),
    [
        ("qwen2", {}, 2, {"tp": 2}),
        ("qwen2-moe", {}, 2, {"tp": 2, "ep": 2}),
        ("deepseek-v3", {}, 4, {"tp": 4, "ep": 4}),
        ("deepseek-v3", {"tp_size": 4}, 4, {"tp": 4}),
        ("deepseek-v3", {"tp_size": 4, "ep_size": 2}, 4, {"tp": 4, "ep": 2}),
        ("deepseek-v3", {"tp_size": 2, "dp_replicate_size": 2}, 4, {"tp": 2, "dp": 2}),
        ("deepseek-v3", {"dp_replicate_size": 2}, 4, {"tp": 2, "ep": 2, "dp": 2}),
        ("deepseek-v3", {"tp_size": 2, "enable_expert_parallel": True}, 2, {"tp": 2, "ep": 2}),
        # More than the processes with the same texts: some have texts of their own.
        ("deepseek-v3", {"tp_size": 1, "ep_size": 4}, 4, {"fsdp": 4, "ep": 4}),
        ("qwen2-moe", {"tp_size": 2, "ep_size": 6}, 6, {"tp": 2, "fsdp": 3, "ep": 6}),
        (
            *("deepseek-v3", {"tp_size": 1, "ep_size": 2, "dp_replicate_size": 2}),
            *(4, {"fsdp": 2, "ep": 2, "dp": 2}),
        ),
    ],
    ids=str,
)
def test_a_model_is_divided_as_far_as_it_goes(
    name: str, config: dict[str, Any], count: int, degrees: dict[str, int]
) -> None:
    found = degrees_for(on_meta(name), DistributedConfig(**config), count)
    assert found == Degrees(**degrees)


def test_layers_are_divided_where_heads_cannot_be() -> None:
    model = on_meta("qwen2")
    assert degrees_for(model, DistributedConfig(), 6) == Degrees(tp=2, pp=3)
    assert degrees_for(model, DistributedConfig(), 3) == Degrees(pp=3)
    with pytest.raises(InputError) as caught:
        degrees_for(model, DistributedConfig(pp_size=2), 6)
    said = str(caught.value)
    assert "3 processes cannot divide this model among them" in said
    assert "num_attention_heads=4" in said
    assert "tp may be 1, 2, 4" in said


def test_sizes_have_to_divide_the_number_of_processes() -> None:
    with pytest.raises(InputError, match="has to divide the number of processes, 4"):
        degrees_for(on_meta("qwen2"), DistributedConfig(dp_replicate_size=3), 4)


@pytest.mark.parametrize(
    ("name", "sizes", "says"),
    [
        ("deepseek-v3", {"tp_size": 2, "ep_size": 4, "pp_size": 2}, "stages of pp_size=2"),
        ("deepseek-v3", {"tp_size": 2, "ep_size": 3}, "a multiple of tp_size"),
        ("qwen2", {"tp_size": 2, "ep_size": 4}, "this model has none"),
    ],
)
def test_where_tokens_cannot_be_sent_to_experts(
    name: str, sizes: dict[str, int], says: str
) -> None:
    with pytest.raises(InputError, match=f"is more than tp_size=2, .*{says}"):
        degrees_for(on_meta(name), DistributedConfig(**sizes), 8)


# -- in processes ----------------------------------------------------------------------------


# With a group that we make, and with one that the script has made itself.
@pytest.mark.parametrize("spellings", [(*dividing.HOW, "pipeline"), ("mesh",)], ids=["ours", "own"])
def test_each_process_has_its_part_and_the_text_is_that_of_one(
    spellings: tuple[str, ...], tmp_path: Path
) -> None:
    ended = launch(2, dividing.continues, spellings, where=tmp_path)
    assert [one.err for one in ended] == ["", ""]
    model = load()
    whole = sum(p.numel() for p in model.parameters())
    text = dividing.text_of(model)
    for one in ended:
        found = json.loads(one.out)
        assert list(found) == list(spellings)
        for how, (held, said) in found.items():
            # A stage has whole layers, and the last another copy of the embedding to look ahead.
            assert held < (0.7 if how == "stages" else 0.55) * whole
            assert said == text, how


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("order", "they have to be among pp, dp, fsdp, tp"),
        ("differs", "DisagreementError: the processes of a model have to be asked alike"),
        ("size", "tp=3 are 3 processes, and there are 2"),
    ],
)
def test_what_is_wrong_is_told_in_all(what: str, message: str, tmp_path: Path) -> None:
    ended = launch(2, dividing.is_wrong, what, where=tmp_path)
    assert [one.code for one in ended] == [1, 1]
    assert all(message in one.err for one in ended)


@pytest.mark.parametrize("name", ["qwen2", "qwen2-moe", "deepseek-v2", "deepseek-v3"])
def test_the_plan_is_said_in_the_words_of_transformers(name: str) -> None:
    model = on_meta(name)
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(model.config.model_type)
        theirs = transformers.AutoModelForCausalLM.from_config(config).tp_plan
    ours = model.tp_plan
    both = ours.keys() & theirs.keys()
    assert {path: ours[path] for path in both} == {path: theirs[path] for path in both}
    # Layers of other kinds than the default's, V3's attention, which they leave whole, and two
    # styles of things that are no matrices.
    assert len(both) >= 7
    others = {"mla_kv_a_proj", "moe_tp_experts"}
    missing = {path for path in theirs.keys() - both if theirs[path] not in others}
    assert all(
        path.endswith(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "q_proj"))
        for path in missing
    )


def test_a_plan_is_read_and_not_set() -> None:
    model = on_meta("qwen2")
    assert model.tp_size is None
    assert model.supports_tp_plan
    with pytest.raises(InputError, match="cannot be set: each layer says itself"):
        model.tp_plan = {}

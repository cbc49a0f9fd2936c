"""`quintet plan --world --device`: the split, what each device needs, and typed refusals."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from released import RELEASED


@pytest.fixture
def v3(tmp_path: Path) -> Path:
    return written(tmp_path, "DeepSeek-V3")


def written(root: Path, name: str) -> Path:
    model_type, values = RELEASED[name]
    content = {"model_type": model_type, "torch_dtype": "bfloat16", **values}
    (root / "config.json").write_text(json.dumps(content))
    return root


def planned(quintet: Any, *arguments: object, code: int = 0) -> Any:
    result = quintet("plan", *arguments, "--json")
    assert result.code == code, result.err
    return json.loads(result.out)


def test_a_released_v3_is_split_over_two_nodes_in_seconds(v3: Path, quintet: Any) -> None:
    started = time.process_time()
    facts = planned(quintet, v3, "--world", "2x8", "--device", "h100", "--tp", 16, "--ep", 16)
    assert time.process_time() - started < 10
    assert facts["fits"] is True
    assert (facts["split"]["tp"], facts["split"]["ep"]) == (16, 16)
    assert facts["held_as"] == "fp8 and bfloat16"
    # A sixteenth of the prediction layer's 11.6 billion on top of 43.2.
    assert 43.7e9 < facts["weights"]["a_device"] < 44.1e9
    assert sum(facts["weights"].values()) == 2 * facts["weights"]["a_device"]
    assert facts["needed"] < facts["world"]["room"] == 72 * 10**9
    assert facts["room"]["tokens"] > 390_000
    for pace in (facts["prefill"], facts["decode"], facts["when_full"]):
        assert 0 < pace["tokens_per_second"] < pace["at_most"]
        assert pace["bound"] in ("memory", "products", "sums", "exchange", "stages")
    assert facts["communication"]["bytes_per_layer_and_token"] == 2 * 2 * 15 / 16 * 7168 * 2


def test_the_split_to_use_is_the_fastest_that_fits(v3: Path, quintet: Any) -> None:
    facts = planned(quintet, v3, "--world", "2x8", "--device", "h100", "--splits", 100)
    paces = [facts["decode"]["tokens_per_second"]]
    paces += [one["tokens_per_second"] for one in facts["other_splits"]]
    assert paces == sorted(paces, reverse=True)
    assert len(paces) > 10
    assert all(one["needed"] <= facts["world"]["room"] for one in facts["other_splits"])
    limited = planned(quintet, v3, "--world", "2x8", "--device", "h100", "--max-pp", 1)
    assert limited["split"]["pp"] == 1


def test_what_does_not_fit_says_what_would(v3: Path, quintet: Any) -> None:
    result = quintet("plan", v3 / "config.json", "--world", "8", "--device", "a100")
    assert result.code == 5
    assert "held as        bfloat16" in result.out, "an A100 multiplies no FP8"
    assert "GB of each a100 can be planned with" in result.err
    assert "--world 4x8" in result.err
    assert "--quantize int4" in result.err
    assert result.is_one_screen
    facts = planned(quintet, v3, "--world", "4x8", "--device", "a100")
    assert facts["fits"] is True


def test_attention_by_rows_is_one_option(v3: Path, quintet: Any) -> None:
    arguments = ("--world", "2x8", "--device", "h200", "--batch", 64)
    facts = planned(quintet, v3, *arguments, "--dp-attention")
    split = facts["split"]
    assert (split["tp"], split["ep"], split["dp"]) == (1, 16, 16)
    assert facts["communication"]["decode_seconds"].keys() == {"exchange"}
    refused = quintet("plan", v3, *arguments, "--dp-attention", "--tp", 2)
    assert (refused.code, refused.out) == (2, "")


def test_a_cache_of_few_bits_holds_more(v3: Path, quintet: Any) -> None:
    arguments = ("--world", "2x8", "--device", "h100", "--tp", 16)
    plain = planned(quintet, v3, *arguments)
    coded = planned(quintet, v3, *arguments, "--cache-dtype", "int8")
    assert coded["cache"]["per_token"] == 61 * (576 + 2 * 2)
    assert coded["room"]["tokens"] > 1.9 * plain["room"]["tokens"]


def test_this_machine_is_a_device_too(chat_model: Path, quintet: Any) -> None:
    facts = planned(quintet, chat_model, "--device", "here", "--context", 64)
    assert facts["world"]["nodes"] == facts["world"]["per_node"] == 1
    assert facts["split"]["tp"] == 1
    assert "communication" not in facts
    halves = planned(quintet, chat_model, "--device", "here", "--world", 2, "--context", 64)
    assert halves["world"]["memory"] < 0.6 * facts["world"]["memory"]


def test_the_table(v3: Path, quintet: Any) -> None:
    result = quintet("plan", v3, "--world", "2x8", "--device", "h100", "--batch", 32)
    assert result.code == 0
    for label in ("world ", "split ", "weights ", "cache ", "needed ", "decode ", "when full "):
        assert any(line.startswith(label) for line in result.out.splitlines()), label
    assert "routed experts: " in result.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--world", "2y8", "--device", "h100"), "NODESxDEVICES such as 2x8"),
        (("--world", "0x8", "--device", "h100"), "from 1 to"),
        (("--world", "2x8"), "Give --device: a100"),
        (("--device", "h1000"), "there are a100"),
        (("--device", "h100,memory=lots"), "'5GB'"),
        (("--device", "h100,memory"), "KEY=VALUE"),
        (("--device", "h100,colour=3"), "KEY=VALUE"),
        (("--device", "h100,link=fast"), "3.35TB/s"),
        (("--device", "h100,usable=2"), "at most 1"),
        (("--world", "3", "--device", "h100", "--tp", "2"), "tp times pp times dp"),
        (("--world", "3", "--device", "h100", "--tp", "3"), "num_attention_heads"),
        (("--tp", "2"), "give --world and --device"),
        (("--device", "h100", "--memory", "80GB"), "h100,memory=96GB"),
        (("--device", "a100", "--quantize", "fp8"), "use int8 or int4"),
    ],
)
def test_what_is_no_world_is_refused(
    chat_model: Path, quintet: Any, arguments: tuple[str, ...], said: str
) -> None:
    result = quintet("plan", chat_model, *arguments)
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert result.is_one_screen


def test_a_training_is_planned_too(tmp_path: Path, quintet: Any) -> None:
    small = written(tmp_path, "Qwen2-7B")
    arguments = (small, "--train", "--world", "8", "--device", "h100", "--batch", 64)
    facts = planned(quintet, *arguments)
    assert facts["fits"] is True
    split = facts["split"]
    assert split["tp"] * split["pp"] * split["dp"] * split["fsdp"] == 8
    parts = ("weights", "gradients", "optimiser", "copies", "activations", "logits")
    assert facts["needed"] == sum(facts[part] for part in parts)
    assert 2 * facts["weights"] == facts["optimiser"]
    assert 0 < facts["learns"]["tokens_per_second"] < facts["learns"]["at_most"]
    muon = planned(quintet, *arguments, "--optimizer", "muon", "--fsdp", 8)
    assert muon["split"]["fsdp"] == 8
    assert muon["optimiser"] < 1.2 * muon["weights"]
    cut = (*arguments, "--recompute", "--tp", 4)
    sliced = planned(quintet, *cut, "--sequence-parallel")
    # Of what layers keep, their input is a quarter; the largest layer is there once, whole.
    assert sliced["activations"] < 0.7 * planned(quintet, *cut)["activations"]
    few = quintet("plan", *arguments[:2], "--world", 2, "--device", "h100", "--batch", 2)
    assert few.code == 5
    assert "it would with --recompute" in few.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--train", "--cache-dtype", "int8"), "leave it out with --train"),
        (("--recompute",), "give --train"),
        (("--sequence-parallel",), "give --train"),
        (("--train", "--sequence-parallel"), "let tp be more"),
        (("--train", "--quantize", "int8"), "do not learn"),
        (("--train", "--dtype", "float16"), "bfloat16 or float32"),
    ],
)
def test_options_of_the_other_kind_are_refused(
    chat_model: Path, quintet: Any, arguments: tuple[str, ...], said: str
) -> None:
    result = quintet("plan", chat_model, "--device", "h100", *arguments)
    assert (result.code, result.out) == (2, "")
    assert said in result.err

"""`quintet plan`: sizes from config.json alone, layouts, and exit code 5."""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.families import FAMILIES, Family
from quintet import AutoModelForCausalLM, demo_model
from quintet.modeling.init_on_meta import init_on_meta
from quintet.modeling.sizes import measure
from quintet.serving import Engine, Limits

each_family = pytest.mark.parametrize("family", FAMILIES, ids=str)
# DeepSeek-V3 as released.
V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "num_nextn_predict_layers": 1,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


@pytest.fixture
def v3(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(V3))
    return tmp_path


def planned(quintet: Any, *arguments: object, code: int = 0) -> Any:
    result = quintet("plan", *arguments, "--json")
    assert result.code == code, result.err
    return json.loads(result.out)


# -- sizes -----------------------------------------------------------------------------------


@torch.no_grad()
@each_family
def test_the_cache_is_as_large_as_it_says(family: Family) -> None:
    model = family.model_of()
    size = measure(model, torch.float32)
    ids = torch.arange(2 * 7).reshape(2, 7) + 3
    cache = model(ids, use_cache=True).past_key_values
    held = sum(x.numel() for slot in cache.layers if slot is not None for x in slot.content(7))
    assert held == 2 * 7 * size.cache_per_token
    states = sum(slot.nbytes for slot in cache.states if slot is not None)
    assert states == 2 * 4 * size.state_per_row


@each_family
def test_a_skeleton_weighs_what_the_model_does(family: Family) -> None:
    model = family.model_of()
    bare = init_on_meta(type(model), model.config)
    assert all(p.is_meta for p in bare.parameters())
    size = measure(bare, torch.float32)
    assert size.parameters == model.num_parameters()
    weights = sum(t.nbytes for t in {id(t): t for t in model.state_dict().values()}.values())
    aliases = sum(model.state_dict()[name].nbytes for name in model.tied_names())
    buffer = model.model.rotary_emb.inv_freq.nbytes
    assert size.weight_bytes == weights - aliases + buffer
    routed = any(family.routes(model.config))
    assert (size.active < size.parameters) == routed


def test_active_parameters_are_those_that_a_token_meets(v3: Path, quintet: Any) -> None:
    facts = planned(quintet, v3, "--memory", "8x141GB")
    # 671 billion and the prediction layer's 11.6; 37 as the paper counts, with the embedding.
    assert 682.5e9 < facts["parameters"] < 682.7e9
    assert 37.4e9 < facts["active"] < 37.7e9


# -- plans -----------------------------------------------------------------------------------


def test_a_released_v3_is_laid_out_from_its_config_alone(v3: Path, quintet: Any) -> None:
    started = time.process_time()
    facts = planned(quintet, v3, "--memory", "8x141GB", "--context", 32768, "--batch", 4)
    assert time.process_time() - started < 5
    assert facts["fits"] is True
    assert facts["held_as"] == "fp8"
    assert facts["cache"] == 4 * 32768 * 61 * 576 * 2
    assert 680e9 < facts["weights"] < 690e9
    spans = [share["layers"] for share in facts["layout"].values()]
    assert spans[0][0] == 0
    assert spans[-1][1] == 61, "the prediction layer, too"
    assert all(first[1] + 1 == second[0] for first, second in itertools.pairwise(spans))
    assert facts["files"] is None
    assert "no weights seen" in quintet("plan", v3, "--memory", "8x141GB").out


def test_what_does_not_fit_ends_with_five_and_says_what_would(v3: Path, quintet: Any) -> None:
    result = quintet("plan", v3, "--memory", "4x141GB", "--dtype", "bfloat16", "--json")
    facts = json.loads(result.out)
    assert (result.code, facts["fits"]) == (5, False)
    assert facts["instead"] == "int4"
    assert f"error: {facts['needed'] / 1e9:.2f} GB needed, and there are 564.00 GB; " in result.err
    assert "it would with --quantize int4" in result.err
    assert result.is_one_screen
    assert planned(quintet, v3, "--memory", "4x141GB", "--quantize", "int4")["fits"] is True


def test_a_longer_context_and_more_rows_need_more(chat_model: Path, quintet: Any) -> None:
    short = planned(quintet, chat_model, "--context", 10)
    long = planned(quintet, chat_model, "--context", 20, "--batch", 3)
    assert long["cache"] == 6 * short["cache"]
    assert long["weights"] == short["weights"]
    half = planned(quintet, chat_model, "--dtype", "bfloat16", "--context", 10)
    assert 2 * half["cache"] == short["cache"]


def test_drafts_of_prediction_layers_are_counted_as_an_engine_does(
    chat_model: Path, quintet: Any
) -> None:
    demo = demo_model()
    rows, context = 3, 64
    model = AutoModelForCausalLM.from_pretrained(demo)
    with Engine(model, None, Limits(rows=rows, capacity=context), speculate="mtp") as engine:
        room = engine.room
    asked = (demo, "--context", context, "--batch", rows)
    plain = planned(quintet, *asked)
    drafting = planned(quintet, *asked, "--speculate", "mtp")
    assert drafting["cache"] == rows * context * room.token == plain["cache"] + drafting["drafts"]
    assert drafting["needed"] == plain["needed"] + drafting["drafts"]
    world = ("--device", "cpu", "--dtype", "bfloat16")
    several = [
        planned(quintet, *asked, *world, *more)["cache"]["per_token"]
        for more in ((), ("--speculate", "mtp"))
    ]
    assert several[1] - several[0] == drafting["drafts"] / rows / context
    # What is looked up is the text itself.
    assert planned(quintet, *asked, "--speculate", "lookup")["needed"] == plain["needed"]
    for more, message in (
        ((chat_model, "--speculate", "mtp"), "without layers of multi-token prediction"),
        ((demo, "--train", "--device", "cpu", "--speculate", "mtp"), "leave one out"),
    ):
        result = quintet("plan", *more)
        assert result.code == 2, result.err
        assert message in result.err


def test_the_longest_context_is_what_is_left(chat_model: Path, quintet: Any) -> None:
    facts = planned(quintet, chat_model, "--memory", "20MB", "--context", 8)
    assert facts["longest_context"] == 256
    assert list(facts["memory"]) == ["device_0"]
    assert facts["memory"]["device_0"] == 20_000_000
    assert facts["files"]["here"] is True


def test_a_context_the_model_has_no_positions_for_is_refused(
    chat_model: Path, quintet: Any
) -> None:
    assert quintet("plan", chat_model, "--context", 256).code == 0
    result = quintet("plan", chat_model, "--context", 257)
    assert (result.code, result.out) == (2, "")
    assert "--context 257 is more than the 256 tokens" in result.err


def test_where_nothing_fits_the_least_that_is_needed_is_named(v3: Path, quintet: Any) -> None:
    result = quintet("plan", v3, "--memory", "24GB", "--json")
    facts = json.loads(result.out)
    assert result.code == 5
    assert facts["instead"] is None
    assert 300e9 < facts["least"] < 450e9
    assert f"the least that is needed is {facts['least'] / 1e9:.2f} GB" in result.err


@pytest.mark.parametrize("memory", ["much", "yx80GB", "0x80GB", "-3GB"])
def test_a_memory_that_is_none_is_refused(chat_model: Path, quintet: Any, memory: str) -> None:
    result = quintet("plan", chat_model, f"--memory={memory}")
    assert result.code == 2
    assert result.is_one_screen


def test_the_table(chat_model: Path, quintet: Any) -> None:
    result = quintet("plan", chat_model)
    assert result.code == 0
    assert "\x1b" not in result.out
    facts = planned(quintet, chat_model)
    assert f"needed           {facts['needed'] / 1e6:.2f} MB\n" in result.out
    lines = result.out.splitlines()
    assert lines[0].split() == ["model", str(chat_model)]
    assert any(line.startswith("layout") and "layers 0 to 1" in line for line in lines)

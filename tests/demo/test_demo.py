"""The packaged model is small, loads by itself, has learned something, and drafts what it says."""

import gzip
import importlib.util
import lzma
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

from quintet import AutoModelForCausalLM, AutoTokenizer, demo_model
from quintet.modeling.sizes import measure
from quintet.training.evaluation import evaluate
from quintet.training.scoring import text_document

MOST_BYTES = 12_000_000


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "train_stdlib.py"
    spec = importlib.util.spec_from_file_location("train_stdlib", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    import sys

    sys.modules["train_stdlib"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts(recipe: ModuleType) -> list[str]:
    """Files that the model was not trained on: a sample; the model card is about all of them."""
    held_out = recipe.collect(Path(sysconfig.get_paths()["stdlib"])).held_out
    return sorted(held_out, key=len)[len(held_out) // 2 :][:6]


def test_all_its_files_together_are_small() -> None:
    files = [path for path in demo_model().iterdir() if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in files
    }
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES


def test_it_is_stored_in_bfloat16_and_loads_as_stored() -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model())
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == "deepseek_v3"
    assert 5.5e6 < model.num_parameters() < 6e6
    # As many active for a token as would make a dense model of a third of the size.
    assert 1.5e6 < measure(model, torch.bfloat16).active < 1.8e6
    # Its steps are finer than bfloat16's.
    biases = [x for n, x in model.named_buffers() if n.endswith("e_score_correction_bias")]
    assert len(biases) == 5
    assert all(bias.dtype == torch.float32 and bool(bias.any()) for bias in biases)


@torch.no_grad()
def test_it_needs_fewer_bits_than_the_best_compressors_on_files_it_never_saw(
    texts: list[str],
) -> None:
    stream = "".join(texts).encode()
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    found = evaluate(model, [text_document(tokenizer, text) for text in texts])
    assert found.bits_per_byte is not None
    bits, violations = found.bits_per_byte * len(stream), found.balance
    assert bits < 0.75 * 8 * len(lzma.compress(stream, preset=9))
    assert bits < 0.75 * 8 * len(gzip.compress(stream, 9))
    # No loss kept the experts busy alike, only their bias: four routers in the main run, and one
    # in the prediction layer.
    assert len(violations) == 5
    assert max(violations.values()) < 1
    assert sum(violations.values()) / 5 < 0.6


def test_its_prediction_layer_is_there_and_most_of_its_drafts_are_taken(texts: list[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    assert model.prediction_depth() == model.config.num_nextn_predict_layers == 1
    drafted = accepted = 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, 200:300]
        options = {"max_new_tokens": 40, "do_sample": False}
        plain = model.generate(ids, **options)
        out = model.generate(ids, **options, use_mtp=True, return_dict_in_generate=True)
        assert torch.equal(out.sequences, plain)
        drafted += out.speculation.drafted_tokens
        accepted += out.speculation.accepted_tokens
    assert drafted > 100
    assert accepted > 0.5 * drafted


def test_its_greedy_continuation_is_python_and_repeatable() -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    inputs = tokenizer("class Stack:\n\n    def __init__(self", return_tensors="pt")
    out = [model.generate(inputs, max_new_tokens=24, do_sample=False) for _ in range(2)]
    assert torch.equal(out[0], out[1])
    text = tokenizer.decode(out[0][0])
    head = text[: text.index("\n        ") + 1] + "        pass\n"
    compile(head, "<demo>", "exec")

"""The packaged model is small, loads by itself, and has learned something."""

import gzip
import importlib.util
import lzma
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

from quintet import AutoModelForCausalLM, AutoTokenizer, demo_model

MOST_BYTES = 6_000_000


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


def test_all_its_files_together_are_small() -> None:
    files = [path for path in demo_model().iterdir() if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in files
    }
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES


def test_it_is_stored_in_bfloat16_and_loads_as_stored() -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model())
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == "qwen2"
    assert model.num_parameters() < 3e6


@torch.no_grad()
def test_it_needs_fewer_bits_than_the_best_compressors_on_files_it_never_saw(
    recipe: ModuleType,
) -> None:
    held_out = recipe.collect(Path(sysconfig.get_paths()["stdlib"])).held_out
    # A sample of the files; the model card has the figure of all of them.
    texts = sorted(held_out, key=len)[len(held_out) // 2 :][:6]
    stream = "".join(texts).encode()
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    bits = recipe.held_out_bits(model, tokenizer.backend_tokenizer, texts)
    assert bits < 8 * len(lzma.compress(stream, preset=9))
    assert bits < 8 * len(gzip.compress(stream, 9))


def test_its_greedy_continuation_is_python_and_repeatable() -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    inputs = tokenizer("class Stack:\n    def __init__(self", return_tensors="pt")
    out = [model.generate(inputs, max_new_tokens=24, do_sample=False) for _ in range(2)]
    assert torch.equal(out[0], out[1])
    text = tokenizer.decode(out[0][0])
    head = text[: text.index("\n        ") + 1] + "        pass\n"
    compile(head, "<demo>", "exec")

"""A model that talks, from its file to its answer, in every format: what no random weights show."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quintet import AutoModelForCausalLM, AutoTokenizer, grammar
from quintet.conversion import convert

# Without the system message its first word is drawn by less than bfloat16 keeps of a logit (25.33
# against 25.24).
QUESTION = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "What is the capital of France?"},
]


@pytest.fixture(scope="module")
def checkpoint(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as safetensors in bfloat16, with its tokenizer."""
    root = tmp_path_factory.mktemp("smollm2") / "model"
    convert(smollm2, root, quantize="none", dtype="bfloat16")
    return root


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


def answer(model: Any, tokenizer: Any) -> str:
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    new = out[0, prompt["input_ids"].shape[1] :]
    # What ends an answer came with the model.
    assert new[-1] in model.generation_config.eos_token_id or len(new) == 12
    text: str = tokenizer.decode(new, skip_special_tokens=True)
    return text


def test_the_file_answers(smollm2: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert "Paris" in answer(model, tokenizer)
    of_file = AutoTokenizer.from_pretrained(smollm2)
    wanted = tokenizer.apply_chat_template(QUESTION, tokenize=False)
    assert of_file.apply_chat_template(QUESTION, tokenize=False) == wanted


def test_the_file_fills_a_schema(smollm2: Path, tokenizer: Any) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "city": {"type": "string", "maxLength": 20},
        },
        "required": ["name", "age", "city"],
        "additionalProperties": False,
    }
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    processor = grammar.compile(grammar.json_schema(schema), tokenizer, model.config.vocab_size)
    asked = "Ada is 36 years old and lives in London. Write her name, age and city as JSON."
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, logits_processor=[processor], max_new_tokens=60, do_sample=False)
    text = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert json.loads(text) == {"name": "Ada", "age": 36, "city": "London"}


@pytest.mark.parametrize(
    ("dtype", "quantize"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8"), ("auto", "int4")],
    ids=["float32", "bfloat16", "int8", "int4"],
)
def test_a_converted_checkpoint_answers(
    checkpoint: Path, tokenizer: Any, dtype: Any, quantize: str | None
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, quantize=quantize)
    assert "Paris" in answer(model, tokenizer)

"""Texts follow their grammar, however they are made."""

import re
from typing import Any

import pytest
import torch

from quintet import AutoModelForCausalLM, AutoTokenizer, demo_model, grammar
from quintet.generation.engine import Engine
from quintet.grammar import Constraint, Grammars

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CONSTRAINTS = {
    "schema": grammar.json_schema(PERSON),
    "regex": grammar.regex(r"[a-z]{3}/[0-9]{1,4}"),
    "choice": grammar.choice(['no "x"', "yes\n"]),
    "lark": grammar.lark('start: "a"{1,4} "b"'),
}
DRAFTS: dict[str, dict[str, Any]] = {
    "none": {},
    "lookup": {"prompt_lookup_num_tokens": 6},
    "layers": {"use_mtp": True, "num_assistant_tokens": 3},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo_model())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_model())


@pytest.fixture(scope="module")
def grammars(model: Any, tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, model.config.vocab_size)


def written(
    model: Any, tokenizer: Any, processor: Any, prompt: str = "def f(x):", **options: Any
) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 60, **options}
    ids = model.generate(**inputs, logits_processor=[processor], **options)
    new = ids[0][inputs["input_ids"].shape[1] :].tolist()
    assert new[-1] == tokenizer.eos_token_id
    return tokenizer.decode(new, skip_special_tokens=True)


def follows(kind: str, text: str) -> bool:
    patterns = {
        "schema": r'\{"name": ?"[^"]*", ?"age": ?\d+, ?"tags": ?\[("[ab]"(, ?"[ab]")*)?\]\}',
        "regex": r"[a-z]{3}/[0-9]{1,4}",
        "choice": 'no "x"|yes\n',
        "lark": "a{1,4}b",
    }
    return re.fullmatch(patterns[kind], text) is not None


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_drafts_make_the_same_text(
    model: Any, tokenizer: Any, grammars: Grammars, kind: str
) -> None:
    texts = {
        written(model, tokenizer, grammars.compile(CONSTRAINTS[kind]), **options)
        for options in DRAFTS.values()
    }
    assert len(texts) == 1
    assert follows(kind, texts.pop())


@pytest.mark.parametrize("kind", CONSTRAINTS)
@pytest.mark.parametrize("drafts", DRAFTS)
def test_what_is_drawn_follows(
    model: Any, tokenizer: Any, grammars: Grammars, kind: str, drafts: str
) -> None:
    text = written(
        model,
        tokenizer,
        grammars.compile(CONSTRAINTS[kind]),
        do_sample=True,
        temperature=1.5,
        generator=torch.Generator().manual_seed(3),
        **DRAFTS[drafts],
    )
    assert follows(kind, text)


@pytest.mark.parametrize("constraint", [grammar.choice(["yes"]), grammar.regex("")])
def test_a_text_that_can_only_end_ends(
    model: Any, tokenizer: Any, grammars: Grammars, constraint: Constraint
) -> None:
    assert written(model, tokenizer, grammars.compile(constraint)) in {"yes", ""}


def test_rows_of_an_engine_draft_by_their_own(
    model: Any, tokenizer: Any, grammars: Grammars
) -> None:
    engine = Engine(model, rows=len(CONSTRAINTS) + 1, capacity=128)
    asked = {"do_sample": False, "max_new_tokens": 60}
    ids = tokenizer("def f(x):")["input_ids"]
    rows = {
        kind: engine.sequence(
            ids, logits_processor=[grammars.compile(constraint)], **asked, **DRAFTS["layers"]
        )
        for kind, constraint in CONSTRAINTS.items()
    }
    rows["free"] = engine.sequence(ids, **asked, **DRAFTS["layers"])
    for sequence in rows.values():
        engine.add(sequence)
    while not all(sequence.finished for sequence in rows.values()):
        engine.step([*rows.values()])
    for kind, constraint in CONSTRAINTS.items():
        text = tokenizer.decode(rows[kind].new, skip_special_tokens=True)
        assert text == written(model, tokenizer, grammars.compile(constraint))
    alone = model.generate(torch.tensor([ids]), **asked)[0, len(ids) :]
    assert rows["free"].new == alone.tolist()

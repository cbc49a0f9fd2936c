"""Rows with grammars of their own beside rows without one, in every family and both engines."""

import re
from typing import Any

import pytest
import torch

from conformance.families import Family, each
from quintet import grammar
from quintet.errors import GrammarError
from quintet.generation.engine import Engine
from quintet.grammar import Constraint, Grammars
from quintet.serving import Answer, Limits
from quintet.serving import Engine as ServingEngine
from tiny import trained_tokenizer

TOKENIZER: Any = trained_tokenizer()
V, END = len(TOKENIZER) + 24, TOKENIZER.eos_token_id
GRAMMARS = Grammars(TOKENIZER, V)
PERSON = grammar.json_schema(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z]{1,4}$"},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
KINDS: dict[str, tuple[Constraint, str]] = {
    "schema": (PERSON, r'\{"name": ?"[a-z]{1,4}", ?"age": ?\d{1,2}\}'),
    "regex": (grammar.regex("[0-9]{2,4}-[a-f]{2}"), "[0-9]{2,4}-[a-f]{2}"),
    "choice": (grammar.choice(["yes", "no", "perhaps"]), "yes|no|perhaps"),
}
ASKED: dict[str, Any] = {"eos_token_id": END, "pad_token_id": 0, "max_new_tokens": 40}
# So deep that the lexer gives up in the middle of the text.
TOO_COMPLEX = grammar.regex("([a-z]{1,20}|[0-9]{1,20}){1,400}")


def prompt_of(seed: int, length: int = 7) -> list[int]:
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(6, len(TOKENIZER), (length,), generator=dice).tolist()


def options_of(row: int) -> dict[str, Any]:
    drafts = {"prompt_lookup_num_tokens": 4} if row % 2 else {}
    return {**ASKED, "do_sample": row % 3 == 2, **drafts}


def seeded(row: int) -> torch.Generator:
    return torch.Generator().manual_seed(row)


def follows(kind: str, ids: list[int]) -> bool:
    assert ids[-1] == END
    return re.fullmatch(KINDS[kind][1], TOKENIZER.decode(ids[:-1])) is not None


def alone(model: Any, row: int, kind: str | None) -> list[int]:
    processors = [] if kind is None else [GRAMMARS.compile(KINDS[kind][0])]
    prompt = torch.tensor([prompt_of(row)])
    ids = model.generate(
        prompt, logits_processor=processors, generator=seeded(row), **options_of(row)
    )
    return ids[0, prompt.shape[1] :].tolist()


@each
def test_each_row_follows_its_own(family: Family) -> None:
    model = family.model_of(vocab_size=V)
    kinds = ["schema", None, "regex", "choice"]
    engine = Engine(model, rows=len(kinds), capacity=64)
    rows = [
        engine.sequence(
            prompt_of(row),
            logits_processor=[] if kind is None else [GRAMMARS.compile(KINDS[kind][0])],
            generator=seeded(row),
            **options_of(row),
        )
        for row, kind in enumerate(kinds)
    ]
    for sequence in rows:
        engine.add(sequence)
    while not all(sequence.finished for sequence in rows):
        engine.step(rows)
    for row, (sequence, kind) in enumerate(zip(rows, kinds, strict=True)):
        assert sequence.error is None
        assert sequence.new == alone(model, row, kind)
        assert kind is None or follows(kind, sequence.new)


@each
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_change_no_text(family: Family, kind: str) -> None:
    model = family.model_of(vocab_size=V)
    prompt = torch.tensor([prompt_of(3)])
    texts = [
        model.generate(
            prompt,
            logits_processor=[GRAMMARS.compile(KINDS[kind][0])],
            do_sample=False,
            **ASKED,
            **drafts,
        )[0, prompt.shape[1] :].tolist()
        for drafts in ({}, {"prompt_lookup_num_tokens": 5})
    ]
    assert texts[0] == texts[1]
    assert follows(kind, texts[0])


def test_rows_of_a_batch_and_beams_follow(model: Any) -> None:
    prompts = torch.tensor([[0, 0, *prompt_of(1, 5)], prompt_of(2)])
    asked = {**ASKED, "attention_mask": (prompts > 0).long()}
    asked["attention_mask"][1] = 1
    ways: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
    ]
    for way in ways:
        processor = GRAMMARS.compile(KINDS["schema"][0])
        rows = model.generate(prompts, logits_processor=[processor], **asked, **way)
        for row in rows[:, prompts.shape[1] :].tolist():
            assert follows("schema", row[: row.index(END) + 1])


@pytest.fixture(scope="module")
def model() -> Any:
    from conformance.families import FAMILIES

    return FAMILIES[0].model_of(vocab_size=V, max_position_embeddings=512)


@pytest.fixture(scope="module")
def engine(model: Any) -> Any:
    limits = Limits(rows=4, capacity=400, piece=64)
    with ServingEngine(model, TOKENIZER, limits) as made:
        yield made


def text_of(answers: list[Answer]) -> str:
    return "".join(answer.text for answer in answers)


def test_a_server_s_engine_follows(engine: ServingEngine) -> None:
    asked = []
    for row, kind in enumerate([*KINDS, *KINDS]):
        processor = GRAMMARS.compile(KINDS[kind][0])
        asked.append(
            (kind, engine.answer(prompt_of(row), logits_processor=[processor], **options_of(row)))
        )
    for kind, answers in asked:
        found = list(answers)
        assert re.fullmatch(KINDS[kind][1], text_of(found))
        assert found[-1].finish_reason == "stop"


def test_a_text_that_is_cut_says_so(engine: ServingEngine) -> None:
    processor = GRAMMARS.compile(PERSON)
    options = {**ASKED, "max_new_tokens": 5}
    found = list(engine.answer(prompt_of(0), logits_processor=[processor], **options))
    assert found[-1].finish_reason == "length"
    assert text_of(found).startswith('{"')


def test_a_grammar_that_gives_up_ends_its_own_row(engine: ServingEngine, model: Any) -> None:
    bad = engine.answer(
        prompt_of(0),
        logits_processor=[GRAMMARS.compile(TOO_COMPLEX)],
        suppress_tokens=[END],
        max_new_tokens=300,
        do_sample=True,
        generator=seeded(0),
    )
    good = engine.answer(
        prompt_of(1), logits_processor=[GRAMMARS.compile(PERSON)], do_sample=False, **ASKED
    )
    with pytest.raises(GrammarError, match="too complex"):
        list(bad)
    assert re.fullmatch(KINDS["schema"][1], text_of(list(good)))


def test_a_grammar_against_other_options_ends_its_own_row(engine: ServingEngine) -> None:
    with pytest.raises(Exception, match="no token"):
        list(
            engine.answer(
                prompt_of(0),
                logits_processor=[GRAMMARS.compile(PERSON)],
                suppress_tokens=[token for token in range(V) if token != END],
                **ASKED,
            )
        )
    assert engine.healthy

"""Grammars of outlines, xgrammar and llguidance bind our texts as they do Transformers'."""

import re
from typing import Any, Literal

import pytest
import torch

from conformance.families import FAMILIES, Family, each
from outside import VOCABULARY, pair, tokenizer, tool

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = ["Hello", "def f"]
PATTERN = "[a-c]{3}x"


@pytest.fixture(scope="module")
def theirs() -> Any:
    return tokenizer().to_transformers()


def texts(model: Any, its: Any, processor: Any, prompts: list[str]) -> list[str]:
    batch = its(prompts, return_tensors="pt", padding=True, padding_side="left")
    made = model.generate(
        **batch, logits_processor=[processor], max_new_tokens=8, do_sample=False, num_beams=1
    )
    return its.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@each
def test_outlines(family: Family, theirs: Any) -> None:
    outlines = tool("outlines")
    made = []
    for model in pair(family):
        wrapped = outlines.from_transformers(model, theirs)
        options = {"max_new_tokens": 8, "do_sample": False}
        made.append(
            [
                wrapped("Hi", outlines.types.Regex(PATTERN), **options),
                wrapped("Where is", Literal["Paris", "Rome"], **options),
                *wrapped.batch(PROMPTS, outlines.types.Regex("[0-9]{2}"), **options),
            ]
        )
    assert made[0] == made[1]
    assert re.fullmatch(PATTERN, made[0][0])
    assert made[0][1] in ("Paris", "Rome")
    assert all(re.fullmatch("[0-9]{2}", text) for text in made[0][2:])


@each
def test_xgrammar(family: Family, theirs: Any) -> None:
    xgrammar = tool("xgrammar")
    info = xgrammar.TokenizerInfo.from_huggingface(theirs, vocab_size=VOCABULARY)
    grammar = xgrammar.GrammarCompiler(info).compile_regex(PATTERN)
    hf = tool("xgrammar.contrib.hf")
    made = [texts(m, theirs, hf.LogitsProcessor(grammar), PROMPTS) for m in pair(family)]
    assert made[0] == made[1]
    assert all(re.fullmatch(PATTERN, text) for text in made[0])


class Guided:
    """What a user of llguidance writes for `generate()` of Transformers; for one row."""

    def __init__(self, its: Any, pattern: str, prompt: int) -> None:
        self.llguidance, self.torch = tool("llguidance"), tool("llguidance.torch")
        table = tool("llguidance.hf").from_tokenizer(its, VOCABULARY)
        grammar = self.llguidance.grammar_from("regex", pattern)
        self.matcher = self.llguidance.LLMatcher(table, grammar)
        self.mask = self.torch.allocate_token_bitmask(1, VOCABULARY)
        self.prompt = prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > self.prompt:
            self.matcher.consume_token(int(input_ids[0, -1]))
        self.torch.fill_next_token_bitmask(self.matcher, self.mask, 0)
        self.torch.apply_token_bitmask_inplace(scores, self.mask)
        return scores


@each
def test_llguidance(family: Family, theirs: Any) -> None:
    length = len(theirs(PROMPTS[0]).input_ids)
    made = [
        texts(model, theirs, Guided(theirs, PATTERN, length), PROMPTS[:1]) for model in pair(family)
    ]
    assert made[0] == made[1]
    assert re.fullmatch(PATTERN, made[0][0])


def test_a_grammar_binds_samples(theirs: Any) -> None:
    xgrammar = tool("xgrammar")
    info = xgrammar.TokenizerInfo.from_huggingface(theirs, vocab_size=VOCABULARY)
    grammar = xgrammar.GrammarCompiler(info).compile_regex(PATTERN)
    hf = tool("xgrammar.contrib.hf")
    model = pair(FAMILIES[0])[0]
    batch = theirs(PROMPTS[:1], return_tensors="pt")
    made = model.generate(
        **batch, logits_processor=[hf.LogitsProcessor(grammar)], max_new_tokens=8, do_sample=True
    )
    text = theirs.decode(made[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert re.fullmatch(PATTERN, text)

"""The last token of a prompt is chosen again, and only how it ends may change."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quintet import AutoModelForCausalLM, AutoTokenizer
from quintet.errors import InputError
from quintet.generation.healing import HealedTokenLogitsProcessor, heal
from quintet.generation.prompt import read_prompt


@pytest.fixture(scope="module")
def opened(chat_model: Path) -> tuple[Any, Any]:
    return (
        AutoModelForCausalLM.from_pretrained(chat_model),
        AutoTokenizer.from_pretrained(chat_model),
    )


def test_what_may_come_first_begins_with_what_was_taken_off(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    ids = tokenizer(["The c", "He said t"], padding=True, return_tensors="pt")
    V = model.config.vocab_size
    cpu = torch.device("cpu")
    prompt = read_prompt(ids, None, None, None, None, vocab_size=V, device=cpu)
    healing = heal(prompt, tokenizer, V)
    shorter, (processor,) = healing.prompt, healing.processors
    assert torch.equal(shorter.ids, prompt.ids[:, :-1])
    assert isinstance(processor, HealedTokenLogitsProcessor)
    allowed = processor.allowed
    vocabulary = tokenizer.get_vocab()
    for row, last in enumerate(prompt.ids[:, -1].tolist()):
        begin = tokenizer.convert_ids_to_tokens(last)
        expected = {
            token
            for text, token in vocabulary.items()
            if text.startswith(begin) and token not in tokenizer.all_special_ids
        }
        assert set(allowed[row].nonzero()[:, 0].tolist()) == expected | {last}
        assert len(expected) > 1


@pytest.mark.parametrize("sample", [False, True])
def test_the_text_still_begins_with_the_prompt(opened: tuple[Any, Any], sample: bool) -> None:
    model, tokenizer = opened
    for text in ("The c", "He said t", "a ", "line\n"):
        inputs = tokenizer(text, return_tensors="pt")
        out = model.generate(
            inputs, token_healing=True, tokenizer=tokenizer, max_new_tokens=6, do_sample=sample
        )
        assert out.shape[1] == inputs["input_ids"].shape[1] + 6
        assert tokenizer.decode(out[0]).startswith(text)


def test_a_special_token_at_the_end_stays(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    special = tokenizer.all_special_ids[0]
    ids = torch.tensor([[5, 6, special]])
    out = model.generate(ids, token_healing=True, tokenizer=tokenizer, max_new_tokens=3)
    assert out[0, :3].tolist() == ids[0].tolist()


def test_a_single_token_is_left_as_it_is(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    ids = torch.tensor([[5]])
    healed = model.generate(ids, token_healing=True, tokenizer=tokenizer, max_new_tokens=4)
    assert torch.equal(healed, model.generate(ids, max_new_tokens=4))


def test_healing_needs_the_tokenizer(opened: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="needs the tokenizer"):
        opened[0].generate(torch.tensor([[5, 6]]), token_healing=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 2},
        {"forced_eos_token_id": 5},
    ],
    ids=str,
)
def test_a_row_of_one_token_leaves_the_others_healed(
    opened: tuple[Any, Any], options: dict[str, Any]
) -> None:
    model, tokenizer = opened
    texts = [tokenizer(text, return_tensors="pt").input_ids for text in ("The c", "He said t")]
    texts.insert(1, texts[0][:, :1])
    width = max(text.shape[1] for text in texts)
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, width - text.shape[1] :], mask[row, width - text.shape[1] :] = text, 1
    options = {
        "token_healing": True,
        "tokenizer": tokenizer,
        "max_new_tokens": 5,
        "eos_token_id": None,
        "pad_token_id": 0,
        **options,
    }

    def seed(row: int) -> torch.Generator:
        return torch.Generator().manual_seed(row)

    seeds = [seed(row) for row in range(3)]
    made = model.generate(ids, attention_mask=mask, generator=seeds, **options)
    assert made.shape == (3, width + 5)
    for row, text in enumerate(texts):
        alone = model.generate(text, generator=[seed(row)], **options)[0]
        # A row of one token lies a column further left, and is filled up behind.
        last = width + 4 if row == 1 else width + 5
        assert made[row, last - len(alone) : last].tolist() == alone.tolist()
    assert int(made[1, -1]) == 0

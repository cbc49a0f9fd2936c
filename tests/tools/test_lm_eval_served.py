"""lm-eval scores a served model as it scores the same one in its own process."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from outside import tool
from quintet import PreTrainedTokenizerFast, Qwen2ForCausalLM
from served import Running
from server.talking import talking

huggingface = tool("lm_eval.models.huggingface")
completions = tool("lm_eval.models.openai_completions")
instance = tool("lm_eval.api.instance")
pytestmark = pytest.mark.filterwarnings("ignore")

CHOICES = [
    ("Hello there", " how are"),
    ("def fib", "(n):"),
    ("The quick", " brown fox jumps"),
    ("Ünïcödé: naïve", " 你好,世界。 🙂"),
]
PROMPTS = [
    ("Hello", {"until": ["o", "a", "e", "i", "u", "n"], "max_gen_toks": 8}),
    ("def fibonacci", {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}),
]

Served = tuple[Running, Qwen2ForCausalLM, PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with talking() as it:
        yield it


def asked(model: Any, kind: str, arguments: list[Any]) -> list[Any]:
    requests = [
        instance.Instance(request_type=kind, doc={}, arguments=one, idx=n)
        for n, one in enumerate(arguments)
    ]
    found: list[Any] = getattr(model, kind)(requests, disable_tqdm=True)
    return found


@pytest.mark.parametrize("size", [1, 4])
def test_scores_are_those_of_the_model_itself(served: Served, size: int) -> None:
    server, model, tokenizer = served
    inside = huggingface.HFLM(
        pretrained=model, tokenizer=tokenizer.to_transformers(), device="cpu", batch_size=1
    )
    outside = completions.LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model="tiny",
        tokenizer_backend="remote",
        batch_size=size,
        num_concurrent=2,
    )
    expected = asked(inside, "loglikelihood", CHOICES)
    for (score, greedy), (wanted, is_greedy) in zip(
        asked(outside, "loglikelihood", CHOICES), expected, strict=True
    ):
        assert score == pytest.approx(wanted, abs=1e-4)
        assert greedy is is_greedy
    assert len({score for score, _ in expected}) == len(CHOICES)
    ids = tokenizer(CHOICES[0][0])["input_ids"]
    made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=3)[0, len(ids) :]
    likely = (CHOICES[0][0], tokenizer.decode(made))
    if tokenizer(likely[0] + likely[1])["input_ids"] == [*ids, *made.tolist()]:
        assert asked(outside, "loglikelihood", [likely])[0][1] is True
    assert asked(outside, "generate_until", PROMPTS) == asked(inside, "generate_until", PROMPTS)


def test_a_chat_goes_on_as_the_model_itself(served: Served) -> None:
    server, model, tokenizer = served
    chat = completions.LocalChatCompletion(
        base_url=f"{server.url}/v1/chat/completions", model="tiny", num_concurrent=2
    )
    said = [{"role": "user", "content": "Hello there"}]
    prompt = chat.apply_chat_template(said)
    options = {"until": ["e"], "max_gen_toks": 12}
    [found] = asked(chat, "generate_until", [(prompt, options)])
    ids = tokenizer.apply_chat_template(said, add_generation_prompt=True)
    made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0, len(ids) :]
    assert found == tokenizer.decode(made, skip_special_tokens=True).partition("e")[0]

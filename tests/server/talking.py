"""A small chat model that is served, and what tests of its routes share."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from quintet import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from quintet.server.registry import Loaded, Offer
from quintet.serving import Engine, Limits
from served import Running, serving
from tiny import SPECIAL, trained_tokenizer

CONTEXT = 1024
# What a chat of Qwen's kind looks like, tools and all.
TEMPLATE = """
{%- if messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content }}
{%- if tools %}{{- '\\n# Tools\\n<tools>' + (tools | tojson) + '</tools>' }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- elif tools %}
{{- '<|im_start|>system\\n# Tools\\n<tools>' + (tools | tojson) + '</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
{{- '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.role == 'assistant' and message.tool_calls %}
{{- '<|im_start|>assistant' }}
{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
{%- for call in message.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif not (message.role == 'system' and loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking %}{{- '<think>\\n' }}{%- endif %}
{%- endif %}"""


HOLES = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of a reasoning model that calls tools."""
    tokenizer = trained_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return tokenizer


def chat_model() -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """Return a model whose greedy text does not end by itself, and its tokenizer."""
    tokenizer = chat_tokenizer()
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 8,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.4,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[: len(SPECIAL)] = 0
        # Markers and ids without a token are not chosen greedily either.
        model.lm_head.weight[len(tokenizer) - 4 :] = 0
    return model, tokenizer


@contextmanager
def talking(
    made: tuple[Any, PreTrainedTokenizerFast] | None = None,
    limits: Limits | None = None,
    **changes: Any,
) -> Iterator[tuple[Running, Any, PreTrainedTokenizerFast]]:
    """Serve a model as `tiny`, by default a small one for chats."""
    model, tokenizer = made or chat_model()
    engine = Engine(model, tokenizer, limits or Limits(rows=4, capacity=CONTEXT))
    one = Loaded(engine, tokenizer, CONTEXT, "fp_test")
    with serving(Offer("tiny", lambda: one, loaded=one), **changes) as running:
        yield running, model, tokenizer


def events(server: Running, path: str, body: dict[str, Any]) -> list[str]:
    """Return the data of the events of a stream."""
    answer = server.ask("POST", path, {**body, "stream": True})
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.body.decode().split("\n\n")
    assert lines.pop() == ""
    return [line.removeprefix("data: ") for line in lines if not line.startswith(":")]


def chunks(server: Running, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    *data, last = events(server, path, body)
    assert last == "[DONE]"
    return [json.loads(one) for one in data]

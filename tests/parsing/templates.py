"""Small tokenizers whose chat templates have the shapes of released ones."""

from functools import cache

from tokenizers import AddedToken

import tiny
from quintet.tokenization import PreTrainedTokenizerFast

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEP, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
OUTPUT, OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
OUTPUTS, OUTPUTS_END = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
DEEPSEEK = [CALLS, CALLS_END, CALL, SEP, CALL_END, OUTPUT, OUTPUT_END, OUTPUTS, OUTPUTS_END]
DEEPSEEK += [USER, ASSISTANT]

_PLAIN = """
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

_HERMES = """
{%- if tools %}{{- '<|im_start|>system\nCall <tool_call>…</tool_call>:' }}
{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{% endfor %}{{- '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}
{{- '<|im_start|>assistant' }}
{%- if m.content %}{{- '\n' + m.content }}{% endif %}
{%- for call in m.tool_calls %}
{%- if call.function is defined %}{% set call = call.function %}{% endif %}
{{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
{{- call.arguments | tojson }}{{- '}\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}OPENING{% endif %}"""

# V3 writes a text or calls, and ends only several of them; R1 and V3.1 write both.
_FENCED = """
{%- set ns = namespace(tool=false) %}
{%- for m in messages %}
{%- if m.role == 'system' %}{{- m.content }}
{%- elif m.role == 'user' %}{% set ns.tool = false %}{{- '<｜User｜>' + m.content }}
{%- elif m.role == 'tool' %}{% set ns.tool = true %}
{{- '<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + m.content }}
{{- '<｜tool▁output▁end｜><｜tool▁outputs▁end｜>' }}
{%- elif CONDITION %}{% set ns.tool = false %}
{{- '<｜Assistant｜>' }}{% if m.content is not none %}{{- m.content }}{% endif %}
{{- '<｜tool▁calls▁begin｜>' }}
{%- for call in m.tool_calls %}{% if not loop.first %}{{- '\n' }}{% endif %}
{{- '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + call['function']['name'] }}
{{- '\n```json\n' + call['function']['arguments'] + '\n```<｜tool▁call▁end｜>' }}
{%- endfor %}{{- '<｜tool▁calls▁end｜><|im_end|>' }}
{%- else %}{{- '<｜Assistant｜>' + m.content + '<|im_end|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt and not ns.tool %}{{- '<｜Assistant｜>OPENING' }}{% endif %}"""

_BARE = """
{%- for m in messages %}
{%- if m.role == 'system' %}{{- m.content }}
{%- elif m.role == 'user' %}{{- '<｜User｜>' + m.content }}
{%- elif m.role == 'tool' %}{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- elif m.tool_calls is defined and m.tool_calls is not none %}
{{- '<｜Assistant｜></think>' }}{% if m.content is not none %}{{- m.content }}{% endif %}
{{- '<｜tool▁calls▁begin｜>' }}
{%- for call in m.tool_calls %}
{{- '<｜tool▁call▁begin｜>' + call['function']['name'] + '<｜tool▁sep｜>' }}
{{- call['function']['arguments'] + '<｜tool▁call▁end｜>' }}
{%- endfor %}{{- '<｜tool▁calls▁end｜><|im_end|>' }}
{%- else %}{{- '<｜Assistant｜></think>' + m.content + '<|im_end|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt and messages[-1].role == 'user' %}
{{- '<｜Assistant｜>' }}{{- '<think>' if thinking else '</think>' }}{% endif %}"""

THINKING = ["<think>", "</think>"]
HERMES = ["<tool_call>", "</tool_call>"]
TEMPLATES: dict[str, tuple[str, list[str]]] = {
    "plain": (_PLAIN, []),
    "qwen": (_HERMES.replace("OPENING", ""), HERMES),
    "qwen, text": (_HERMES.replace("OPENING", ""), []),
    "qwq": (
        _HERMES.replace("OPENING", "{{- '<think>\n' }}"),
        [*HERMES, *THINKING, "<tool_response>", "</tool_response>"],
    ),
    "v3": (
        _FENCED.replace("OPENING", "").replace("CONDITION", "m.content is none"),
        DEEPSEEK,
    ),
    "r1": (
        _FENCED.replace("OPENING", "<think>\\n").replace("CONDITION", "'tool_calls' in m"),
        [*DEEPSEEK, *THINKING],
    ),
    "v3.1": (_BARE, [*DEEPSEEK, *THINKING]),
}


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a template, in which the markers are tokens that are not special."""
    template, markers = TEMPLATES[name]
    made = tiny.trained_tokenizer()
    made.add_tokens([AddedToken(one, normalized=False, special=False) for one in markers])
    made.chat_template = template
    return made

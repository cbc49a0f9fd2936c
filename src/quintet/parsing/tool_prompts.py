"""System prompts that describe tools, for templates without a place for them.

Those of DeepSeek's models are such: the tools are told in the system prompt, in the form that the
models were trained with.
"""

import json

from quintet.parsing.format import Format

_SHOWN = """\
{%- if tools -%}
{%- set told = namespace(text='') -%}
{%- for tool in tools -%}
{%- set told.text = told.text + '\\n\\n### ' + tool.function.name + '\\nDescription: '
    + (tool.function.description or '') + '\\n\\nParameters: '
    + (tool.function.parameters | tojson) -%}
{%- endfor -%}
{%- set told.text = '## Tools\\nYou have access to the following tools:' + told.text + HOW -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set told.text = messages[0]['content'] + '\\n\\n' + told.text -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{%- set messages = [{'role': 'system', 'content': told.text}] + messages -%}
{%- endif -%}
"""
_HOW = """

IMPORTANT: ALWAYS adhere to this exact format for tool use:
{example}

Where:

- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- further calls follow in the same form, before what ends them all"""


def with_tools(template: str, written: Format) -> str:
    """Return a template that describes the tools in the system prompt.

    Args:
        template: one that has no place for them.
        written: how the model writes calls.
    """
    example = written.written([("tool_call_name", "tool_call_arguments")])
    how = json.dumps(_HOW.format(example=example), ensure_ascii=False)
    return _SHOWN.replace("HOW", how) + template

"""Tools, forms and thoughts in a chat: what is asked for is what comes, whole and streamed."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from quintet import PreTrainedTokenizerFast, Qwen2ForCausalLM
from quintet.grammar import GrammarProcessor, Grammars
from quintet.parsing import CODER
from quintet.server import shapes
from quintet.server.failures import ApiError
from quintet.server.protocol.formats import field_of
from quintet.server.shapes import Shapes
from served import Running
from server.talking import chat_model, chunks, talking
from waiting import PATIENCE, until

Served = tuple[Running, Qwen2ForCausalLM, PreTrainedTokenizerFast]
PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "How warm is it?"}
PLACES = {"type": "string", "enum": ["Bonn", "Rome"]}
SCHEMA = {
    "type": "object",
    "properties": {"place": PLACES, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["place", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "x", "parameters": SCHEMA}}
    for name in ("weather", "climate")
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with talking() as it:
        yield it


def asked(**body: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [USER], "temperature": 0, "max_tokens": 200, **body}


def answered(served: Served, **body: Any) -> dict[str, Any]:
    answer = served[0].ask("POST", PATH, asked(**body))
    assert answer.status == 200, answer.body
    [choice] = answer.json()["choices"]
    found: dict[str, Any] = choice
    return found


def test_calls_come_whole_and_in_pieces(served: Served) -> None:
    chosen = {"type": "function", "function": {"name": "climate"}}
    for choice, names in (("required", {"weather", "climate"}), (chosen, {"climate"})):
        body = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
        whole = answered(served, **body)
        assert whole["finish_reason"] == "tool_calls"
        assert whole["message"]["content"] is None
        [call] = whole["message"]["tool_calls"]
        assert call["id"].startswith("call_")
        assert call["type"] == "function"
        assert call["function"]["name"] in names
        arguments = json.loads(call["function"]["arguments"])
        assert arguments["place"] in PLACES["enum"]
        assert 1 <= arguments["days"] <= 9
        parts = [part["choices"][0] for part in chunks(served[0], PATH, asked(**body))]
        deltas = [part["delta"] for part in parts]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert deltas[-1] == {}
        assert parts[-1]["finish_reason"] == "tool_calls"
        first, *rest = [delta["tool_calls"][0] for delta in deltas[1:-1]]
        assert all("content" not in delta for delta in deltas[1:])
        assert first.pop("id").startswith("call_")
        assert first == {
            "index": 0,
            "type": "function",
            "function": {"name": call["function"]["name"], "arguments": ""},
        }
        assert all(set(one) == {"index", "function"} for one in rest)
        text = "".join(one["function"]["arguments"] for one in rest)
        assert text == call["function"]["arguments"]


def test_a_call_and_its_result_are_part_of_the_next_turn(served: Served) -> None:
    call = answered(served, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    for arguments in (None, {"place": "Bonn", "days": 1}):
        said = json.loads(json.dumps(call["message"]))
        if arguments is not None:
            said["tool_calls"][0]["function"]["arguments"] = arguments
        result = {
            "role": "tool",
            "tool_call_id": said["tool_calls"][0]["id"],
            "content": [{"type": "text", "text": "21 degrees"}],
        }
        for content in (None, ""):
            messages = [USER, {**said, "content": content}, result]
            answer = served[0].ask(
                "POST", PATH, asked(messages=messages, tools=TOOLS, max_tokens=4)
            )
            assert answer.status == 200, answer.body
            assert "warnings" not in answer.headers
    broken = json.loads(json.dumps(call["message"]))
    broken["tool_calls"][0]["function"]["arguments"] = '{"a'
    answer = served[0].ask("POST", PATH, asked(messages=[USER, broken, result], tools=TOOLS))
    assert answer.status == 400
    assert "messages[1].tool_calls[0]" in answer.error["message"]


def test_text_has_the_form_that_was_asked_for(served: Served) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA, "strict": True}}
    for body in ({"response_format": form}, {"response_format": form, "speculate": "lookup"}):
        whole = answered(served, **body)
        assert whole["finish_reason"] == "stop"
        assert set(json.loads(whole["message"]["content"])) == {"place", "days"}
    parts = chunks(served[0], PATH, asked(response_format=form, n=2, temperature=1, seed=1))
    for index in range(2):
        own = [p["choices"][0] for p in parts if p["choices"][0]["index"] == index]
        text = "".join(one["delta"].get("content", "") for one in own)
        assert json.loads(text)["place"] in PLACES["enum"]
    assert answered(served, regex="(yes|no)!{2}")["message"]["content"] in ("yes!!", "no!!")
    grammar = 'start: "<" ("a" | "b") ">"'
    assert answered(served, grammar=grammar)["message"]["content"] in ("<a>", "<b>")
    text = served[0].ask(
        "POST",
        "/v1/completions",
        {"model": "tiny", "prompt": "Hello", "regex": "(yes|no)!", "max_tokens": 9},
    )
    assert text.json()["choices"][0]["text"] in ("yes!", "no!")


def test_a_form_begins_behind_a_thought(served: Served) -> None:
    end = str(served[2].convert_tokens_to_ids("</think>"))
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA}}
    body = {"response_format": form, "reasoning_effort": "high"}
    for bias in (12, 100):
        own = answered(served, **body, logit_bias={end: bias})
        assert json.loads(own["message"]["content"])["place"] in PLACES["enum"]
    # A thought that is not over leaves nothing to have a form.
    own = answered(served, **body, logit_bias={end: -100}, max_tokens=9)
    assert own["message"]["reasoning_content"]
    assert (own["message"]["content"], own["finish_reason"]) == ("", "length")
    called = answered(
        served, tools=TOOLS, tool_choice="required", reasoning_effort="high", logit_bias={end: 100}
    )
    assert called["message"]["tool_calls"][0]["function"]["name"] in ("weather", "climate")


def test_a_form_that_cannot_be_is_refused(served: Served) -> None:
    for body in (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "number", "enum": ["a"]}},
            }
        },
        {"regex": "("},
        {"grammar": "start: nothing"},
    ):
        answer = served[0].ask("POST", PATH, asked(**body))
        assert answer.status == 400, answer.body
        assert answer.error["type"] == "invalid_request_error"


def test_a_form_binds_what_is_said_instead_of_calls(served: Served) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA, "strict": True}}
    mark = str(served[2].convert_tokens_to_ids("<tool_call>"))
    both = {"response_format": form, "tools": TOOLS}
    said = answered(served, **both, logit_bias={mark: -100})
    assert set(json.loads(said["message"]["content"])) == {"place", "days"}
    for body in ({**both, "logit_bias": {mark: 100}}, {**both, "tool_choice": "required"}):
        called = answered(served, **body, parallel_tool_calls=False)
        assert called["finish_reason"] == "tool_calls"
        assert called["message"]["content"] is None


def test_thoughts_are_told_apart(served: Served) -> None:
    think = {"chat_template_kwargs": {"enable_thinking": True}, "max_tokens": 6}
    whole = served[0].ask("POST", PATH, asked(**think)).json()
    message = whole["choices"][0]["message"]
    assert message["content"] == ""
    assert message["reasoning_content"] == message["reasoning"] != ""
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] == 6
    parts = [part["choices"][0]["delta"] for part in chunks(served[0], PATH, asked(**think))]
    assert "".join(p.get("reasoning_content", "") for p in parts) == message["reasoning_content"]
    assert all("content" not in part for part in parts[1:])
    end = str(served[2].convert_tokens_to_ids("</think>"))
    # A second end of a thought is text.
    both = answered(served, **{**think, "logit_bias": {end: 60}})["message"]
    assert both["content"] == "</think>" * 5
    assert "reasoning" not in both
    for effort, thinks in (("high", True), ("none", False), ("minimal", False), (None, False)):
        own = answered(served, reasoning_effort=effort, max_tokens=6)["message"]
        assert ("reasoning" in own) is thinks
    # What was thought before is no part of the next prompt where the template leaves it out.
    turn = {"role": "assistant", "content": "Warm.", "reasoning_content": "It is June."}
    said = [USER, turn, USER]
    with_thought = served[0].ask("POST", PATH, asked(messages=said, max_tokens=1)).json()
    turn.pop("reasoning_content")
    without = served[0].ask("POST", PATH, asked(messages=said, max_tokens=1)).json()
    assert with_thought["usage"] == {
        **without["usage"],
        "prompt_tokens_details": with_thought["usage"]["prompt_tokens_details"],
    }


def test_what_a_template_sees_is_checked(served: Served) -> None:
    for name in ("tokenize", "messages", "chat_template", "add_generation_prompt", "bos_token"):
        answer = served[0].ask("POST", PATH, asked(chat_template_kwargs={name: True}))
        assert answer.status == 400
        assert name in answer.error["message"]
    for value in ("<|im_end|>", ["a"], {"a": 1}, "x" * 200):
        kwargs = {"enable_thinking": value}
        answer = served[0].ask("POST", PATH, asked(chat_template_kwargs=kwargs))
        assert answer.status == 400
    answer = served[0].ask("POST", PATH, asked(chat_template_kwargs={"colour": 1}, max_tokens=1))
    assert "chat_template_kwargs.colour" in answer.headers["warnings"]


def test_the_last_message_is_gone_on_with(served: Served) -> None:
    said = [USER, {"role": "assistant", "content": "It is"}]
    prompt = served[2].apply_chat_template(said, continue_final_message=True)
    whole = (
        served[0]
        .ask("POST", PATH, asked(messages=said, continue_final_message=True, max_tokens=3))
        .json()
    )
    assert whole["usage"]["prompt_tokens"] == len(prompt)


def test_calls_that_are_asked_for_are_written_as_the_server_was_told() -> None:
    model, tokenizer = chat_model()
    for calls, begin in ((None, "<tool_call>"), (CODER, "<tools>")):
        made_of = Shapes(model, tokenizer, calls)
        processor = made_of.processor(None, TOOLS, "climate", "", parallel=False)
        ids = tokenizer("Hello", return_tensors="pt")["input_ids"]
        made = model.generate(
            ids, max_new_tokens=200, do_sample=False, logits_processor=[processor]
        )
        text = tokenizer.decode(made[0, ids.shape[1] :])
        assert text.lstrip().startswith(begin + '\n{"name": "climate"'), text


def test_a_schema_that_binds_nothing_is_told(served: Served) -> None:
    """Where it would bind: the arguments of that tool are any object then."""
    loose = {"type": "function", "function": {"name": "loose", "parameters": {"not": {}}}}
    tools = [
        loose,
        {"type": "function", "function": {"name": "any", "parameters": {"type": "object"}}},
    ]
    for choice, told in (
        ("required", True),
        ({"type": "function", "function": {"name": "loose"}}, True),
        ({"type": "function", "function": {"name": "any"}}, False),
        ("auto", False),
    ):
        answer = served[0].ask("POST", PATH, asked(tools=tools, tool_choice=choice, max_tokens=1))
        assert answer.status == 200, answer.body
        said = "the schema of the tool loose is not supported, and its arguments may be any object"
        assert answer.headers["warnings"] == (said if told else None)


def test_a_form_that_takes_too_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are as many as there may be at once, by others."""
    model, tokenizer = chat_model()
    made, over = Shapes(model, tokenizer), threading.Event()
    usual = Grammars.compile

    def compile(self: Grammars, constraint: Any, *, after: Any = None) -> GrammarProcessor:
        assert over.wait(PATIENCE)
        return usual(self, constraint, after=after)

    def ask() -> object:
        form = {"type": "regex", "pattern": "a"}
        return made.processor(form, (), "auto", "", parallel=True, where="regex")

    def refused() -> ApiError:
        with pytest.raises(ApiError) as caught:
            ask()
        return caught.value

    monkeypatch.setattr(shapes, "SECONDS", 0.02)
    monkeypatch.setattr(Grammars, "compile", compile)
    for _ in range(shapes.AT_ONCE):
        error = refused()
        assert (error.status, error.param) == (400, "regex")
        assert "regex: the form of the answer takes longer than 0.02 s" in error.message
    for _ in range(2):
        # Nothing is wrong with theirs.
        error = refused()
        assert (error.status, error.code, error.param) == (503, "forms_busy", None)
    seen = made.figures.snapshot()
    assert (seen.compiling, seen.late) == (shapes.AT_ONCE, shapes.AT_ONCE)
    assert seen.refused == {"late": shapes.AT_ONCE, "busy": 2}
    over.set()
    monkeypatch.setattr(shapes, "SECONDS", PATIENCE)
    assert isinstance(ask(), GrammarProcessor)
    until(lambda: not made.figures.snapshot().compiling)
    seen = made.figures.snapshot()
    assert (seen.late, seen.compile_seconds.count) == (0, shapes.AT_ONCE + 1)


def test_a_form_and_the_calls_beside_it_are_blamed_apart() -> None:
    """Where both are given, one grammar is made of them."""
    made = Shapes(*chat_model())
    wrong = {"type": "json_schema", "schema": {"type": "string", "pattern": "(("}}
    right = {"type": "json_object"}
    bad = {"name": "f", "strict": True, "parameters": wrong["schema"]}
    for form, tools, param in (
        (wrong, TOOLS, "response_format.json_schema.schema"),
        (right, [{"type": "function", "function": bad}], "tools"),
    ):
        with pytest.raises(ApiError) as caught:
            made.processor(form, tools, "auto", "", parallel=True, where=field_of(form))
        assert caught.value.param == param, caught.value.message

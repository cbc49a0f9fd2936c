"""`pipeline("text-generation")`: every form of input, in batches or alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import quintet.pipelines.factory
from quintet import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    TextStreamer,
    pipeline,
)
from quintet.errors import ChatTemplateError, ContextLengthError, InputError, TokenizerError

CHAT = [{"role": "user", "content": "Hello there"}]
OTHER = [
    {"role": "system", "content": "Be brief, please."},
    {"role": "user", "content": "How are you today? 🙂"},
]
TEXTS = ["Hello there", "def fibonacci(n):\n    return", "a"]


@pytest.fixture(scope="module")
def pipe(chat_model: Path) -> Any:
    return pipeline("text-generation", model=chat_model, do_sample=False)


def text_of(pipe: Any, prompt: str, new: int) -> str:
    """What generate() gives for one prompt."""
    ids = pipe.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    out = pipe.model.generate(**ids, max_new_tokens=new)
    answer: str = pipe.tokenizer.decode(
        out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return answer


def rendered(pipe: Any, chat: Any) -> str:
    text: str = pipe.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return text


# -- inputs and outputs ----------------------------------------------------------------------


def test_a_text_is_continued(pipe: Any) -> None:
    expected = TEXTS[0] + text_of(pipe, TEXTS[0], 12)
    assert pipe(TEXTS[0], max_new_tokens=12) == [{"generated_text": expected}]


def test_a_list_of_texts_is_a_list_of_results(pipe: Any) -> None:
    assert pipe(TEXTS, max_new_tokens=12) == [pipe(text, max_new_tokens=12) for text in TEXTS]
    assert pipe(TEXTS[:1], max_new_tokens=12) == [pipe(TEXTS[0], max_new_tokens=12)]
    assert pipe(tuple(TEXTS), max_new_tokens=3) == list(pipe(iter(TEXTS), max_new_tokens=3))


def test_a_chat_is_answered(pipe: Any) -> None:
    answer = {"role": "assistant", "content": text_of(pipe, rendered(pipe, CHAT), 12)}
    assert pipe(CHAT, max_new_tokens=12) == [{"generated_text": [*CHAT, answer]}]
    assert CHAT == [{"role": "user", "content": "Hello there"}]


def test_a_list_of_chats_is_a_list_of_results(pipe: Any) -> None:
    expected = [pipe(chat, max_new_tokens=12) for chat in (CHAT, OTHER)]
    assert pipe([CHAT, OTHER], max_new_tokens=12) == expected


@pytest.mark.parametrize("given", [TEXTS[0], CHAT], ids=["text", "chat"])
def test_the_new_text_alone(pipe: Any, given: Any) -> None:
    prompt = given if isinstance(given, str) else rendered(pipe, given)
    result = pipe(given, max_new_tokens=12, return_full_text=False)
    assert result == [{"generated_text": text_of(pipe, prompt, 12)}]


@pytest.mark.parametrize("inputs", [TEXTS, [CHAT, OTHER, CHAT]], ids=["texts", "chats"])
@pytest.mark.parametrize("batch_size", [2, 3, 10])
def test_batches_give_what_single_inputs_give(pipe: Any, inputs: Any, batch_size: int) -> None:
    alone = pipe(inputs, max_new_tokens=20)
    assert pipe(inputs, max_new_tokens=20, batch_size=batch_size) == alone


def test_several_sequences_of_each_input(pipe: Any) -> None:
    results = pipe(
        TEXTS,
        batch_size=2,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=12,
        generator=torch.Generator().manual_seed(0),
    )
    assert [len(result) for result in results] == [3, 3, 3]
    for text, result in zip(TEXTS, results, strict=True):
        assert all(one["generated_text"].startswith(text) for one in result)
        assert len({one["generated_text"] for one in result}) == 3


def test_a_streamer_gets_the_text(pipe: Any, capsys: Any) -> None:
    streamer = TextStreamer(pipe.tokenizer, skip_prompt=True)
    (result,) = pipe(TEXTS[0], max_new_tokens=12, streamer=streamer, return_full_text=False)
    assert capsys.readouterr().out == result["generated_text"] + "\n"
    with pytest.raises(InputError, match="a streamer takes one input, not 3"):
        pipe(TEXTS, streamer=streamer)


def test_options_reach_generate(pipe: Any) -> None:
    sampled = pipe(
        "a", do_sample=True, generator=torch.Generator().manual_seed(5), max_new_tokens=12
    )
    assert sampled != pipe("a", max_new_tokens=12)
    assert pipe("a", do_sample=True, top_k=1, max_new_tokens=12) == pipe("a", max_new_tokens=12)


def test_without_a_word_it_is_sampled_with_a_temperature(chat_model: Path, pipe: Any) -> None:
    """As in Transformers: where neither the checkpoint nor the caller says how."""
    made = pipeline("text-generation", model=chat_model)
    seed = torch.Generator()
    drawn = made(TEXTS[0], generator=seed.manual_seed(3))
    asked = {"do_sample": True, "temperature": 0.7, "generator": seed.manual_seed(3)}
    assert drawn == pipe(TEXTS[0], **asked)
    assert drawn != pipe(TEXTS[0], do_sample=True, temperature=3.0, generator=seed.manual_seed(3))
    assert made(TEXTS[0], do_sample=False) == pipe(TEXTS[0])
    made.model.generation_config = GenerationConfig(do_sample=False)
    assert made(TEXTS[0]) == pipe(TEXTS[0])


def test_text_is_what_transformers_writes(chat_model: Path) -> None:
    ours = pipeline("text-generation", chat_model, do_sample=False, max_new_tokens=20)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(chat_model)
    theirs = transformers.pipeline(
        "text-generation", str(chat_model), tokenizer=tokenizer, device="cpu",
        do_sample=False, max_new_tokens=20,
    )  # fmt: skip
    prefilled = [*CHAT, {"role": "assistant", "content": "The quick"}]
    for given in (TEXTS[0], TEXTS, CHAT, [CHAT, OTHER], prefilled):
        for options in ({}, {"return_full_text": False}, {"return_tensors": True}):
            assert ours(given, **options) == theirs(given, **options)
    for options in (
        {"prefix": "def "},
        {"add_special_tokens": False},
        {"skip_special_tokens": False},
        {"truncation": True, "max_length": 30},
        {"tokenizer_encode_kwargs": {"truncation": True, "max_length": 3}},
        {"handle_long_generation": "hole"},
    ):
        assert ours(TEXTS[1], **options) == theirs(TEXTS[1], **options), options
    assert ours(CHAT, continue_final_message=True) == theirs(CHAT, continue_final_message=True)


def test_an_answer_ends_at_a_text(pipe: Any) -> None:
    (whole,) = pipe(TEXTS[0], max_new_tokens=20, return_full_text=False)
    text = whole["generated_text"]
    for stop in (text[4:7], [text[4:7], "never"]):
        (cut,) = pipe(TEXTS[0], max_new_tokens=20, return_full_text=False, stop_sequence=stop)
        assert text.startswith(cut["generated_text"])
        assert text[4:7] in cut["generated_text"]
        assert len(cut["generated_text"]) < len(text)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_what_else_is_asked_for_comes_with_the_text(pipe: Any, batch_size: int, beams: int) -> None:
    texts = ["Hello there", "def f"]
    found = pipe(
        texts,
        batch_size=batch_size,
        max_new_tokens=4,
        do_sample=False,
        num_beams=beams,
        num_return_sequences=beams,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    for text, results in zip(texts, found, strict=True):
        ids = pipe.tokenizer(text, return_tensors="pt")["input_ids"]
        made = pipe.model.generate(
            ids,
            max_new_tokens=4,
            do_sample=False,
            num_beams=beams,
            num_return_sequences=beams,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
        )
        assert len(results) == beams
        for index, result in enumerate(results):
            if beams > 1:
                torch.testing.assert_close(
                    torch.tensor(result["sequences_scores"]), made.sequences_scores[index]
                )
            logits = torch.stack(made.logits, dim=1)[index]
            torch.testing.assert_close(torch.tensor(result["logits"]), logits)


def test_an_assistant_may_be_named(chat_model: Path) -> None:
    pipe = pipeline("text-generation", chat_model, assistant_model=str(chat_model))
    plain = pipeline("text-generation", chat_model)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    assert pipe("Hello", **options) == plain("Hello", **options)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_arguments_may_stand_among_those_of_the_model(chat_model: Path, name: str) -> None:
    kwargs: dict[str, Any] = {name: torch.bfloat16, "attn_implementation": "eager"}
    pipe = pipeline("text-generation", chat_model, model_kwargs=kwargs)
    assert pipe.model.dtype == torch.bfloat16
    assert pipe.model.config.attn_implementation == "eager"
    with pytest.raises(InputError, match=r"dtype.* twice; give one of them"):
        pipeline("text-generation", chat_model, dtype="float32", model_kwargs=kwargs)
    with pytest.raises(InputError, match=r"device_map.* twice; give one of them"):
        pipeline("text-generation", chat_model, device="cpu", model_kwargs={"device_map": "cpu"})


def test_a_hole_is_left_for_the_answer(pipe: Any) -> None:
    long = "Hello there " * 200
    ids = pipe.tokenizer.encode(long)[-(256 - 100) :]
    (found,) = pipe(long, handle_long_generation="hole", max_new_tokens=100, return_tensors=True)
    assert found["generated_token_ids"][:156] == ids
    assert len(found["generated_token_ids"]) == 256


def test_a_chat_template_gets_tools_and_documents(chat_model: Path) -> None:
    made = pipeline("text-generation", chat_model, do_sample=False, max_new_tokens=3)
    made.tokenizer.chat_template = "{{ tools | length }}{{ documents[0]['title'] }}{{ messages }}"
    tools = [{"type": "function", "function": {"name": "look", "description": "d"}}]
    documents = [{"title": "a title", "text": "b"}]
    (found,) = made(CHAT, tools=tools, documents=documents, return_tensors=True)
    assert made.tokenizer.decode(found["generated_token_ids"]).startswith("1a title[")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_full_text": True, "return_tensors": True}, "say the same thing twice"),
        ({"handle_long_generation": "cut"}, "'cut' has to be 'hole'"),
        ({"output_hidden_states": True}, "output_hidden_states are nested .* model.generate"),
        ({"assistant_model": "some/name"}, "loaded at every call; give its name to pipeline"),
        ({"handle_long_generation": "hole", "max_new_tokens": 300}, "leaves no room"),
    ],
    ids=str,
)
def test_options_that_do_not_go_are_named(pipe: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe("a", **options)


# -- how long --------------------------------------------------------------------------------


def lengths(pipe: Any, monkeypatch: pytest.MonkeyPatch, text: str = "a", **options: Any) -> int:
    """Return how many tokens a call makes."""
    made = []
    generate = pipe.model.generate

    def counted(ids: torch.Tensor, **given: Any) -> torch.Tensor:
        out: torch.Tensor = generate(ids, **given)
        made.append(out.shape[1] - ids.shape[1])
        return out

    monkeypatch.setattr(pipe.model, "generate", counted)
    pipe(text, **options)
    return made[0]


@pytest.mark.parametrize(
    ("options", "new"),
    [
        pytest.param({}, 128, id="half-the-context"),
        pytest.param({"max_new_tokens": 3}, 3, id="max_new_tokens"),
        pytest.param({"max_length": 4}, 3, id="max_length"),
        pytest.param({"generation_config": GenerationConfig(max_new_tokens=5)}, 5, id="config"),
        pytest.param({"generation_config": GenerationConfig(top_k=5)}, 128, id="config-without"),
    ],
)
def test_the_length(pipe: Any, options: Any, new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lengths(pipe, monkeypatch, **options) == new


def test_a_long_prompt_gets_what_room_is_left(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Hello" * 100
    room = 256 - len(pipe.tokenizer.encode(text))
    assert 0 < room < 128
    assert lengths(pipe, monkeypatch, text=text) == room


def test_the_length_of_the_checkpoint(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(model=chat_model)
    pipe.model.generation_config = GenerationConfig(max_new_tokens=7)
    assert lengths(pipe, monkeypatch) == 7


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        pytest.param("", {}, "the text is empty", id="empty"),
        pytest.param(["a", ""], {}, "the text is empty", id="one-empty"),
        pytest.param([], {}, "got an empty list", id="no-inputs"),
        pytest.param(None, {}, "cannot take a NoneType", id="none"),
        pytest.param(3, {}, "cannot take a int", id="number"),
        pytest.param([3], {}, "has to be a text, a chat", id="numbers"),
        pytest.param(CHAT[0], {}, "cannot take a dict", id="one-message"),
        pytest.param([CHAT, []], {}, "has to be a text, a chat", id="empty-chat"),
        pytest.param("a", {"batch_size": 0}, "batch_size=0", id="batch-size"),
        pytest.param("a", {"max_tokens": 3}, "did you mean 'max_", id="unknown"),
        pytest.param("a", {"num_return_sequences": 2}, "do_sample=True", id="greedy-copies"),
    ],
)
def test_what_cannot_be_answered_is_named(
    pipe: Any, given: Any, options: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pipe(given, **options)


def test_a_text_longer_than_the_context_is_refused_with_both_numbers(pipe: Any) -> None:
    with pytest.raises(ContextLengthError, match=r"prompt has \d{4} tokens.*context is 256"):
        pipe("Hello 🙂" * 1000)


def test_a_chat_without_a_template_is_refused(chat_model: Path) -> None:
    pipe = pipeline(model=chat_model)
    pipe.tokenizer.chat_template = None
    with pytest.raises(ChatTemplateError, match="chat template"):
        pipe(CHAT)
    assert pipe("Hello", max_new_tokens=1)


def test_a_message_without_content_is_refused(pipe: Any) -> None:
    with pytest.raises((InputError, TokenizerError), match="content"):
        pipe([{"role": "user"}])


# -- making one ------------------------------------------------------------------------------


def test_a_loaded_model_takes_its_tokenizer(chat_model: Path, pipe: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    expected = pipe("Hello", max_new_tokens=5)
    for given in (tokenizer, chat_model, str(chat_model)):
        made = pipeline("text-generation", model=model, tokenizer=given, do_sample=False)
        assert made.model is model
        assert made("Hello", max_new_tokens=5) == expected
    with pytest.raises(InputError, match="a loaded model needs its tokenizer"):
        pipeline("text-generation", model=model)


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float32"}, {"torch_dtype": "auto"}, {"device_map": "cpu"}, {"model_kwargs": {}}],
    ids=str,
)
def test_how_to_load_a_loaded_model_is_refused(pipe: Any, options: Any) -> None:
    with pytest.raises(InputError, match=f"loaded already, so {next(iter(options))} would"):
        pipeline("text-generation", pipe.model, tokenizer=pipe.tokenizer, **options)


def test_the_model_is_loaded_as_asked(chat_model: Path) -> None:
    made = pipeline("text-generation", str(chat_model), torch_dtype=torch.bfloat16, device="cpu")
    assert made.model.dtype == torch.bfloat16
    made = pipeline(model=chat_model, model_kwargs={"attn_implementation": "eager"})
    assert made.model.config.attn_implementation == "eager"


def test_model_and_tokenizer_come_from_the_same_place(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pipeline(model=chat_model.parent, model_kwargs={"subfolder": chat_model.name})
    assert made("Hello", max_new_tokens=1)


def test_without_a_model_it_is_the_packaged_one(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quintet.pipelines.factory, "demo_model", lambda: chat_model)
    assert pipeline("text-generation").tokenizer.name_or_path == str(chat_model)


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(InputError, match="there is no task 'summarization'"):
        pipeline("summarization")


def test_a_model_without_a_language_head_is_refused(chat_model: Path, pipe: Any) -> None:
    with pytest.raises(InputError, match="Qwen2Model does not fit 'text-generation'"):
        pipeline("text-generation", AutoModel.from_pretrained(chat_model), tokenizer=pipe.tokenizer)


def test_two_devices_are_refused(chat_model: Path) -> None:
    with pytest.raises(InputError, match="two names of the same choice"):
        pipeline(model=chat_model, device="cpu", device_map="auto")

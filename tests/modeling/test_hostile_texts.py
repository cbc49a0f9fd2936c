"""Whatever text an argument is given, what comes out is an answer or a short error of ours."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import quintet
from conformance.families import FAMILIES
from quintet.errors import InputError, QuintetError

TEXTS = [
    *("", " ", "\0", "a\0b", "\ud800", "a\nb", "\u202e", "%s{0}", "\\"),
    *("../..", "/dev/null", "x:y:z", "hf://x", "a" * 100_000),
]
PROMPT = torch.tensor([[1, 2, 3]])


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES[0].model_of()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return quintet.AutoTokenizer.from_pretrained(quintet.demo_model())


def calls(text: str, model: Any, tokenizer: Any, folder: Path) -> Iterator[Callable[[], Any]]:
    """Yield calls that are given a text for each of their arguments in turn."""
    demo = quintet.demo_model()
    local: dict[str, Any] = {"local_files_only": True, "cache_dir": folder}
    for kind in (quintet.AutoConfig, quintet.AutoTokenizer, quintet.GenerationConfig):
        load: Any = kind.from_pretrained
        yield lambda load=load: load(text, **local)
        yield lambda load=load: load(demo, subfolder=text)
        yield lambda load=load: load("owner/name", **{**local, "revision": text})
        yield lambda load=load: load("owner/name", **{**local, "cache_dir": text})
    load = quintet.AutoModelForCausalLM.from_pretrained
    yield lambda: load("owner/name", **local, variant=text)
    yield lambda: load("owner/name", **local, gguf_file=text)
    for name in ("variant", "gguf_file", "dtype", "device_map", "attn_implementation"):
        yield lambda name=name: load(demo, **{name: text})
    yield lambda: load(demo, quantization_config={"quant_method": text})
    for name in ("max_shard_size", "variant"):
        yield lambda name=name: model.save_pretrained(folder / "saved", **{name: text})
    if text not in ("", " ", "../.."):
        for one in (model, tokenizer, model.config, model.generation_config):
            yield lambda one=one: one.save_pretrained(folder / text)
    yield lambda: tokenizer([text, "b b"], padding=True)
    for name in ("padding_side", "return_tensors", "padding", "truncation"):
        yield lambda name=name: tokenizer("a", **{name: text})
    messages = [{"role": text, "content": text}]
    template = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    yield lambda: tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    yield lambda: tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False)
    few: dict[str, Any] = {"max_new_tokens": 2, "tokenizer": tokenizer}
    for name in ("stop_strings", "cache_implementation", "cache_dtype", "early_stopping"):
        yield lambda name=name: model.generate(PROMPT, **few, **{name: text})
    yield lambda: model.load_adapter(text)
    yield lambda: quintet.pipeline(text, model=str(demo))
    for name in ("hidden_act", "problem_type", "dtype", "rope_parameters"):
        yield lambda name=name: quintet.Qwen2Config(**{name: text})
    yield lambda: quintet.LoraConfig(target_modules=text)


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_any_text_is_taken_or_named(
    text: str, model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    for call in calls(text, model, tokenizer, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                call()
            except QuintetError as error:
                said.append(str(error))
    assert said
    assert max(map(len, said)) < 3_000


@pytest.mark.parametrize(
    "revision", ["/dev/zero", "../../x", "a/../b", "", "-x", "a b", "v" * 300, 5]
)
def test_a_revision_leads_nowhere_else(revision: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has to be a branch, a tag or a commit"):
        quintet.AutoConfig.from_pretrained(
            "owner/name", revision=revision, cache_dir=tmp_path, local_files_only=True
        )

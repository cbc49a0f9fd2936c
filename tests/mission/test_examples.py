"""Every example of the five pages runs with `transformers` replaced by `quintet`.

The names of the hub are folders here, with a small model in each, so that not even they change.
"""

import shutil
import subprocess
import sys
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import quintet
from mission.pages import PAGES, Block, Run, blocks, run, script
from quintet.errors import MissingDependencyError
from quintet.modeling.loading import NewHeadWarning
from tiny import trained_tokenizer

# As printed, these are no Python.
MISPRINTS = {'Lite"")': 'Lite")', 'Lite"",': 'Lite",'}
# What a machine without a graphics card, or without a package for it, has in their place.
WITHOUT_GPU = {'"cuda"': '"cpu"', "device_map=0": 'device_map="cpu"'}
WITHOUT_FLASH = {'"flash_attention_2"': '"sdpa"'}
CODE = [block for page in PAGES for block in blocks(page, "python", "pycon")]
PLAIN = {
    "deepseek-ai/DeepSeek-V2-Lite": "meta-deepseek_v2/DeepseekV2-2-7b-hf",
    "Zyphra/Zamba2-2.7B": "Zyphra/Zamba2-7B",
}


def having(text: str) -> list[Block]:
    """Return the examples that are about something."""
    found = [block for block in CODE if text in block.body]
    assert found, f"no page has {text!r}"
    return found


def each_having(text: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", having(text), ids=str)


def code_of(block: Block, library: str = "quintet") -> str:
    code = script(block)
    changes = dict(MISPRINTS)
    if not torch.cuda.is_available():
        changes |= WITHOUT_GPU
    if find_spec("flash_attn") is None:
        changes |= WITHOUT_FLASH
    for printed, meant in changes.items():
        code = code.replace(printed, meant)
    return code.replace("from transformers import", f"from {library} import")


def example(block: Block, library: str = "quintet") -> Run:
    """Run an example, with the names it takes for granted."""
    return run(
        code_of(block, library),
        str(block),
        PATH_TO_CONVERTED_WEIGHTS="converted",
        PATH_TO_CONVERTED_TOKENIZER="converted",
    )


def test_every_page_and_every_example_is_here() -> None:
    subjects = (
        "are you conscious",
        "Roman Empire",
        "deepseek-r1",
        "messages = [\n    {",
        "short introduction",
        "pipeline(",
        "id2label[",
        "multi_label_classification",
        "Config()",
        "Qwen/Qwen-tokenizer",
        "BitsAndBytesConfig",
    )
    assert len(PAGES) == 5
    assert set(CODE) == {block for text in subjects for block in having(text)}


# -- continuing a text -----------------------------------------------------------------------


@each_having("are you conscious")
def test_a_prompt_is_continued_as_transformers_does_it(block: Block, at_hub: Path) -> None:
    ours, theirs = example(block), example(block, "transformers")
    assert ours.names["generate_ids"].shape == (1, 30)
    assert ours.names["generate_ids"].equal(theirs.names["generate_ids"])
    (text,) = ours.shown
    assert text.startswith(ours.names["prompt"])
    assert len(text) > len(ours.names["prompt"])
    assert ours.shown == theirs.shown


def test_zamba2_on_a_device_in_bfloat16(at_hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = having("Roman Empire")
    names = example(block).names
    assert names["model"].dtype == torch.bfloat16
    prompt = names["input_ids"]["input_ids"].shape[1]
    assert names["outputs"].shape == (1, prompt + 100)
    assert capsys.readouterr().out.startswith(names["input_text"])


# -- chats -----------------------------------------------------------------------------------


def test_deepseek_r1_continues_a_chat(at_hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = having("deepseek-r1")
    names = example(block).names
    assert names["model"].dtype == torch.bfloat16
    assert names["outputs"].shape == (1, names["inputs"].shape[1] + 50)
    printed, seconds = capsys.readouterr().out.splitlines()
    assert names["chat"][-1]["content"] in printed
    assert float(seconds) > 0


def test_torchrun_runs_that_script(hub: Path, tmp_path: Path) -> None:
    """With what the page leaves open filled in: how many machines, which of them, and where."""
    (command,) = blocks("deepseek_v3", "shell")
    (block,) = having("deepseek-r1")
    words = command.body
    for printed, meant in {
        "--nproc_per_node=8": "--nproc_per_node=1",
        "--nnodes=2": "--nnodes=1",
        "--node_rank=0|1": "--node_rank=0",
        "master_addr:master_port": "localhost:0",
    }.items():
        assert printed in words
        words = words.replace(printed, meant)
    torchrun, *arguments = words.split()
    assert torchrun == "torchrun"
    (tmp_path / arguments[-1]).write_text(code_of(block), encoding="utf-8")
    (tmp_path / "deepseek-r1").symlink_to(hub / "deepseek-r1")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "채팅 템플릿이 어떻게 작동하는지" in done.stdout


def test_its_chat_template_gives_what_the_page_shows() -> None:
    ((template,), (shown,)) = (blocks("deepseek_v3", kind) for kind in ("jinja", "text"))
    (given,) = having("messages = [\n    {")[:1]
    assert given.page == "deepseek_v3"
    rendered = trained_tokenizer().apply_chat_template(
        example(given).names["messages"], chat_template=template.body, tokenize=False
    )
    assert rendered == shown.body.rstrip("\n")


def test_qwen2_answers_a_chat_by_sampling(at_hub: Path) -> None:
    (block,) = having("short introduction")
    names = example(block).names
    (ids,) = names["generated_ids"]
    assert 0 < len(ids) <= 512
    assert names["response"] == names["tokenizer"].decode(ids, skip_special_tokens=True)
    assert example(block).names["response"] != names["response"]


def test_qwen2_moe_answers_a_chat_in_a_pipeline(
    at_hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = having("pipeline(")
    names = example(block).names
    *asked, answer = names["outputs"][0]["generated_text"]
    assert asked == names["messages"]
    assert answer["role"] == "assistant"
    assert answer["content"]
    assert capsys.readouterr().out == answer["content"] + "\n"
    assert names["pipe"].model.dtype == torch.bfloat16


# -- classifying a text ----------------------------------------------------------------------


@each_having("id2label[")
def test_a_text_is_classified_as_transformers_does_it(block: Block, at_hub: Path) -> None:
    ours, theirs = example(block), example(block, "transformers")
    torch.testing.assert_close(ours.names["logits"], theirs.names["logits"], rtol=1e-5, atol=1e-5)
    assert ours.shown == theirs.shown
    label, loss = ours.shown
    assert label in ours.names["model"].config.id2label.values()
    assert loss > 0


@each_having("multi_label_classification")
def test_a_text_gets_several_labels_as_transformers_does_it(block: Block, at_hub: Path) -> None:
    ours, theirs = example(block), example(block, "transformers")
    assert ours.names["predicted_class_ids"].equal(theirs.names["predicted_class_ids"])
    assert ours.names["loss"].item() == pytest.approx(theirs.names["loss"].item(), rel=1e-5)
    assert ours.names["model"].config.problem_type == "multi_label_classification"


@each_having("id2label[")
def test_a_checkpoint_without_a_classifier_gets_one_and_it_is_told(
    block: Block, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, plain in PLAIN.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(hub / plain)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(NewHeadWarning, match="has to be trained"):
        assert example(block).shown[0] in ("LABEL_0", "LABEL_1")


# -- models of full size ---------------------------------------------------------------------


@each_having("Config()")
def test_a_model_is_built_by_its_defaults(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    # Without memory for the weights: the smallest of these has 2.4 billion of them.
    with torch.device("meta"):
        names = example(block).names
    assert names["model"].config.to_dict() == names["configuration"].to_dict()
    assert names["model"].num_parameters() > 2e9
    if "print" in block.body:
        assert type(names["configuration"]).__name__ in capsys.readouterr().out


# -- tokenizers ------------------------------------------------------------------------------


@each_having("Qwen/Qwen-tokenizer")
def test_the_published_tokenizer_gives_the_ids_of_the_page(
    block: Block, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(published, tmp_path / "Qwen" / "Qwen-tokenizer")
    monkeypatch.chdir(tmp_path)
    assert example(block).shown == [[9707, 1879], [21927, 1879]]


@each_having("Qwen/Qwen-tokenizer")
def test_a_word_after_a_space_is_another_token(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_tokenizer("Hello world Hello world").save_pretrained(tmp_path / "Qwen/Qwen-tokenizer")
    monkeypatch.chdir(tmp_path)
    first, second = example(block).shown
    assert first[0] != second[0]
    assert first[-1] == second[-1]


# -- quantised -------------------------------------------------------------------------------


def size(model: Any) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def test_qwen2_moe_in_8_bits(at_hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = having("BitsAndBytesConfig")
    names = example(block).names
    assert names["outputs"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert capsys.readouterr().out.startswith("The Qwen2 model family is")
    full = quintet.AutoModelForCausalLM.from_pretrained("Qwen/Qwen1.5-MoE-A2.7B-Chat")
    assert size(names["model"]) < size(full.to(torch.bfloat16))


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_attention_says_what_it_needs(at_hub: Path) -> None:
    with pytest.raises(MissingDependencyError, match="needs the package flash-attn"):
        quintet.AutoModelForCausalLM.from_pretrained(
            "converted", attn_implementation="flash_attention_2"
        )


# -- installing ------------------------------------------------------------------------------


def test_what_the_page_installs_has_the_name_of_this_package() -> None:
    """A test installs nothing, so that this one stands for the page's `pip install`."""
    (command,) = blocks("zamba2", "shell")
    assert command.body.startswith("pip install transformers>=")
    assert metadata("quintet")["Name"] == "quintet"

"""`quintet quantize` and `quintet convert`: checkpoints that load, and say what they are."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from quintet import AutoModelForCausalLM, AutoTokenizer, demo_model


def test_a_quantised_copy_talks(quintet: Any, chat_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8"
    result = quintet("quantize", chat_model, out)
    assert (result.code, result.out) == (0, "")
    assert "bytes of weights" in result.err
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["bits"]) == ("quintet", 8)
    AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert quintet("generate", "The", "--model", out, "--max-new-tokens", "3").code == 0


def test_it_says_how_many_bits_a_weight_takes_and_that_four_cost(
    quintet: Any, chat_model: Path, tmp_path: Path
) -> None:
    eight = quintet("quantize", chat_model, tmp_path / "eight").err
    four = quintet("quantize", chat_model, tmp_path / "four", "--to", "int4").err
    bits = [float(re.search(r"([\d.]+) bits a weight", err)[1]) for err in (eight, four)]  # type: ignore[index]
    assert 4 < bits[1] < bits[0] < 16
    assert "four bits cost" in four
    assert "four bits cost" not in eight


@pytest.mark.parametrize(
    ("method", "key"), [("int4", "modules_to_not_convert"), ("nf4", "llm_int8_skip_modules")]
)
def test_modules_can_be_kept(
    quintet: Any, chat_model: Path, tmp_path: Path, method: str, key: str
) -> None:
    assert (
        quintet(
            "quantize", chat_model, tmp_path / "out", "--to", method, "--keep", "down_proj", "-q"
        )
    ).err == ""
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings[key] == ["down_proj"]


def test_it_comes_back_as_plain_numbers(quintet: Any, chat_model: Path, tmp_path: Path) -> None:
    quintet("quantize", chat_model, tmp_path / "int8")
    result = quintet(
        "convert", tmp_path / "int8", tmp_path / "plain", "--dequantize", "--dtype", "bfloat16"
    )
    assert result.code == 0
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


def test_what_cannot_be_is_said_in_one_line(quintet: Any, chat_model: Path, tmp_path: Path) -> None:
    result = quintet("quantize", chat_model, chat_model)
    assert result.code == 2
    assert result.is_one_screen
    assert quintet("convert", tmp_path / "nothing", tmp_path / "out").code == 3
    assert quintet("convert", chat_model, tmp_path / "out", "--max-shard-size", "many").code == 2


def test_convert_writes_a_file_for_llama_cpp(quintet: Any, tmp_path: Path) -> None:
    root, file = demo_model(), tmp_path / "demo.gguf"
    result = quintet("convert", root, file, "--to", "gguf", "--dtype", "q8_0")
    assert result.code == 0, result.err
    assert "bytes of weights" in result.err
    assert "left out" in result.err  # the layers that predict further tokens
    assert quintet("generate", "def f", "-m", file, "-n", 4, "-t", 0, "-q").code == 0
    refused = quintet("convert", root, file, "--to", "gguf", "--dequantize")
    assert refused.code == 2
    assert "no effect on one file" in refused.err


def test_a_text_may_be_in_view(quintet: Any, chat_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. " * 40)
    out, given = tmp_path / "out", ("--to", "int4", "--calibrate", text)
    assert quintet("quantize", chat_model, tmp_path / "plain", "--to", "int4").code == 0
    assert quintet("quantize", chat_model, out, *given, "--calibrate-tokens", 200).code == 0
    one, other = (path / "model.safetensors" for path in (out, tmp_path / "plain"))
    assert one.stat().st_size == other.stat().st_size
    assert one.read_bytes() != other.read_bytes()
    assert quintet("generate", "The", "--model", out, "--max-new-tokens", "3").code == 0
    refused = quintet("quantize", chat_model, tmp_path / "no", "--to", "int8", "--calibrate", text)
    assert "--calibrate is for --to int4 and w4a16" in refused.err
    alone = quintet("quantize", chat_model, tmp_path / "no", *given[:2], "--calibrate-tokens", 9)
    assert (alone.code, "give that with --calibrate FILE" in alone.err) == (2, True)
    text.write_text("")
    assert "is empty" in quintet("quantize", chat_model, tmp_path / "no", *given).err
    text.unlink()
    assert "there is no file" in quintet("quantize", chat_model, tmp_path / "no", *given).err
    assert not (tmp_path / "no").exists()

import json
from pathlib import Path

import pytest

from quintet.errors import InputError, ModelNotFoundError
from quintet.tokenization import PreTrainedTokenizer, Qwen2Tokenizer, load


def test_a_vocabulary_of_qwen2_is_recognised(trained: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_moe"}))
    ours = load(tmp_path, padding_side="left")
    assert type(ours) is Qwen2Tokenizer
    assert ours.padding_side == "left"
    (tmp_path / "config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2TokenizerFast"}')
    assert type(load(tmp_path)) is Qwen2Tokenizer


def test_any_other_pipeline_is_the_general_class(trained: Path) -> None:
    assert type(load(trained)) is PreTrainedTokenizer


def test_errors_name_what_was_asked_for(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is empty"):
        load(tmp_path)
    with pytest.raises(InputError, match="did you mean 'truncation_side'"):
        load(trained, truncation_sid="left")

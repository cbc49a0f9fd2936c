"""What of a training cannot be compiled is refused by name."""

from pathlib import Path

import pytest

from quintet.errors import InputError
from quintet.training import TrainingConfig, train
from quintet.training.settings import build


# What PyTorch says of itself when it is first asked to compile.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rows_that_differ_in_each_step_are_not_compiled(chat_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "Hello there, how are you today?"}\n' * 50)
    tables = {
        "model": {"from": str(chat_model)},
        "data": {
            "sources": [{"paths": [str(text)]}],
            "context": 32,
            "batch_rows": 2,
            "cache": str(tmp_path / "cache"),
        },
        "train": {"folder": str(tmp_path / "run"), "steps": 1, "compile": True},
    }
    with pytest.raises(InputError, match=r"\[train\] compile .*borders = false"):
        train(build(TrainingConfig, tables))

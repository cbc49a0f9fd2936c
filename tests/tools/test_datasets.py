"""What `datasets` keeps on the disk is read as it is."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars

from parsing.templates import tokenizer
from quintet.training.data import DataSettings, SourceSettings, build_data

CHAT = [
    {"role": "user", "content": "How warm?"},
    {"role": "assistant", "content": "Warm."},
]


def test_a_saved_dataset_is_a_folder_of_records(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"messages": CHAT * (1 + i)} for i in range(3)]
    disable_progress_bars()
    kept = Dataset.from_list(rows)
    kept.save_to_disk(str(tmp_path / "saved"))
    kept.to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = set()
    for name in ("saved", "a.parquet", "a.jsonl"):
        settings = DataSettings(
            sources=(SourceSettings(paths=(str(tmp_path / name),)),),
            batch_rows=1,
            cache=str(tmp_path / "cache"),
        )
        data = build_data(settings, tokenizer("qwen"))
        assert data.documents == 3
        told.add(data.fingerprint())
    assert len(told) == 1

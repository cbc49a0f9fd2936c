"""Files to batches: in an order that follows from the seed and the step alone."""

import json
import os
import shutil
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from quintet import PreTrainedTokenizerFast
from quintet.errors import ConfigError, DataError, ModelNotFoundError, SaveError
from quintet.training.data import (
    ContextPhase,
    DataSettings,
    SourceSettings,
    TokenData,
    build_data,
)
from quintet.training.progress import Progress
from quintet.training.schedules import Segment, Segments
from quintet.training.settings import SettingError

WORDS = "quick brown fox jumps over a lazy dog while nobody looks at it today"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.trained_tokenizer()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty files of different lengths."""
    root = tmp_path_factory.mktemp("texts")
    for number in range(30):
        text = f"{number} " + WORDS[number:] * (1 + number // 6)
        (root / f"{number:02}.txt").write_text(text + "\n")
    return root


def table(*paths: Path, **changes: object) -> DataSettings:
    named = {"context": 32, "batch_tokens": 128, "cache": str(paths[0].parent / "cache")}
    sources = tuple(SourceSettings(paths=(str(path),)) for path in paths)
    return DataSettings(**{"sources": sources, **named, **changes})  # type: ignore[arg-type]


def weighted(*weights: float | None) -> tuple[SourceSettings, ...]:
    return tuple(SourceSettings(paths=("x",), weight=weight) for weight in weights)


def at(step: int, done: float = 0.0) -> Progress:
    return Progress(step=step, tokens=0, done=done)


def rows(data: TokenData, step: int, parts: int = 1, done: float = 0.0) -> list[list[int]]:
    found = [part.input_ids.tolist() for part in data.parts(at(step, done), parts)]
    return [row for part in found for row in part]


def test_rows_follow_from_seed_and_step_alone(
    texts: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = build_data(table(texts), tokenizer)
    expected = [rows(data, step) for step in range(40)]
    assert all(len(row) == 32 for step in expected for row in step)
    for step in (17, 3, 39, 0):
        again = build_data(table(texts), tokenizer)
        assert rows(again, step) == expected[step]
        # In how many parts a step is cut changes nothing but that.
        for parts in (2, 3, 4, 9):
            assert rows(data, step, parts) == expected[step]
    other = build_data(table(texts, seed=1), tokenizer)
    assert rows(other, 0) != expected[0]
    assert other.fingerprint() != data.fingerprint() == again.fingerprint()


def test_a_pass_reads_every_text_once_and_closes_it(
    texts: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = build_data(table(texts, batch_tokens=32), tokenizer)
    total = data.tokens
    # So many rows of 32 are as many passes as 32.
    read = Counter(i for step in range(total) for i in rows(data, step)[0])
    whole = Counter(
        i
        for path in texts.iterdir()
        for i in [*tokenizer.encode(path.read_text()), tokenizer.eos_token_id]
    )
    assert read == Counter({i: n * 32 for i, n in whole.items()})
    assert data.documents == 30


def test_borders_are_told_and_nothing_is_predicted_across_them(
    texts: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    [batch] = build_data(table(texts), tokenizer).parts(at(0))
    assert batch.seq_idx is not None
    begins = batch.seq_idx.diff(dim=1, prepend=torch.full((4, 1), -1)) != 0
    assert torch.equal(batch.labels == -100, begins)
    assert torch.equal(batch.labels[~begins], batch.input_ids[~begins])
    assert batch.texts == int(begins.sum())
    ends = batch.input_ids == tokenizer.eos_token_id
    assert torch.equal(begins[:, 1:], ends[:, :-1])
    [open_batch] = build_data(table(texts, borders=False), tokenizer).parts(at(0))
    assert open_batch.seq_idx is None
    assert torch.equal(open_batch.labels[:, 1:], batch.input_ids[:, 1:])


def test_whole_texts_stand_in_one_row_without_padding(
    texts: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    told: list[str] = []
    settings = table(texts, packing="whole", context=96, batch_rows=2, batch_tokens=None)
    data = build_data(settings, tokenizer, tell=told.append)
    [batch] = data.parts(at(0))
    assert batch.attention_mask is None
    assert batch.seq_idx is not None
    assert batch.input_ids.shape[0] == 1
    assert 96 < batch.tokens <= 2 * 96
    # Those that are longer go on in another row, and that is told.
    assert any("longer than 96 tokens and cut" in message for message in told)
    with pytest.raises(DataError, match=r"\d\.txt: \d+ tokens are more than"):
        next(build_data(table(texts, packing="whole", too_long="bad"), tokenizer).parts(at(0)))
    settings = table(texts, packing="whole", too_long="drop", context=64)
    dropped = build_data(settings, tokenizer, tell=told.append)
    next(dropped.parts(at(0)))
    assert "left out" in told[-1]


def test_padded_rows_have_a_mask(texts: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = build_data(
        table(texts, packing="padded", context=64, batch_rows=4, batch_tokens=None), tokenizer
    )
    [batch] = data.parts(at(0))
    assert batch.seq_idx is None
    assert batch.attention_mask is not None
    assert torch.equal(batch.labels == -100, _first_or(batch.attention_mask == 0))
    assert batch.tokens == int(batch.attention_mask.sum()) <= 4 * 64


def _first_or(mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[:, 0] = True
    return mask


def test_contexts_and_weights_change_along_the_way(
    texts: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "beside.txt").write_text("0123456789 " * 200)
    phases = (ContextPhase(until=0.5, context=16), ContextPhase(until=1.0, context=64))
    falling = Segments(kind="segments", start=1.0, segments=(Segment(until=1.0, to=0.0),))
    rising = Segments(kind="segments", start=0.0, segments=(Segment(until=1.0, to=1.0),))
    settings = DataSettings(
        sources=(
            SourceSettings(paths=(str(texts),), weight=rising),
            SourceSettings(paths=(str(tmp_path / "beside.txt"),), weight=falling),
        ),
        context=phases,
        batch_tokens=1024,
        windows="random",
        cache=str(tmp_path / "cache"),
    )
    data = build_data(settings, tokenizer)
    assert data.context == 64
    digits = set(tokenizer.encode("0123456789 "))
    for done, context in ((0.0, 16), (0.25, 16), (0.5, 64), (0.75, 64), (1.0, 64)):
        read = rows(data, 7, done=done)
        assert read == rows(data, 7, 5, done=done)
        assert {len(row) for row in read} == {context}
        assert len(read) == 1024 // context
        beside = sum(set(row) <= digits for row in read) / len(read)
        assert abs(beside - (1 - done)) < 0.25


def test_a_share_is_held_out_by_what_texts_say(
    texts: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = build_data(table(texts, held_out=0.2), tokenizer)
    held = {document.name for document in data.held_out}
    assert 1 <= len(held) == 30 - data.documents
    for document in data.held_out:
        text = Path(document.name).read_text()
        assert document.bytes == len(text.encode())
        assert document.input_ids.tolist() == [tokenizer.eos_token_id, *tokenizer.encode(text)]
        assert document.labels.tolist() == [-100, *tokenizer.encode(text)]
    read = Counter(i for step in range(64) for row in rows(data, step) for i in row)
    assert read
    others = SourceSettings(paths=(str(texts / "0*"),))
    apart = table(texts, held_out_sources=(others,))
    assert len(build_data(apart, tokenizer).held_out) == 10


def test_texts_are_encoded_once_and_again_when_they_change(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("the quick brown fox " * 20)
    first = build_data(table(path), tokenizer)
    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedTokenizerFast, "__call__", None)
        assert build_data(table(path), tokenizer).fingerprint() == first.fingerprint()
    [store] = (tmp_path / "cache").iterdir()
    # What is not whole is made again.
    (store / "ids.bin").write_bytes(b"")
    assert build_data(table(path), tokenizer).fingerprint() == first.fingerprint()
    path.write_text("the quick brown fax " * 20)
    changed = build_data(table(path), tokenizer)
    assert changed.fingerprint() != first.fingerprint()
    assert len(list((tmp_path / "cache").iterdir())) == 2
    # Another place is not another text.
    (tmp_path / "b.txt").write_text("the quick brown fax " * 20)
    assert build_data(table(tmp_path / "b.txt"), tokenizer).fingerprint() == changed.fingerprint()


def test_what_a_killed_process_left_is_taken_away(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox")
    build_data(table(tmp_path / "a.txt"), tokenizer)
    [store] = (tmp_path / "cache").iterdir()
    shutil.rmtree(store)
    for name, age in (("old", 7200), ("new", 0)):
        left = store.with_name(f".{store.name}.{name}")
        left.mkdir()
        (left / "ids.bin").write_bytes(b"1234")
        for path in (left / "ids.bin", left):
            os.utime(path, (time.time() - age,) * 2)
    build_data(table(tmp_path / "a.txt"), tokenizer)
    assert sorted((tmp_path / "cache").iterdir()) == [left, store]


def test_encoding_takes_memory_for_a_piece_and_not_for_a_file(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("records", "text"):
        monkeypatch.setattr(f"quintet.training.data.{module}.PIECE", 1 << 12)
    monkeypatch.setattr("quintet.training.data.encoding.TOGETHER", 1 << 12)
    lines = "".join(f"{i} {WORDS}\n" for i in range(2000))
    (tmp_path / "long.txt").write_text(lines)
    (tmp_path / "many.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in lines.splitlines())
    )
    # A first text brings what stays: modules, templates.
    build_data(table(*_few(tmp_path)), tokenizer)
    for name in ("long.txt", "many.jsonl"):
        tracemalloc.start()
        data = build_data(table(tmp_path / name), tokenizer)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert data.tokens > 80_000
        # Fifty bytes a document stay; ids as lists alone would take thirty-six a token.
        assert most < 1_200_000, name


def _few(root: Path) -> list[Path]:
    (root / "few.jsonl").write_text('{"text": "the quick brown fox"}\n')
    return [root / "few.jsonl"]


def test_nothing_is_left_where_encoding_fails(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\nbad \xff\n")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8: line 2.*on_bad = 'skip'"):
        build_data(table(tmp_path / "a.txt"), tokenizer)
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").write_text("")
    (tmp_path / "a.txt").write_text("good")
    with pytest.raises(SaveError, match=r"data\.cache"):
        build_data(table(tmp_path / "a.txt", cache=str(tmp_path / "file")), tokenizer)


def test_bad_samples_are_left_out_where_that_is_asked_for_and_told(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("good enough")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").write_text("")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    told: list[str] = []
    settings = table(*sorted(tmp_path.glob("*.txt")), on_bad="skip")
    for _ in range(2):
        told.clear()
        assert build_data(settings, tokenizer, tell=told.append).documents == 1
        assert f"data: empty: 2 left out, the first at {tmp_path / 'b.txt'}" in told
        assert f"data: not UTF-8: 1 left out, the first at {tmp_path / 'd.txt'}" in told
    with pytest.raises(DataError, match=r"b\.txt: empty"):
        build_data(table(*sorted(tmp_path.glob("*.txt"))), tokenizer)
    with pytest.raises(DataError, match="no sample is left"):
        build_data(table(tmp_path / "b.txt", on_bad="skip"), tokenizer)


def test_ids_that_the_model_does_not_know_are_refused(
    texts: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=r"makes the id \d+, and the model knows 50 ids"):
        build_data(table(texts), tokenizer, vocab_size=50)


def test_wrong_settings_are_named(texts: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    wrong: list[tuple[dict[str, object], str]] = [
        ({"batch_tokens": 100}, r"batch_tokens = 100: has to be a multiple of the context, 32"),
        ({"batch_rows": 2}, "batch_tokens and batch_rows: both are set"),
        ({"batch_tokens": None}, "batch_tokens and batch_rows: neither is set"),
        ({"context": 1}, "context = 1: has to be 2 or more"),
        ({"context": ()}, "context: name at least one phase"),
        ({"held_out": 1.0}, "held_out = 1.0: has to be a share"),
        ({"sources": ()}, "sources: name at least one"),
        ({"sources": weighted(0, 0)}, r"sources: the weights are \[0, 0\]"),
        ({"sources": weighted(1, -1)}, r"sources: the weights are \[1, -1\]"),
        ({"sources": weighted(1, None)}, r"sources\.1\] weight: is missing"),
    ]
    for changes, message in wrong:
        with pytest.raises(SettingError, match=message):
            table(texts, **changes)
    with pytest.raises(SettingError, match="until"):
        ContextPhase(until="soon", context=8)
    missing = SourceSettings(paths=(str(texts / "*.md"),))
    with pytest.raises(ModelNotFoundError, match="names no file"):
        build_data(table(texts, sources=(missing,)), tokenizer)
    excluded = SourceSettings(paths=(str(texts),), exclude=("*.txt",))
    with pytest.raises(ConfigError, match="are excluded"):
        build_data(table(texts, sources=(excluded,)), tokenizer)
    with pytest.raises(ConfigError, match="'random' takes rows from a stream"):
        build_data(table(texts, windows="random", packing="whole"), tokenizer)
    with pytest.raises(ConfigError, match=r"data\.end: the tokenizer has no token '<none>'"):
        build_data(table(texts, end="<none>"), tokenizer)


def test_a_folder_of_records_is_read_without_what_describes_them(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "README.md").write_text("A card.")
    (folder / "state.json").write_text("{}")
    (folder / "a.jsonl").write_text('{"text": "read this"}\n')
    assert build_data(table(folder), tokenizer).documents == 1
    with pytest.raises(ConfigError, match=r"state\.json can hold .* format = 'jsonl' or 'text'"):
        build_data(table(folder / "state.json"), tokenizer)


def test_a_text_of_one_token_is_bad(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"a\.txt: one token: nothing can be predicted"):
        build_data(table(tmp_path / "a.txt", end=False), tokenizer)

"""Files to records, whatever they are written in; what is bad is named with file and line."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiny
from parsing.templates import tokenizer as with_template
from quintet import PreTrainedTokenizerFast
from quintet.errors import ConfigError, DataError, MissingDependencyError
from quintet.training.data import DataSettings, FieldNames, SourceSettings, TokenData, build_data
from quintet.training.data.text import TextEncoder
from quintet.training.progress import Progress

START = Progress(step=0, tokens=0, done=0.0)
RECORDS: list[dict[str, Any]] = [{"text": f"This is text number {i}."} for i in range(7)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.trained_tokenizer()


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(one) + "\n" for one in records)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(records), path)
        case ".arrow":
            table = pa.Table.from_pylist(records)
            opened = pa.ipc.new_stream if "stream" in path.name else pa.ipc.new_file
            with opened(str(path), table.schema) as writer:
                writer.write_table(table)
        case ".gz":
            path.write_bytes(gzip.compress(lines(records).encode()))
        case ".txt":
            path.write_text("\n\n".join(one["text"] for one in records))
        case _:
            # As some programs begin a file.
            path.write_text("\ufeff" + lines(records))
    return path


def built(
    path: Path, tokenizer: PreTrainedTokenizerFast, *, told: list[str] | None = None, **changes: Any
) -> TokenData:
    own = {k: changes.pop(k) for k in ("fields", "format", "kind", "undecodable") if k in changes}
    named = {"context": 64, "batch_rows": 2, "cache": str(path.parent / "cache"), **changes}
    settings = DataSettings(sources=(SourceSettings(paths=(str(path),), **own),), **named)
    return build_data(settings, tokenizer, tell=(told if told is not None else []).append)


FORMATS = ["a.jsonl", "a.jsonl.gz", "a.parquet", "file.arrow", "stream.arrow", "a.txt"]


@pytest.mark.parametrize("name", FORMATS)
def test_all_formats_say_the_same(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write(tmp_path / name, RECORDS)
    form = "lines" if name.endswith(".txt") else None
    data = built(path, tokenizer, held_out=0.5, format=form)
    assert 0 < len(data.held_out) < 7
    assert data.documents == 7 - len(data.held_out)
    expected = built(write(tmp_path / "same.jsonl", RECORDS), tokenizer, held_out=0.5)
    assert data.fingerprint() == expected.fingerprint()
    for document in data.held_out:
        place, number = document.name.rsplit(":", 1)
        assert place == str(path)
        # The lines of text lie two apart.
        index = (int(number) - 1) // (2 if form else 1)
        assert tokenizer.decode(document.input_ids[1:]) == RECORDS[index]["text"]


CHAT = [
    {"role": "user", "content": "How warm?"},
    {"role": "assistant", "content": "Warm."},
]
KINDS: dict[str, list[dict[str, Any]]] = {
    "chat": [{"messages": CHAT}, {"messages": [*CHAT, *CHAT]}],
    "completion": [
        {"prompt": "1 + 1 =", "completion": " 2"},
        {"prompt": "2 + 2 =", "completion": " 4"},
    ],
    "pairs": [
        {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3 or so"},
        {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{**CHAT[1], "content": "No."}]},
        {"chosen": CHAT, "rejected": [CHAT[0], {**CHAT[1], "content": "Cold, it seems."}]},
        {"chosen": "good", "rejected": "bad"},
    ],
}


def test_what_other_rows_have_is_no_part_of_a_call(tmp_path: Path) -> None:
    """A column of Arrow has the arguments of all calls; a call has its own."""
    records = [{"messages": [CHAT[0], called({"a": 1})]}, {"messages": [CHAT[0], called({"b": 2})]}]
    row, line = tmp_path / "a.parquet", tmp_path / "a.jsonl"
    for path in (row, line):
        write(path, records)
    tokenizer = with_template("qwen")
    assert built(row, tokenizer).fingerprint() == built(line, tokenizer).fingerprint()


def called(arguments: dict[str, int]) -> dict[str, Any]:
    function = {"name": "w", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_answers_are_learned_and_prompts_are_not(kind: str, name: str, tmp_path: Path) -> None:
    tokenizer = with_template("qwen")
    records = KINDS[kind][:2] if name == "a.jsonl" else KINDS[kind][:1]
    data = built(write(tmp_path / name, records), tokenizer, packing="padded")
    assert data.documents == len(records)
    [batch] = data.parts(START)
    learned = {tokenizer.decode(row[row != -100]) for row in batch.labels}
    expected = {
        "chat": {"Warm.<|im_end|>", "Warm.<|im_end|>Warm.<|im_end|>"},
        "completion": {" 2<|im_end|>", " 4<|im_end|>"},
        "pairs": {" 2<|im_end|>", " 3 or so<|im_end|>", "Warm.<|im_end|>", "No.<|im_end|>"},
    }[kind]
    assert learned <= expected
    assert name != "a.jsonl" or learned == expected
    apart = (SourceSettings(paths=(str(tmp_path / name),)),)
    held = built(tmp_path / name, tokenizer, packing="padded", held_out_sources=apart).held_out
    assert len(held) == len(records)
    assert {document.bytes for document in held} == {0}
    assert {tokenizer.decode(d.labels[d.labels != -100]) for d in held} <= expected


def test_the_preferred_of_a_pair_are_the_first_half(tmp_path: Path) -> None:
    tokenizer = with_template("qwen")
    data = built(write(tmp_path / "a.jsonl", KINDS["pairs"]), tokenizer, batch_rows=4)
    whole = next(data.parts(START))
    better, worse = whole.input_ids[:4], whole.input_ids[4:]
    pairs = {(" 2", " 3 or so"), ("Warm.", "No."), ("Warm.", "Cold, it seems."), ("good", "bad")}
    texts = [(tokenizer.decode(a), tokenizer.decode(b)) for a, b in zip(better, worse, strict=True)]
    for good, bad in pairs:
        assert any(good in one and bad in other for one, other in texts)
    # However a step is cut, a part has both of its pairs.
    parts = list(data.parts(START, 2))
    assert [len(part.input_ids) for part in parts] == [4, 4]
    assert tokenizer.decode(parts[1].input_ids[0]).startswith(texts[2][0][:5])


def test_bad_records_are_named_with_their_line(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    good = json.dumps({"text": "good"})
    bad = {
        b'{"text": 1': "not JSON: character 11",
        b'{"text": "\xff"}': "not UTF-8: byte 11",
        b"[1]": r"not a JSON object: \[1\]",
        b'{"txt": "a"}': r"no field 'text': there are \['txt'\]",
        b'{"text": 5}': "the field 'text' is no text: 5",
        b'{"text": ""}': "empty: the field 'text' is ''",
        b'{"text": "\\ud800"}': "not Unicode: half of a surrogate pair",
        b"[" * 100_000: "not JSON",
    }
    path = tmp_path / "a.jsonl"
    for line, message in bad.items():
        path.write_bytes(f"{good}\n\n{good}\n".encode() + line + f"\n{good}\n".encode())
        with pytest.raises(DataError, match=rf"a\.jsonl:4: {message}"):
            built(path, tokenizer)
    path.write_bytes(b"\n".join([good.encode(), *bad]))
    told: list[str] = []
    assert built(path, tokenizer, on_bad="skip", told=told).documents == 1
    assert sum(": 1 left out, the first at" in message for message in told) == len(bad) - 2
    assert any("data: not JSON: 2 left out, the first at" in message for message in told)
    replaced = built(path, tokenizer, on_bad="skip", undecodable="replace")
    assert replaced.documents == 2


def test_bad_conversations_and_pairs_are_named(tmp_path: Path) -> None:
    tokenizer = with_template("qwen")
    path = tmp_path / "a.jsonl"
    cases: list[tuple[list[dict[str, Any]], str]] = [
        ([*KINDS["chat"], {"messages": CHAT[:1]}], "a.jsonl:3: no answer to learn"),
        ([*KINDS["chat"], {"messages": [{"role": "me"}]}], "a.jsonl:3: not a conversation"),
        ([*KINDS["chat"], {"text": "x"}], "a.jsonl:3: no field 'messages'"),
        ([{"chosen": "a", "rejected": "a"}], "a.jsonl:1: two answers alike: 'a'"),
        ([*KINDS["completion"], {"prompt": 1, "completion": 2}], "a.jsonl:3: neither text nor"),
    ]
    for records, message in cases:
        path.write_text(lines(records))
        with pytest.raises(DataError, match=message):
            built(path, tokenizer)
    path.write_text(lines([{"a": "x", "b": "y"}]))
    with pytest.raises(ConfigError, match=r"has the fields \['a', 'b'\].*fields = "):
        built(path, tokenizer)
    named = FieldNames(prompt="a", completion="b")
    assert built(path, tokenizer, fields=named).documents == 1


def test_damaged_files_are_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name in ("a.parquet", "a.arrow", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(b"PAR1 and nothing else")
        with pytest.raises(DataError, match=f"{name} "):
            built(tmp_path / name, tokenizer)


def test_what_has_to_be_installed_is_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", RECORDS)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match="pip install pyarrow"):
        built(path, tokenizer)


def test_long_texts_are_encoded_in_pieces_as_they_would_be_as_a_whole(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("records", "text"):
        monkeypatch.setattr(f"quintet.training.data.{module}.PIECE", 100)
    text = "".join(
        f"def f{i}(x):\n    return {i}  \n\n\t# é 你好 {'x' * (i % 50)}\r\n" for i in range(120)
    )
    path = tmp_path / "a.txt"
    path.write_text(text, newline="")
    encoder = TextEncoder(tokenizer, True, control_tokens=False)

    def pieces() -> Iterator[str]:
        yield from (text[i : i + 77] for i in range(0, len(text), 77))

    parts = list(encoder.stream(pieces()))
    assert len(parts) > 10
    whole = encoder.encode([text])[0]
    assert [i for part in parts for i in part] == whole
    data = built(path, tokenizer, held_out_sources=(SourceSettings(paths=(str(path),)),))
    [document] = data.held_out
    assert document.input_ids[1:].tolist() == whole
    assert document.bytes == len(text.encode())


def test_control_tokens_in_a_text_are_text_unless_asked_for(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a <|im_start|> b")
    index = tokenizer.convert_tokens_to_ids("<|im_start|>")
    options: dict[str, Any] = {"context": 4, "packing": "padded"}
    assert (
        built(path, tokenizer, **options).tokens
        > built(path, tokenizer, control_tokens=True, **options).tokens
    )
    [batch] = built(path, tokenizer, control_tokens=True, context=64, packing="padded").parts(START)
    assert index in batch.input_ids
    [batch] = built(path, tokenizer, context=64, packing="padded").parts(START)
    assert index not in batch.input_ids

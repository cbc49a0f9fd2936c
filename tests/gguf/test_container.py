import struct
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quintet.errors import CheckpointError, ModelNotFoundError
from quintet.gguf import read_gguf
from work import in_sums

F32, Q8_0 = 0, 8


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def u32(name: str, value: int) -> bytes:
    return key(name, 4, struct.pack("<I", value))


def listed(name: str, kind: int, count: int, values: bytes) -> bytes:
    return key(name, 9, struct.pack("<IQ", kind, count) + values)


def tensor(
    name: str | bytes = "a", dims: Iterable[int] = (4,), kind: int = F32, offset: int = 0
) -> bytes:
    dims = list(dims)
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def framed(
    keys: Iterable[bytes] = (),
    tensors: Iterable[bytes] = (),
    data: int = 0,
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    keys, tensors = list(keys), list(tensors)
    number_of = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, *number_of) + b"".join((*keys, *tensors))
    return head + bytes(-len(head) % alignment) + bytes(data)


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


FILES = {
    "empty": (b"", "no GGUF"),
    "the magic alone": (b"GGUF", "4 bytes long"),
    "something else": (b"0" * 100, "no GGUF"),
    "a pointer of LFS": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "a web page": (b"\n<!DOCTYPE html><html>" + b" " * 50, "web page"),
    "safetensors": ((20).to_bytes(8, "little") + b'{"__metadata__":{}}  ', "safetensors"),
    "a pickle": (b"PK\x03\x04" + bytes(40), "pickle"),
    "older than GGUF": (b"tjgg" + bytes(40), "before GGUF"),
    "version 1": (framed(version=1), "version 1"),
    "version 4": (framed(version=4), "version 4"),
    "big-endian": (b"GGUF" + (3).to_bytes(4, "big") + bytes(40), "big-endian"),
    "too many tensors": (framed(counts=(2**63, 0)), f"{2**63} tensors"),
    "more tensors than bytes": (framed(counts=(900_000, 0)), "900000 tensors"),
    "too many keys": (framed(counts=(0, 2**64 - 1)), f"{2**64 - 1} keys"),
    "a key without a name": (framed([u32("", 1)]), "without a name"),
    "a key twice": (framed([u32("twin", 1), u32("twin", 1)]), "'twin' twice"),
    "a key that is no text": (framed([key(b"\xff\xfe", 4, bytes(4))]), "not UTF-8"),
    "a type that is none": (framed([key("odd", 13, bytes(8))]), "unknown type 13"),
    "a list of lists": (framed([listed("deep", 9, 0, b"")]), "type 9"),
    "a list past the end": (framed([listed("long", 4, 2**61, b"")]), f"{2**61} values"),
    "a list of most": (framed([listed("long", 0, 16_000_001, bytes(16_000_001))]), "16000001"),
    "a text past the end": (framed([key("t", 8, (2**40).to_bytes(8, "little"))]), "1099511627776"),
    "a text at the edge": (framed([key("t", 8, (2**64 - 1).to_bytes(8, "little"))]), "has 't'"),
    "a text in a list": (
        framed([listed("l", 8, 2, text("good") + (2**62).to_bytes(8, "little") + bytes(20))]),
        f"a text of {2**62} bytes in 'l'",
    ),
    "texts that end": (framed([listed("l", 8, 2, text("eight888"))], alignment=1), "within 'l'"),
    "text that is no text": (framed([listed("l", 8, 1, text(b"\xc3\x28"))]), "not UTF-8"),
    "half true": (framed([key("b", 7, b"\x02")]), "neither true nor false"),
    "half true in a list": (framed([listed("b", 7, 2, b"\x01\x02")]), "neither true nor false"),
    "alignment as text": (framed([key("general.alignment", 8, text("32"))]), "'32'"),
    "alignment of true": (framed([key("general.alignment", 7, b"\1")]), "alignment=True"),
    "alignment 24": (framed([u32("general.alignment", 24)]), "alignment=24"),
    "alignment 0": (framed([u32("general.alignment", 0)]), "alignment=0"),
    "alignment of millions": (framed([u32("general.alignment", 2**20)]), "alignment=1048576"),
    "cut in a key": (framed([u32("whole", 1)])[:-20], "ends after"),
    "a name too long": (framed([], [tensor("n" * 256)], 16), "256 bytes"),
    "no name": (framed([], [tensor("")], 16), "without a name"),
    "a name twice": (framed([], [tensor(), tensor()], 16), "'a' twice"),
    "no axes": (framed([], [tensor(dims=())], 16), "0 axes"),
    "five axes": (framed([], [tensor(dims=[1] * 5)], 16), "5 axes"),
    "millions of axes": (framed([], [text("a") + b"\xff" * 40], 16), "4294967295 axes"),
    "an empty axis": (framed([], [tensor(dims=[4, 0])], 16), "[0, 4]"),
    "an immense axis": (framed([], [tensor(dims=[2**63])], 16), f"[{2**63}]"),
    "axes that wrap": (framed([], [tensor(dims=[2**32, 2**32])], 16), "impossible shape"),
    "no whole blocks": (framed([], [tensor(dims=[33, 2], kind=Q8_0)], 80), "blocks of 32"),
    "a type unheard of": (framed([], [tensor(kind=99)], 16), "type 99"),
    "a type that was": (framed([], [tensor(kind=31)], 16), "Q4_0_4_4"),
    "an offset between": (framed([], [tensor(offset=8)], 40), "no multiple of 32"),
    "a gap": (framed([], [tensor(offset=32)], 64), "a gap before"),
    "an overlap": (framed([], [tensor(), tensor("b")], 64), "an overlap at"),
    "data of nobody": (framed([], [tensor()], 64), "32 bytes after its last tensor"),
    "cut data": (framed([], [tensor(), tensor("b", offset=32)], 40), "truncated: tensor 'b'"),
    "an offset beyond": (framed([], [tensor(offset=2**64 - 32)], 16), "a gap before"),
}


@pytest.mark.parametrize("content", FILES)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path: Path, content: str) -> None:
    raw, expected = FILES[content]
    assert expected in refusal(tmp_path / "x.gguf", raw)


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    keys = [u32("n", 3), key("t", 8, text("text")), listed("l", 8, 2, text("a") + text("bc"))]
    whole = framed(keys, [tensor()], 16)
    path = tmp_path / "x.gguf"
    path.write_bytes(whole)
    assert read_gguf(path).metadata["l"] == ["a", "bc"]
    for length in range(len(whole)):
        refusal(path, whole[:length])


VALUES: dict[str, tuple[Callable[[gguf.GGUFWriter, str], None], Any]] = {
    "u8": (lambda w, k: w.add_uint8(k, 255), 255),
    "i8": (lambda w, k: w.add_int8(k, -128), -128),
    "u16": (lambda w, k: w.add_uint16(k, 65535), 65535),
    "i16": (lambda w, k: w.add_int16(k, -32768), -32768),
    "u32": (lambda w, k: w.add_uint32(k, 2**32 - 1), 2**32 - 1),
    "i32": (lambda w, k: w.add_int32(k, -(2**31)), -(2**31)),
    "u64": (lambda w, k: w.add_uint64(k, 2**64 - 1), 2**64 - 1),
    "i64": (lambda w, k: w.add_int64(k, -(2**63)), -(2**63)),
    "f32": (lambda w, k: w.add_float32(k, 0.25), 0.25),
    "f64": (lambda w, k: w.add_float64(k, 0.1), 0.1),
    "bool": (lambda w, k: w.add_bool(k, True), True),
    "text": (lambda w, k: w.add_string(k, "ünï 你好"), "ünï 你好"),
    "texts": (lambda w, k: w.add_array(k, ["a", "", "ß"]), ["a", "", "ß"]),
    "numbers": (lambda w, k: w.add_array(k, [1, -2, 3]), array("i", [1, -2, 3])),
    "reals": (lambda w, k: w.add_array(k, [0.5, -2.0]), array("f", [0.5, -2.0])),
    "truths": (lambda w, k: w.add_array(k, [True, False]), array("B", [1, 0])),
}


@pytest.mark.parametrize("alignment", [32, 64])
def test_what_the_reference_writes_is_read(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for name, (add, _) in VALUES.items():
        add(writer, f"test.{name}")
    random = np.random.default_rng(0)
    arrays = {
        "one": random.standard_normal((3,), np.float32),
        "two": random.standard_normal((5, 7), np.float32),
        "three": random.standard_normal((2, 3, 4)).astype(np.float16),
        "four": random.standard_normal((2, 1, 3, 5), np.float32),
    }
    for name, values in arrays.items():
        writer.add_tensor(name, values)
    blocks = gguf.quantize(
        random.standard_normal((6, 64), np.float32), gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    found = read_gguf(path)

    assert found.path == path
    assert [*found.files] == [path]
    for name, (_, value) in VALUES.items():
        assert found.metadata[f"test.{name}"] == value
        assert type(found.metadata[f"test.{name}"]) is type(value)
    raw = path.read_bytes()
    for name, values in {**arrays, "blocks": blocks}.items():
        info = found.tensors[name]
        assert raw[info.start : info.start + info.nbytes] == values.tobytes()
        assert info.start % alignment == 0
    assert {name: found.tensors[name].shape for name in arrays} == {
        name: values.shape for name, values in arrays.items()
    }
    assert found.tensors["blocks"].shape == (6, 64)
    assert [*found.tensors] == [*arrays, "blocks"]


def split(number: int, count: int, total: int) -> list[bytes]:
    return [
        key("split.no", 2, struct.pack("<H", number)),
        key("split.count", 2, struct.pack("<H", count)),
        key("split.tensors.count", 5, struct.pack("<i", total)),
    ]


def write_shards(folder: Path, names: tuple[str, ...] = ("a", "b", "c")) -> list[Path]:
    paths = []
    for number, name in enumerate(names):
        path = folder / f"m-{number + 1:05}-of-{len(names):05}.gguf"
        keys = [*split(number, len(names), len(names)), *([u32("first", 1)] if not number else [])]
        path.write_bytes(framed(keys, [tensor(name)], 16))
        paths.append(path)
    return paths


def test_shards_are_one_whichever_is_given(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    for path in paths:
        found = read_gguf(path)
        assert found.path == paths[0]
        assert [*found.files] == paths
        assert found.metadata["first"] == 1
        assert {name: info.file for name, info in found.tensors.items()} == dict(
            zip("abc", paths, strict=True)
        )


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=paths[1].name):
        read_gguf(paths[2])


def test_shards_of_different_models_are_refused(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    paths[1].write_bytes(framed(split(0, 3, 3), [tensor("b")], 16))
    with pytest.raises(CheckpointError, match="file 2 of the 3"):
        read_gguf(paths[0])
    paths[1].write_bytes(framed(split(1, 3, 3), [tensor("a")], 16))
    with pytest.raises(CheckpointError, match="'a', which another file has too"):
        read_gguf(paths[0])
    paths[1].write_bytes(framed(split(1, 3, 3), [], 0))
    with pytest.raises(CheckpointError, match="2 tensors, not 3"):
        read_gguf(paths[0])


def test_a_shard_under_another_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(framed(split(0, 3, 3), [tensor()], 16))
    with pytest.raises(CheckpointError, match="one of 3 files"):
        read_gguf(path)


def test_a_name_like_that_of_a_shard_may_be_one_file(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00001.gguf"
    path.write_bytes(framed([], [tensor()], 16))
    assert [*read_gguf(path).tensors] == ["a"]


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    paths = write_shards(here)
    paths[1].rename(elsewhere / "secret")
    paths[1].symlink_to(elsewhere / "secret")
    with pytest.raises(CheckpointError, match="leads out"):
        read_gguf(paths[0])


def test_no_file_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no file"):
        read_gguf(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError):
        read_gguf(tmp_path)


def test_a_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    tokens = b"".join(text(f"token {number}") for number in range(300_000))
    path = tmp_path / "x.gguf"
    path.write_bytes(framed([listed("tokens", 8, 300_000, tokens)]))
    # A third of a second here, where the sum takes a third too.
    assert in_sums(lambda: read_gguf(path)) < 5
    assert len(read_gguf(path).metadata["tokens"]) == 300_000  # type: ignore[arg-type]

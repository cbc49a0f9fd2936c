import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from quintet.checkpoint.header import read_header
from quintet.errors import CheckpointError
from work import in_sums


def framed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000
    return str(caught.value)


FILES = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (b"\0" * 7, "7 bytes"),
    "length 0": (framed(b""), "does not begin with '{'"),
    "length 2^40": (framed(b"{}", length=2**40), f"{2**40} bytes but has 10"),
    "length 2^64-1": (framed(b"{}", length=2**64 - 1), f"{2**64 - 1}"),
    "one past the end": (framed(b"{}", length=3), "header of 3 bytes but has 10"),
    "above the cap": (framed(b"{" + b" " * 25_000_000), "25000000"),
    "a pointer of LFS": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "not JSON": (framed(b"{nope}"), "not readable as JSON"),
    "cut JSON": (framed(b'{"a": {"dty'), "not readable as JSON"),
    "not UTF-8": (framed(b'{"\xff": 1}'), "not readable as JSON"),
    "a list": (framed(b"[]"), "begin with '{'"),
    "nested 100 000 deep": (framed(b'{"a":' * 100_000), "not readable as JSON"),
    "5000 digits": (framed(b'{"a": ' + b"1" * 5000 + b"}"), "not readable as JSON"),
    "NaN": (framed(b'{"a": NaN}'), "NaN"),
    "a name twice": (
        framed(b'{"twin": 1, "twin": 2}'),
        "'twin' is there twice",
    ),
    "a field twice": (framed(b'{"a": {"dtype": "U8", "dtype": "I8"}}'), "'dtype' is there twice"),
    "metadata no map": (framed({"__metadata__": 3}), "__metadata__"),
    "metadata no text": (framed({"__metadata__": {"n": 3}}), "__metadata__"),
    "data of nobody": (framed({}, b"1234"), "4 bytes of data, of which its tensors hold 0"),
}


@pytest.mark.parametrize("content", FILES)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path: Path, content: str) -> None:
    raw, expected = FILES[content]
    assert expected in refusal(tmp_path / "x.safetensors", raw)


ENTRIES = {
    "no object": 3,
    "a field missing": {"dtype": "U8", "shape": [4]},
    "a field too many": {**entry(), "strides": [1]},
    "unknown dtype": entry(dtype="Q7"),
    "dtype no text": entry(dtype=["U8"]),
    "negative size": entry(shape=[-4]),
    "two negative sizes": entry(shape=[-2, -2]),
    "a fraction": entry(shape=[4.0]),
    "a truth value": entry(shape=[4, True]),
    "shape no list": entry(shape=4),
    "huge size": entry(shape=[2**63]),
    "huge product": entry(shape=[2**40, 2**40]),
    "huge beside empty": entry(shape=[2**40, 2**40, 0], offsets=[0, 0]),
    "65 axes": entry(shape=[1] * 64 + [4]),
    "too few bytes": entry(shape=[5]),
    "too many bytes": entry(shape=[3]),
    "backwards": entry(offsets=[4, 0]),
    "negative offset": entry(offsets=[-4, 0]),
    "three offsets": entry(offsets=[0, 2, 4]),
    "past the end": entry(shape=[400], offsets=[0, 400]),
    "a gap": entry(offsets=[1, 5]),
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_a_damaged_entry_is_named_by_its_tensor(tmp_path: Path, kind: str) -> None:
    message = refusal(tmp_path / "x.safetensors", framed({"layer.w": ENTRIES[kind]}, b"1234"))
    assert "'layer.w'" in message


def test_overlap_and_truncation_say_where(tmp_path: Path) -> None:
    both = {"a": entry(), "b": entry(offsets=[2, 6])}
    assert "overlap with byte 4" in refusal(tmp_path / "x", framed(both, b"123456"))
    message = refusal(tmp_path / "x", framed({"a": entry(), "b": entry(offsets=[4, 8])}, b"12345"))
    assert "'b' ends at byte 8 of the data, of which there are 5, 3 too few" in message


def test_a_name_that_is_not_text_is_refused_in_printable_words(tmp_path: Path) -> None:
    message = refusal(tmp_path / "x", framed({"a\ud800": entry()}, b"1234"))
    message.encode()


def test_a_directory_or_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="cannot be read") as caught:
            read_header(path)
        assert str(path) in str(caught.value)


def test_every_64th_of_a_file_is_refused(tmp_path: Path) -> None:
    whole = save({f"w{i}": torch.randn(5, 7) for i in range(20)})
    cuts = {len(whole) * part // 64 for part in range(64)}
    for cut in sorted(cuts | {len(whole) - 1}):
        refusal(tmp_path / "cut.safetensors", whole[:cut])
    assert "of which its tensors hold" in refusal(tmp_path / "longer", whole + b"\0")


def test_a_hundred_thousand_entries_are_checked_fast(tmp_path: Path) -> None:
    content = {f"t{i}": entry(offsets=[4 * i, 4 * i + 4]) for i in range(100_000)}
    path = tmp_path / "many.safetensors"
    path.write_bytes(framed(content, b"1234" * 100_000))
    assert in_sums(lambda: read_header(path)) < 40
    assert len(read_header(path).tensors) == 100_000


def test_a_flood_of_objects_is_stopped(tmp_path: Path) -> None:
    flood = b'{"a":[' + b"{}," * 1_100_000 + b"{}]}"
    assert "more than 1000000 objects" in refusal(tmp_path / "x", framed(flood))


def test_twins_among_many_names_are_found_fast(tmp_path: Path) -> None:
    names = b",".join(b'"n%d":0' % (i % 199_999) for i in range(200_000))

    def refuse() -> None:
        assert "'n0' is there twice" in refusal(tmp_path / "x", framed(b"{" + names + b"}"))

    assert in_sums(refuse) < 10


NUMBERS = st.integers(-3, 40) | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, -(2**63)])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
DTYPE_NAMES = ["BOOL", "U8", "F16", "BF16", "F32", "I64", "F8_E4M3", "F4", "C64"]
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPE_NAMES) | VALUES,
        "shape": st.lists(NUMBERS, max_size=3) | VALUES,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | VALUES,
    }
)


def same_as_library(raw: bytes) -> None:
    """Whatever is accepted here is read alike by the library; the rest is a named error."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(raw)
        try:
            header = read_header(path)
        except CheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017  (both outcomes are right)
            return
        with safe_open(path, framework="pt") as handle:
            assert set(handle.keys()) == set(header.tensors)
            for name, info in header.tensors.items():
                tensor = handle.get_tensor(name)
                assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRY | VALUES, max_size=3),
    st.integers(0, 80),
)
def test_a_made_up_header_is_refused_or_read_as_the_library_does(
    content: dict[str, Any], size: int
) -> None:
    same_as_library(framed(content, b"\0" * size))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_file_is_refused_or_read_as_the_library_does(data: st.DataObject) -> None:
    raw = bytearray(save({"a": torch.ones(2, 3), "b": torch.ones(5, dtype=torch.int8)}))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["flip", "digit", "cut", "grow"]))
        if kind == "flip":
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "digit":
            digits = [i for i, byte in enumerate(raw[8:]) if 48 <= byte < 58]
            if digits:
                raw[8 + data.draw(st.sampled_from(digits))] = 48 + data.draw(st.integers(0, 9))
        elif kind == "cut":
            del raw[at : at + data.draw(st.integers(1, 9))]
        else:
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        if not raw:
            break
    same_as_library(bytes(raw))


def test_the_order_is_that_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1, dtype=torch.int8), "b": torch.ones(1)}, path, {"k": "v"})
    header = read_header(path)
    assert list(header.tensors) == ["b", "a"]
    assert header.metadata == {"k": "v"}
    assert header.tensors["b"].nbytes == 4

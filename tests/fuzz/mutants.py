"""Changes to a file: of its bytes, of its words, and of the structure of its JSON."""

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

__all__ = ["mutant"]

# What a value may be instead: other types, numbers beyond every bound, text of every danger.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64),
    *(10**9, -(10**9), 10**20, 10**400, 0.0, -0.0, 0.5, 1e-300, 1e308, float("inf")),
    *(float("nan"), float("-inf"), "", " ", "a", "none", "true", "0", "\x00", "\ud800", "\udcff"),
    *("ünï 你好 🙂", "../../etc/passwd", "/etc/passwd", "https://example.com", "x" * 300, "%s{0}"),
    *("{{ 1 }}", "(a+)+$", "\\", "[", "\u2028", "cpu", "float8_e4m3fn", "default", "<unk>"),
    *([], {}, [[]], [None], [1, 2], ["a"], {"": None}, {"a": {"b": []}}, [{}], {"__float__": 1}),
    *({"__float__": "Infinity"}, {"type": "yarn"}, {"content": 3}, [0] * 2000, ["a"] * 2000),
)
WORDS = (
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\x00", b"\xff", b"\xed\xa0\x80"),
    *(b"\xef\xbb\xbf", b"\n", b"\r\n", b"\t", b"NaN", b"Infinity", b"-", b"1e999", b"9" * 5000),
    *(b"\\ud800", b"\\u0000", b"{{", b"}}", b"{%", b"%}", b"{#", b"#}", b"|", b"(", b")", b"'"),
    *(b"{% for a in range(10**9) %}", b"{% endfor %}", b"{{ x ** x }}", b"__class__", b"~"),
    *(b"[" * 2000, b'{"a":' * 2000, b"null", b"true", b" ", b"a" * 100_000),
)


def mutant(content: bytes, random: Random) -> bytes:
    """Return a file that is a little, or much, another one; never the same for long."""
    kinds: Sequence[Callable[[bytes, Random], bytes]] = (_bytes, _words)
    if content[:1] in (b"{", b"["):
        kinds = (_bytes, _words, _structure, _structure, _structure, _structure)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        content = random.choice(kinds)(content, random)
    return content


def _bytes(content: bytes, random: Random) -> bytes:
    data = bytearray(content)
    kind = random.randrange(7)
    at = random.randrange(len(data) + 1)
    length = min(2 ** random.randrange(12), len(data))
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        del data[at : at + length]
    elif kind == 2:
        data[at:at] = data[at : at + length]
    elif kind == 3:
        data[at:at] = random.randbytes(random.randrange(1, 9))
    elif kind == 4:
        start = random.randrange(len(data) + 1)
        data[at : at + length] = data[start : start + length]
    else:
        for _ in range(random.choice((1, 1, 3, 20)) if data else 0):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def _words(content: bytes, random: Random) -> bytes:
    at = random.randrange(len(content) + 1)
    end = at + random.choice((0, 0, 1, 4))
    return content[:at] + random.choice(WORDS) + content[end:]


def _structure(content: bytes, random: Random) -> bytes:
    """Change one place in a JSON value, chosen from its top to its leaves alike."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return _bytes(content, random)
    box: Any = [value]
    at, key = box, 0
    while isinstance(at[key], dict | list) and at[key] and random.random() < 0.8:
        at = at[key]
        key = random.choice(list(at) if isinstance(at, dict) else range(len(at)))
    kind = random.randrange(8)
    if kind == 0 and at is not box:
        del at[key]
    elif kind == 1 and isinstance(at, dict):
        at[random.choice(("", "a", "\ud800", "x" * 300, key.upper(), f"{key} "))] = at[key]
    elif kind == 2 and isinstance(at, dict):
        at[key] = at[random.choice(list(at))]
    elif kind == 3 and isinstance(at[key], int) and not isinstance(at[key], bool):
        at[key] += random.choice((-1, 1, -at[key], at[key], 10**6, 10**9))
    elif kind == 4:
        # A thousand times a thousand would be more than the fuzzer itself has memory for.
        at[key] = [at[key]] * random.choice((1, 2, 1000 if len(content) < 100_000 else 2))
    elif kind == 5:
        at[key] = {str(key): at[key]}
    elif kind == 6 and isinstance(at[key], str):
        at[key] = random.choice((at[key] * 2, at[key][:-1], at[key].upper(), f"\x00{at[key]}"))
    else:
        at[key] = random.choice(VALUES)
    try:
        return json.dumps(box[0]).encode()
    except (ValueError, RecursionError):
        return _bytes(content, random)

"""Pre-tokenizers by llama.cpp's names.

A GGUF file names the parting and does not say it. These are the partings of the tokenizers that
the models were released with, in the syntax of `tokenizers`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers


@dataclass(frozen=True, slots=True)
class Parting:
    """The steps before a byte-level BPE.

    Attributes:
        patterns: regular expressions, one after the other; what they match stands alone.
        digits: whether each digit then stands alone.
        gpt2: whether the byte-level step then parts by the pattern of GPT-2.
        nfc: whether the text is composed first.
        whole: whether a part that is itself in the vocabulary is one token, whatever the merges.
    """

    patterns: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    nfc: bool = False
    whole: bool = False

    def apply(self, pipeline: Tokenizer) -> None:
        """Give a pipeline these steps, and the decoder that goes with them."""
        if self.nfc:
            pipeline.normalizer = normalizers.NFC()
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns
        ]
        if self.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.gpt2))
        pipeline.pre_tokenizer = pre_tokenizers.Sequence(steps)
        pipeline.decoder = decoders.ByteLevel()


# Letters that have capitals, of the scripts that have them; as escapes, for some of them are
# turned into others by whatever composes a text.
_CASED = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LLM = (
    "[\r\n]",
    rf"\s?[{_CASED}]+",
    r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CJK,
)
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+",
)


def _tiktoken(digits: int) -> str:
    """Return the pattern that Qwen2 and Llama 3 share except for the number of digits."""
    number = r"\p{N}" if digits == 1 else rf"\p{{N}}{{1,{digits}}}"
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
        r"|[^\r\n\p{L}\p{N}]?\p{L}+"
        rf"|{number}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+"
        r"|\s+(?!\S)"
        r"|\s+"
    )


_QWEN2 = Parting((_tiktoken(1),), nfc=True)
_LLAMA3 = Parting((_tiktoken(3),), whole=True)
PARTINGS: Mapping[str, Parting] = MappingProxyType(
    {
        "qwen2": _QWEN2,
        "deepseek-r1-qwen": _QWEN2,
        "deepseek-llm": Parting(_DEEPSEEK_LLM, digits=True),
        "deepseek-coder": Parting(_DEEPSEEK_CODER, digits=True),
        "deepseek-v3": Parting(_DEEPSEEK_V3),
        "smollm": Parting(digits=True, gpt2=True),
        "gpt-2": Parting(gpt2=True),
        "llama-bpe": _LLAMA3,
        "llama3": _LLAMA3,
        "llama-v3": _LLAMA3,
    }
)


def parting_of(pipeline: Tokenizer) -> str | None:
    """Return the name of a byte-level pipeline's steps; None if they are no known ones'."""
    found = _read(pipeline)
    return next((name for name, parting in PARTINGS.items() if parting == found), None)


def _read(pipeline: Tokenizer) -> Parting | None:
    composed = [step["type"] for step in _steps(pipeline.normalizer, "normalizers")]
    steps = list(_steps(pipeline.pre_tokenizer, "pretokenizers"))
    last = steps.pop() if steps else {}
    digits = bool(steps) and steps[-1] == {"type": "Digits", "individual_digits": True}
    splits = steps[:-1] if digits else steps
    if composed not in ([], ["NFC"]) or last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if any(
        {**split, "pattern": 0} != _SPLIT or "Regex" not in split["pattern"] for split in splits
    ):
        return None
    return Parting(
        tuple(split["pattern"]["Regex"] for split in splits),
        digits=digits,
        gpt2=last["use_regex"],
        nfc=bool(composed),
        whole=pipeline.model.ignore_merges,
    )


_SPLIT = {"type": "Split", "pattern": 0, "behavior": "Isolated", "invert": False}


def _steps(step: Any, inside: str) -> Iterator[dict[str, Any]]:
    """Yield a step as a file describes it, or those of a sequence."""
    if step is None:
        return
    state = json.loads(step.__getstate__())
    yield from _flat(state, inside)


def _flat(state: dict[str, Any], inside: str) -> Iterator[dict[str, Any]]:
    if state["type"] != "Sequence":
        yield state
        return
    for part in state[inside]:
        yield from _flat(part, inside)

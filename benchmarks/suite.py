"""What is measured, of whom, and what we set out to reach."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["CASES", "TARGETS", "Case", "Contender", "Target"]

Kind = Literal["prefill", "decode", "load"]


@dataclass(frozen=True, slots=True)
class Contender:
    """Who runs, and how the weights are held.

    Attributes:
        peer: quintet, transformers or llama.cpp.
        weights: bf16, int8 or int4; Q8_0 and Q4_0 there.
    """

    peer: str
    weights: str

    @property
    def name(self) -> str:
        """How results call it."""
        return f"{self.peer} {self.weights}"


OURS = Contender("quintet", "bf16")
OURS_INT8 = Contender("quintet", "int8")
OURS_INT4 = Contender("quintet", "int4")
EAGER = Contender("transformers", "bf16")
LLAMA = Contender("llama.cpp", "BF16")
LLAMA_Q8 = Contender("llama.cpp", "Q8_0")
LLAMA_Q4 = Contender("llama.cpp", "Q4_0")


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement of one geometry.

    Attributes:
        geometry: a name in `quintet.measurement.geometries`.
        kind: a prompt, some steps, or a load to the first token.
        tokens: of the prompt, or of the context before the steps.
        batch: rows at once.
        contenders: who takes part.
        steps: how many are timed at a time.
    """

    geometry: str
    kind: Kind
    tokens: int
    batch: int
    contenders: tuple[Contender, ...]
    steps: int = 16

    @property
    def name(self) -> str:
        """What identifies it in the results."""
        if self.kind == "load":
            return f"{self.geometry} load"
        what = "pp" if self.kind == "prefill" else "tg @ "
        return f"{self.geometry} {what}{self.tokens} x{self.batch}"

    def facts(self) -> dict[str, Any]:
        """Return the fields that a result keeps."""
        kept = ("geometry", "kind", "tokens", "batch", "steps")
        return {key: value for key, value in asdict(self).items() if key in kept}


QWEN2 = "qwen2-0.5b"
V2_LITE, V2_LITE_Q = "deepseek-v2-lite-6l", "deepseek-v2-lite-6l-q1536"
QWEN_MOE = "qwen1.5-moe-a2.7b-6l"
ZAMBA2 = "zamba2-1.2b"
V3 = "deepseek-v3-2l-64e"

_ALL = (OURS, OURS_INT8, OURS_INT4, EAGER, LLAMA, LLAMA_Q8, LLAMA_Q4)
_BF16 = (OURS, EAGER, LLAMA)
_EAGER = (OURS, EAGER)
_LLAMA = (OURS, OURS_INT8, LLAMA, LLAMA_Q8)
_MANY = (OURS, OURS_INT8, EAGER, LLAMA, LLAMA_Q8)
_OURS_MANY = (OURS, OURS_INT8, EAGER)


# How many share a step.
_ROWS: tuple[tuple[Kind, int, int, int], ...] = tuple(
    ("decode", 512, rows, 8) for rows in (8, 16, 32)
)


def _cases(
    geometry: str, contenders: tuple[Contender, ...], *rows: tuple[Kind, int, int, int]
) -> list[Case]:
    return [Case(geometry, kind, n, batch, contenders, steps) for kind, n, batch, steps in rows]


CASES: tuple[Case, ...] = (
    *_cases(QWEN2, _ALL, ("decode", 512, 1, 16), ("prefill", 512, 1, 1)),
    *_cases(
        QWEN2,
        _BF16,
        ("decode", 4096, 1, 12),
        ("decode", 16384, 1, 8),
        ("decode", 512, 4, 8),
        ("prefill", 4096, 1, 1),
        ("load", 8, 1, 1),
    ),
    *_cases(QWEN2, _MANY, *_ROWS),
    *_cases(
        V2_LITE,
        _EAGER,
        ("decode", 512, 1, 12),
        ("decode", 4096, 1, 8),
        ("decode", 16384, 1, 8),
        ("decode", 512, 4, 8),
        ("prefill", 512, 1, 1),
        ("prefill", 4096, 1, 1),
    ),
    *_cases(V2_LITE, _OURS_MANY, *_ROWS),
    *_cases(
        V2_LITE_Q,
        _LLAMA,
        ("decode", 512, 1, 12),
        ("decode", 4096, 1, 8),
        ("decode", 16384, 1, 8),
        ("prefill", 512, 1, 1),
        ("prefill", 4096, 1, 1),
    ),
    *_cases(
        QWEN_MOE,
        _BF16,
        ("decode", 512, 1, 12),
        ("decode", 4096, 1, 8),
        ("decode", 16384, 1, 8),
        ("decode", 512, 4, 8),
        ("prefill", 512, 1, 1),
        ("prefill", 4096, 1, 1),
    ),
    *_cases(QWEN_MOE, _MANY, *_ROWS),
    *_cases(
        ZAMBA2,
        _EAGER,
        ("decode", 512, 1, 8),
        ("decode", 4096, 1, 8),
        ("decode", 16384, 1, 8),
        ("decode", 512, 4, 8),
        ("prefill", 512, 1, 1),
        ("prefill", 2048, 1, 1),
    ),
    *_cases(ZAMBA2, _OURS_MANY, *_ROWS),
    *_cases(V3, _EAGER, ("decode", 512, 1, 8), ("decode", 4096, 1, 8), ("prefill", 512, 1, 1)),
)


@dataclass(frozen=True, slots=True)
class Target:
    """What a result should reach.

    Attributes:
        label: of its row.
        case: the name of the case it is about.
        ours: whose result.
        against: a contender's name, "floor", or the name of another case of ours.
        least: of the ratio: their time over ours; the floor's over ours; tokens a second of this
            case over those of the other.
    """

    label: str
    case: str
    ours: str
    against: str
    least: float


def _each(label: str, case: str, least: dict[str, float], ours: str = OURS.name) -> list[Target]:
    return [Target(label, case, ours, against, ratio) for against, ratio in least.items()]


TARGETS: tuple[Target, ...] = (
    *_each(
        "Qwen2-0.5B decode, context 512",
        f"{QWEN2} tg @ 512 x1",
        {EAGER.name: 3.5, LLAMA.name: 1.1, "floor": 0.80},
    ),
    *_each(
        "the same, int8 weights",
        f"{QWEN2} tg @ 512 x1",
        {EAGER.name: 5.0, LLAMA_Q8.name: 1.3, "floor": 0.60},
        OURS_INT8.name,
    ),
    *_each("the same, int4 weights", f"{QWEN2} tg @ 512 x1", {LLAMA_Q4.name: 1.0}, OURS_INT4.name),
    *_each(
        "Qwen2-0.5B prefill 512",
        f"{QWEN2} pp512 x1",
        {EAGER.name: 1.25, LLAMA.name: 1.7, "floor": 0.85},
    ),
    *_each("Qwen2-0.5B prefill 4096", f"{QWEN2} pp4096 x1", {EAGER.name: 1.6, LLAMA.name: 1.7}),
    *_each("V2-Lite cut, decode at 4k", f"{V2_LITE} tg @ 4096 x1", {EAGER.name: 13.0}),
    *_each(
        "V2-Lite cut, decode at 16k",
        f"{V2_LITE} tg @ 16384 x1",
        {EAGER.name: 30.0, f"{V2_LITE} tg @ 512 x1": 1 / 1.4},
    ),
    *_each("V2-Lite with queries' rank, at 4k", f"{V2_LITE_Q} tg @ 4096 x1", {LLAMA.name: 1.5}),
    *_each("V2-Lite with queries' rank, at 16k", f"{V2_LITE_Q} tg @ 16384 x1", {LLAMA.name: 2.5}),
    *_each("V2-Lite cut, prefill 512", f"{V2_LITE} pp512 x1", {EAGER.name: 1.5}),
    *_each("V2-Lite cut, prefill 4096", f"{V2_LITE} pp4096 x1", {EAGER.name: 3.0}),
    *_each("V2-Lite with queries' rank, prefill 512", f"{V2_LITE_Q} pp512 x1", {LLAMA.name: 2.0}),
    *_each("V2-Lite with queries' rank, prefill 4096", f"{V2_LITE_Q} pp4096 x1", {LLAMA.name: 2.5}),
    *_each(
        "Qwen-MoE cut, decode",
        f"{QWEN_MOE} tg @ 512 x1",
        {EAGER.name: 3.3, LLAMA.name: 1.0, "floor": 0.85},
    ),
    *_each("Qwen-MoE cut, prefill", f"{QWEN_MOE} pp512 x1", {EAGER.name: 1.5, LLAMA.name: 2.0}),
    *_each("Zamba2-1.2B decode", f"{ZAMBA2} tg @ 512 x1", {EAGER.name: 4.0, "floor": 0.80}),
    *_each("Zamba2-1.2B prefill 512", f"{ZAMBA2} pp512 x1", {EAGER.name: 2.0}),
    *_each("Zamba2-1.2B prefill 2048", f"{ZAMBA2} pp2048 x1", {EAGER.name: 3.0}),
    *_each(
        "Qwen2-0.5B decode, batch 8 over batch 1",
        f"{QWEN2} tg @ 512 x8",
        {f"{QWEN2} tg @ 512 x1": 5.0},
    ),
    *_each("load of 1 GB to the first token", f"{QWEN2} load", {EAGER.name: 2.0}),
)

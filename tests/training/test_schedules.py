"""Numbers that change along a training."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.training.progress import Progress
from quintet.training.schedule import Schedule
from quintet.training.schedules import (
    Cosine,
    DeepseekV2Batch,
    DeepseekV2LearningRate,
    DeepseekV3Batch,
    DeepseekV3BiasSpeed,
    DeepseekV3LearningRate,
    DeepseekV3PredictionWeight,
    InverseSqrt,
    Linear,
    Number,
    Segment,
    Segments,
    Steps,
    WarmupStableDecay,
    Zamba2LearningRate,
    schedule_of,
)
from quintet.training.settings import SettingError, build, plain

STEPS, TOKENS = 1000, 512_000
CONTINUOUS: dict[str, Any] = {
    "wsd": WarmupStableDecay(3.0, warmup=0.1, decay=0.3),
    "wsd-sqrt": WarmupStableDecay(3.0, warmup="100 steps", decay=0.3, shape="sqrt", end=0.1),
    "cosine": Cosine(3.0, warmup="50k tokens"),
    "cosine-by-steps": Cosine(3.0, warmup="100 steps", end=0.0),
    "linear": Linear(3.0, warmup="10 %"),
    "linear-by-steps": Linear(3.0, warmup="100 steps"),
    "inverse": InverseSqrt(3.0, warmup="100 steps"),
    "zamba2": Zamba2LearningRate(3.0, warmup=0.1),
    "mixed": Segments(
        (
            Segment("100 steps", 3.0),
            Segment(0.3, 1.0, "cosine"),
            Segment("256k tokens", 2.0),
            Segment("900 steps", 0.5, "exponential"),
        )
    ),
}
continuous = pytest.mark.parametrize("schedule", CONTINUOUS.values(), ids=CONTINUOUS)


def at(step: float) -> Progress:
    """How far a training of `STEPS` equal steps is; of parts of steps, too."""
    return Progress(step, round(step * TOKENS / STEPS), step / STEPS)  # type: ignore[arg-type]


def billions(read: float, whole: float) -> Progress:
    """How far a training is that has read so many billions of tokens."""
    return Progress(2000 + round(read), round(read * 1e9), read / whole)


@continuous
def test_no_jumps(schedule: Schedule) -> None:
    values = [schedule.at(at(step / 4)) for step in range(4 * STEPS + 1)]
    assert values[0] == 0
    assert max(values) == pytest.approx(3.0, rel=0.01)
    # The root falls as fast as nothing else, in its first steps.
    most = 0.15 if schedule is CONTINUOUS["wsd-sqrt"] else 0.05
    assert max(abs(b - a) for a, b in itertools.pairwise(values)) < most


@continuous
def test_it_rises_and_then_falls(schedule: Schedule) -> None:
    values = [schedule.at(at(step)) for step in range(STEPS + 1)]
    rising = values[:99]
    assert all(a < b for a, b in itertools.pairwise(rising))
    if schedule not in (CONTINUOUS["zamba2"], CONTINUOUS["mixed"]):
        assert all(a >= b for a, b in itertools.pairwise(values[101:]))


@pytest.mark.parametrize(
    ("schedule", "last"),
    [
        (WarmupStableDecay(3.0), 0.0),
        (WarmupStableDecay(3.0, end=0.5), 1.5),
        (Cosine(3.0, end=0.1), 0.3),
        (Linear(3.0), 0.0),
        (Steps(3.0, factor=0.5), 0.75),
        (Zamba2LearningRate(3.0, end=0.01), 0.03),
    ],
)
def test_how_it_ends(schedule: Schedule, last: float) -> None:
    assert schedule.at(at(STEPS)) == pytest.approx(last)
    # A training that reads a little more than it was to goes on there.
    assert schedule.at(Progress(STEPS + 1, TOKENS + 1, 1.001)) == pytest.approx(last)


def test_a_rise_and_a_fall_that_meet_are_the_demos() -> None:
    for done in (0.0, 0.01, 0.03, 0.2, 0.99, 1.0):
        expected = 3e-3 * min(done / 0.03, (1 - done) / (1 - 0.03))
        assert Linear(3e-3, warmup=0.03).at(Progress(0, 0, done)) == pytest.approx(expected)


def test_half_a_cosine_as_pytorch_has_it() -> None:
    for step in range(0, STEPS, 50):
        expected = 0.2 + (1 - 0.2) * (1 + math.cos(math.pi * step / STEPS)) / 2
        assert Cosine(1.0, warmup=0.0, end=0.2).at(at(step)) == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=2, max_size=6),
    units=st.lists(st.sampled_from(["steps", "tokens", "share"]), min_size=6, max_size=6),
    values=st.lists(st.floats(0.1, 5.0), min_size=6, max_size=6),
    shape=st.sampled_from(["constant", "linear", "cosine", "sqrt", "exponential"]),
)
def test_units_do_not_matter_where_steps_are_alike(
    lengths: list[int], units: list[str], values: list[float], shape: Any
) -> None:
    ends = [*itertools.accumulate(lengths)]
    written = {
        "steps": lambda end: f"{end} steps",
        "tokens": lambda end: f"{end * 512} tokens",
        "share": lambda end: end / 2400,
    }
    mixed = [
        Segment(written[unit](end), value, shape)  # type: ignore[no-untyped-call]
        for end, unit, value in zip(ends, units, values, strict=False)
    ]
    alike = [
        Segment(f"{end} steps", value, shape) for end, value in zip(ends, values, strict=False)
    ]
    for step in range(0, 2400, 37):
        progress = Progress(step, step * 512, step / 2400)
        expected = Segments(tuple(alike), start=0.2).at(progress)
        assert Segments(tuple(mixed), start=0.2).at(progress) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("read", "rate", "batch", "weight", "speed"),
    [
        (0.0, 2.2e-4, 3072, 0.3, 0.001),
        (469.0, 2.2e-4, 15360, 0.3, 0.001),
        (9_999.0, 2.2e-4, 15360, 0.3, 0.001),
        (10_001.0, 2.2e-4, 15360, 0.1, 0.001),
        (12_150.0, (2.2e-4 + 2.2e-5) / 2, 15360, 0.1, 0.001),
        (14_299.0, 2.2e-5, 15360, 0.1, 0.001),
        (14_301.0, 2.2e-5, 15360, 0.1, 0.0),
        (14_632.0, 2.2e-5, 15360, 0.1, 0.0),
        (14_634.0, 7.3e-6, 15360, 0.1, 0.0),
        (14_800.0, 7.3e-6, 15360, 0.1, 0.0),
    ],
)
def test_the_numbers_of_deepseek_v3(
    read: float, rate: float, batch: float, weight: float, speed: float
) -> None:
    progress = billions(read, 14_800)
    assert DeepseekV3LearningRate(2.2e-4, warmup="2000 steps").at(progress) == pytest.approx(
        rate, rel=1e-5
    )
    assert DeepseekV3Batch().at(progress) == pytest.approx(batch)
    assert DeepseekV3PredictionWeight().at(progress) == weight
    assert DeepseekV3BiasSpeed().at(progress) == speed


@pytest.mark.parametrize(
    ("read", "rate", "batch"),
    [
        (0.0, 2.4e-4, 2304),
        (112.5, 2.4e-4, 5760),
        (225.0, 2.4e-4, 9216),
        (4_859.0, 2.4e-4, 9216),
        (4_861.0, 7.584e-5, 9216),
        (7_291.0, 2.3965e-5, 9216),
        (8_100.0, 2.3965e-5, 9216),
    ],
)
def test_the_numbers_of_deepseek_v2(read: float, rate: float, batch: float) -> None:
    progress = billions(read, 8_100)
    schedule = DeepseekV2LearningRate(2.4e-4, warmup="2000 steps")
    assert schedule.at(progress) == pytest.approx(rate, rel=1e-4)
    assert DeepseekV2Batch().at(progress) == pytest.approx(batch)


def test_the_papers_rise_in_2000_steps() -> None:
    for schedule in (DeepseekV3LearningRate, DeepseekV2LearningRate):
        rate = schedule(2e-4, warmup="2000 steps").at(Progress(500, 1, 0.0001))
        assert rate == pytest.approx(5e-5)


def test_zamba2_anneals_at_the_end() -> None:
    schedule = Zamba2LearningRate(1.0, annealing=0.1, between=0.5, again=0.75, end=0.01)
    assert schedule.at(Progress(0, 0, 0.9)) == pytest.approx(0.5)
    assert schedule.at(Progress(0, 0, 0.905)) == pytest.approx(0.75)
    # As much less in the first half as in the second.
    half = schedule.at(Progress(0, 0, 0.9525))
    assert half == pytest.approx(math.sqrt(0.75 * 0.01))


def test_a_number_is_a_schedule_that_stays() -> None:
    assert schedule_of(0.3).at(at(5)) == 0.3
    cosine = Cosine()
    assert schedule_of(cosine) is cosine


class TestWritten:
    """Schedules as a settings file has them."""

    @staticmethod
    def read(table: Any) -> Any:
        from dataclasses import dataclass

        @dataclass(frozen=True)
        class Table:
            rate: Number

        return build(Table, {"rate": table}).rate

    @pytest.mark.parametrize(
        "schedule", [*CONTINUOUS.values(), Steps(borders=("10 steps", 0.5)), DeepseekV3Batch()]
    )
    def test_it_is_read_as_it_was_written(self, schedule: Any) -> None:
        assert self.read(plain(schedule)) == schedule

    @pytest.mark.parametrize(
        ("table", "told"),
        [
            ({"kind": "wds"}, r'\[rate\] kind = "wds": has to be one of .*"wsd"'),
            ({"kind": "wsd", "decays": 1}, r"\[rate\] decays: there is no such key; .* decay\b"),
            ({"kind": "wsd", "decay": 1.5}, r"\[rate\] decay = 1.5: has to be a share"),
            ({"kind": "wsd", "warmup": 0.9}, r"until = 0.8: has to be behind .* 0.9"),
            ({"kind": "linear", "warmup": 200}, r'warmup = 200.*write "200 steps"'),
            ({"kind": "linear", "warmup": "200 %"}, "at most 1"),
            ({"kind": "linear", "warmup": "2 weeks"}, r'warmup = "2 weeks": has to be a length'),
            ({"kind": "inverse-sqrt", "warmup": 0}, "above 0"),
            ({"kind": "cosine", "peak": math.inf}, "peak = inf: has to be a finite number"),
            ({"kind": "cosine", "peak": 10**400}, "peak = 1000.*: has to be a number"),
            ({"kind": "steps", "factor": 1e308}, r"factor = 1e\+308: has to be a share"),
            ({"kind": "steps", "borders": [0.6, 0.4]}, "has to be behind the segment before it"),
            ({"kind": "segments", "segments": []}, "one at least"),
            (
                {"kind": "segments", "segments": [{"until": 1.0, "to": 1, "shape": "exponential"}]},
                "two values above 0",
            ),
        ],
    )
    def test_what_is_wrong_is_named(self, table: Any, told: str) -> None:
        with pytest.raises(SettingError, match=told):
            self.read(table)

"""Numbers that change along a training, as its papers have them."""

from quintet.training.schedule import Constant, Schedule
from quintet.training.schedules.papers import (
    DeepseekV2Batch,
    DeepseekV2LearningRate,
    DeepseekV3Batch,
    DeepseekV3BiasSpeed,
    DeepseekV3LearningRate,
    DeepseekV3PredictionWeight,
    Zamba2LearningRate,
)
from quintet.training.schedules.segments import Segment, Segments, Shape
from quintet.training.schedules.shapes import (
    Cosine,
    InverseSqrt,
    Linear,
    Steps,
    WarmupStableDecay,
)

__all__ = [
    "Cosine",
    "DeepseekV2Batch",
    "DeepseekV2LearningRate",
    "DeepseekV3Batch",
    "DeepseekV3BiasSpeed",
    "DeepseekV3LearningRate",
    "DeepseekV3PredictionWeight",
    "InverseSqrt",
    "Linear",
    "Number",
    "Segment",
    "Segments",
    "Shape",
    "Steps",
    "WarmupStableDecay",
    "Zamba2LearningRate",
    "schedule_of",
]

# A setting that is a number, or changes along the way: in a file a number or a table with its kind.
Number = (
    float
    | Segments
    | WarmupStableDecay
    | Cosine
    | Linear
    | Steps
    | InverseSqrt
    | DeepseekV2LearningRate
    | DeepseekV2Batch
    | DeepseekV3LearningRate
    | DeepseekV3Batch
    | DeepseekV3PredictionWeight
    | DeepseekV3BiasSpeed
    | Zamba2LearningRate
)


def schedule_of(value: float | Schedule) -> Schedule:
    """Return a number as the schedule that stays there, and a schedule as it is."""
    return Constant(float(value)) if isinstance(value, int | float) else value

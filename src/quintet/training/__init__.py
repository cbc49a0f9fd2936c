"""Training: objectives, data, optimisers, and the loop that joins them."""

from quintet.training.config import TrainingConfig
from quintet.training.loop import train
from quintet.training.result import TrainingResult

__all__ = ["TrainingConfig", "TrainingResult", "train"]

"""Training objectives, each a sum and a count."""

from quintet.modeling.scoring import token_logprobs
from quintet.training.objectives.distillation import Distillation
from quintet.training.objectives.next_token import LanguageModelling
from quintet.training.objectives.preference import Preference

__all__ = ["Distillation", "LanguageModelling", "Preference", "token_logprobs"]

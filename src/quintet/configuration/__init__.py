"""Model configurations: the keys of `config.json`, validated, without torch."""

from quintet.configuration.base import PreTrainedConfig
from quintet.configuration.rope import RopeParameters

__all__ = ["PreTrainedConfig", "PretrainedConfig", "RopeParameters"]

# The name before version 5 of Transformers.
PretrainedConfig = PreTrainedConfig

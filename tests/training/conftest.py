"""Models that are trained in tests."""

import pytest
import torch

from quintet import DeepseekV3ForCausalLM
from tiny import predicting_config


@pytest.fixture
def predicting() -> DeepseekV3ForCausalLM:
    """A DeepSeek-V3 with a prediction layer, some of whose guesses are right."""
    torch.manual_seed(3)
    config = predicting_config(vocab_size=12, context=64)
    return DeepseekV3ForCausalLM(config)

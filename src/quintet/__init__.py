"""Five open model families in plain PyTorch, with the API people know from Transformers.

Every public name is here and is imported when it is first used, so that `import quintet` takes
milliseconds and `quintet --help` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quintet.auto import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )
    from quintet.cache import Cache, DynamicCache, StaticCache
    from quintet.configuration import PreTrainedConfig
    from quintet.errors import QuintetError
    from quintet.generation.config import GenerationConfig
    from quintet.generation.streamers import TextStreamer
    from quintet.hub import demo_model
    from quintet.modeling.base import PreTrainedModel
    from quintet.models.qwen2 import (
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen2ForQuestionAnswering,
        Qwen2ForSequenceClassification,
        Qwen2ForTokenClassification,
        Qwen2Model,
        Qwen2PreTrainedModel,
    )
    from quintet.pipelines import pipeline
    from quintet.tokenization import (
        BatchEncoding,
        PreTrainedTokenizer,
        PreTrainedTokenizerFast,
        Qwen2Tokenizer,
        Qwen2TokenizerFast,
    )

__version__ = "0.1.0"

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoTokenizer",
    "BatchEncoding",
    "Cache",
    "DynamicCache",
    "GenerationConfig",
    "PreTrainedConfig",
    "PreTrainedModel",
    "PreTrainedTokenizer",
    "PreTrainedTokenizerFast",
    "QuintetError",
    "Qwen2Config",
    "Qwen2ForCausalLM",
    "Qwen2ForQuestionAnswering",
    "Qwen2ForSequenceClassification",
    "Qwen2ForTokenClassification",
    "Qwen2Model",
    "Qwen2PreTrainedModel",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "StaticCache",
    "TextStreamer",
    "__version__",
    "demo_model",
    "pipeline",
]

_NAMES = {
    "quintet.auto": [name for name in __all__ if name.startswith("Auto")],
    "quintet.cache": ["Cache", "DynamicCache", "StaticCache"],
    "quintet.configuration": ["PreTrainedConfig"],
    "quintet.errors": ["QuintetError"],
    "quintet.generation.config": ["GenerationConfig"],
    "quintet.generation.streamers": ["TextStreamer"],
    "quintet.hub": ["demo_model"],
    "quintet.modeling.base": ["PreTrainedModel"],
    "quintet.models.qwen2": [
        name for name in __all__ if name.startswith("Qwen2") and "Tokenizer" not in name
    ],
    "quintet.pipelines": ["pipeline"],
    "quintet.tokenization": [
        "BatchEncoding",
        "PreTrainedTokenizer",
        "PreTrainedTokenizerFast",
        "Qwen2Tokenizer",
        "Qwen2TokenizerFast",
    ],
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'quintet' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

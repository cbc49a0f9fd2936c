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
    from quintet.cache import Cache, DynamicCache, OffloadedCache, QuantizedCache, StaticCache
    from quintet.configuration import PreTrainedConfig, PretrainedConfig
    from quintet.errors import QuintetError
    from quintet.generation.compiling import CompileConfig
    from quintet.generation.config import (
        GenerationConfig,
    )
    from quintet.generation.mixin import (
        GenerationMixin,
    )
    from quintet.generation.outputs import (
        GenerateBeamDecoderOnlyOutput,
        GenerateDecoderOnlyOutput,
    )
    from quintet.generation.processors import (
        EncoderNoRepeatNGramLogitsProcessor,
        EncoderRepetitionPenaltyLogitsProcessor,
        EpsilonLogitsWarper,
        EtaLogitsWarper,
        ExponentialDecayLengthPenalty,
        ForcedBOSTokenLogitsProcessor,
        ForcedEOSTokenLogitsProcessor,
        FrequencyPenaltyLogitsProcessor,
        InfNanRemoveLogitsProcessor,
        LogitNormalization,
        LogitsProcessor,
        LogitsProcessorList,
        LogitsWarper,
        MinLengthLogitsProcessor,
        MinNewTokensLengthLogitsProcessor,
        MinPLogitsWarper,
        NoBadWordsLogitsProcessor,
        NoRepeatNGramLogitsProcessor,
        PrefixConstrainedLogitsProcessor,
        PresencePenaltyLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor,
        SuppressTokensAtBeginLogitsProcessor,
        SuppressTokensLogitsProcessor,
        TemperatureLogitsWarper,
        TopHLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
        UnbatchedClassifierFreeGuidanceLogitsProcessor,
        WatermarkLogitsProcessor,
    )
    from quintet.generation.stopping import (
        EosTokenCriteria,
        MaxLengthCriteria,
        MaxTimeCriteria,
        StoppingCriteria,
        StoppingCriteriaList,
        StopStringCriteria,
    )
    from quintet.generation.streamers import (
        AsyncTextIteratorStreamer,
        BaseStreamer,
        TextIteratorStreamer,
        TextStreamer,
    )
    from quintet.generation.watermarking import (
        WatermarkingConfig,
    )
    from quintet.hub import demo_model
    from quintet.modeling.base import PreTrainedModel
    from quintet.models.deepseek_v2 import (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        DeepseekV2ForQuestionAnswering,
        DeepseekV2ForSequenceClassification,
        DeepseekV2ForTokenClassification,
        DeepseekV2Model,
        DeepseekV2PreTrainedModel,
    )
    from quintet.models.deepseek_v3 import (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        DeepseekV3ForQuestionAnswering,
        DeepseekV3ForSequenceClassification,
        DeepseekV3ForTokenClassification,
        DeepseekV3Model,
        DeepseekV3PreTrainedModel,
    )
    from quintet.models.qwen2 import (
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen2ForQuestionAnswering,
        Qwen2ForSequenceClassification,
        Qwen2ForTokenClassification,
        Qwen2Model,
        Qwen2PreTrainedModel,
    )
    from quintet.models.qwen2_moe import (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        Qwen2MoeForQuestionAnswering,
        Qwen2MoeForSequenceClassification,
        Qwen2MoeForTokenClassification,
        Qwen2MoeModel,
        Qwen2MoePreTrainedModel,
    )
    from quintet.models.zamba2 import (
        Zamba2Config,
        Zamba2ForCausalLM,
        Zamba2ForQuestionAnswering,
        Zamba2ForSequenceClassification,
        Zamba2ForTokenClassification,
        Zamba2HybridDynamicCache,
        Zamba2Model,
        Zamba2PreTrainedModel,
    )
    from quintet.pipelines import (
        FeatureExtractionPipeline,
        Pipeline,
        QuestionAnsweringPipeline,
        TextClassificationPipeline,
        TextGenerationPipeline,
        TokenClassificationPipeline,
        ZeroShotClassificationPipeline,
        pipeline,
    )
    from quintet.quantization import (
        BitsAndBytesConfig,
        FineGrainedFP8Config,
        Int4Config,
        Int8Config,
        TorchAoConfig,
    )
    from quintet.tokenization import (
        AddedToken,
        BatchEncoding,
        PreTrainedTokenizer,
        PreTrainedTokenizerFast,
        Qwen2Tokenizer,
        Qwen2TokenizerFast,
    )

__version__ = "0.1.0"

__all__ = [
    "AddedToken",
    "AsyncTextIteratorStreamer",
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoTokenizer",
    "BaseStreamer",
    "BatchEncoding",
    "BitsAndBytesConfig",
    "Cache",
    "CompileConfig",
    "DeepseekV2Config",
    "DeepseekV2ForCausalLM",
    "DeepseekV2ForQuestionAnswering",
    "DeepseekV2ForSequenceClassification",
    "DeepseekV2ForTokenClassification",
    "DeepseekV2Model",
    "DeepseekV2PreTrainedModel",
    "DeepseekV3Config",
    "DeepseekV3ForCausalLM",
    "DeepseekV3ForQuestionAnswering",
    "DeepseekV3ForSequenceClassification",
    "DeepseekV3ForTokenClassification",
    "DeepseekV3Model",
    "DeepseekV3PreTrainedModel",
    "DynamicCache",
    "EncoderNoRepeatNGramLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "EosTokenCriteria",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "ExponentialDecayLengthPenalty",
    "FeatureExtractionPipeline",
    "FineGrainedFP8Config",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "FrequencyPenaltyLogitsProcessor",
    "GenerateBeamDecoderOnlyOutput",
    "GenerateDecoderOnlyOutput",
    "GenerationConfig",
    "GenerationMixin",
    "InfNanRemoveLogitsProcessor",
    "Int4Config",
    "Int8Config",
    "LogitNormalization",
    "LogitsProcessor",
    "LogitsProcessorList",
    "LogitsWarper",
    "MaxLengthCriteria",
    "MaxTimeCriteria",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "MinPLogitsWarper",
    "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "OffloadedCache",
    "Pipeline",
    "PreTrainedConfig",
    "PreTrainedModel",
    "PreTrainedTokenizer",
    "PreTrainedTokenizerFast",
    "PrefixConstrainedLogitsProcessor",
    "PresencePenaltyLogitsProcessor",
    "PretrainedConfig",
    "QuantizedCache",
    "QuestionAnsweringPipeline",
    "QuintetError",
    "Qwen2Config",
    "Qwen2ForCausalLM",
    "Qwen2ForQuestionAnswering",
    "Qwen2ForSequenceClassification",
    "Qwen2ForTokenClassification",
    "Qwen2Model",
    "Qwen2MoeConfig",
    "Qwen2MoeForCausalLM",
    "Qwen2MoeForQuestionAnswering",
    "Qwen2MoeForSequenceClassification",
    "Qwen2MoeForTokenClassification",
    "Qwen2MoeModel",
    "Qwen2MoePreTrainedModel",
    "Qwen2PreTrainedModel",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "RepetitionPenaltyLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "StaticCache",
    "StopStringCriteria",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TextClassificationPipeline",
    "TextGenerationPipeline",
    "TextIteratorStreamer",
    "TextStreamer",
    "TokenClassificationPipeline",
    "TopHLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TorchAoConfig",
    "TypicalLogitsWarper",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "WatermarkLogitsProcessor",
    "WatermarkingConfig",
    "Zamba2Config",
    "Zamba2ForCausalLM",
    "Zamba2ForQuestionAnswering",
    "Zamba2ForSequenceClassification",
    "Zamba2ForTokenClassification",
    "Zamba2HybridDynamicCache",
    "Zamba2Model",
    "Zamba2PreTrainedModel",
    "ZeroShotClassificationPipeline",
    "__version__",
    "demo_model",
    "pipeline",
]

_FAMILIES = {
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2Moe",
    "zamba2": "Zamba2",
}
_SUFFIXES = (
    "Config",
    "ForCausalLM",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
    "Model",
    "PreTrainedModel",
)
_NAMES = {
    "quintet.auto": [name for name in __all__ if name.startswith("Auto")],
    "quintet.cache": ["Cache", "DynamicCache", "OffloadedCache", "QuantizedCache", "StaticCache"],
    "quintet.configuration": ["PreTrainedConfig", "PretrainedConfig"],
    "quintet.errors": ["QuintetError"],
    "quintet.generation.compiling": ["CompileConfig"],
    "quintet.generation.config": [
        "GenerationConfig",
    ],
    "quintet.generation.mixin": [
        "GenerationMixin",
    ],
    "quintet.generation.outputs": [
        "GenerateBeamDecoderOnlyOutput",
        "GenerateDecoderOnlyOutput",
    ],
    "quintet.generation.processors": [
        "EncoderNoRepeatNGramLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "FrequencyPenaltyLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "LogitsProcessor",
        "LogitsProcessorList",
        "LogitsWarper",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "PrefixConstrainedLogitsProcessor",
        "PresencePenaltyLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
        "UnbatchedClassifierFreeGuidanceLogitsProcessor",
        "WatermarkLogitsProcessor",
    ],
    "quintet.generation.stopping": [
        "EosTokenCriteria",
        "MaxLengthCriteria",
        "MaxTimeCriteria",
        "StopStringCriteria",
        "StoppingCriteria",
        "StoppingCriteriaList",
    ],
    "quintet.generation.streamers": [
        "AsyncTextIteratorStreamer",
        "BaseStreamer",
        "TextIteratorStreamer",
        "TextStreamer",
    ],
    "quintet.generation.watermarking": [
        "WatermarkingConfig",
    ],
    "quintet.hub": ["demo_model"],
    "quintet.modeling.base": ["PreTrainedModel"],
    **{
        f"quintet.models.{module}": [prefix + suffix for suffix in _SUFFIXES]
        for module, prefix in _FAMILIES.items()
    },
    "quintet.pipelines": [
        *(name for name in __all__ if name.endswith("Pipeline")),
        "pipeline",
    ],
    "quintet.quantization": [
        "BitsAndBytesConfig",
        "FineGrainedFP8Config",
        "Int4Config",
        "Int8Config",
        "TorchAoConfig",
    ],
    "quintet.tokenization": [
        "AddedToken",
        "BatchEncoding",
        "PreTrainedTokenizer",
        "PreTrainedTokenizerFast",
        "Qwen2Tokenizer",
        "Qwen2TokenizerFast",
    ],
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_MODULE_OF["Zamba2HybridDynamicCache"] = "quintet.models.zamba2"


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'quintet' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

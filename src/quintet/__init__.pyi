"""The public names: each is imported when it is first used, from the module it stands with here."""

from quintet.auto import (
    AutoConfig as AutoConfig,
    AutoModel as AutoModel,
    AutoModelForCausalLM as AutoModelForCausalLM,
    AutoModelForQuestionAnswering as AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification as AutoModelForSequenceClassification,
    AutoModelForTokenClassification as AutoModelForTokenClassification,
    AutoTokenizer as AutoTokenizer,
)
from quintet.cache import (
    Cache as Cache,
    DynamicCache as DynamicCache,
    OffloadedCache as OffloadedCache,
    PooledCache as PooledCache,
    QuantizedCache as QuantizedCache,
    StaticCache as StaticCache,
)
from quintet.configuration import (
    PreTrainedConfig as PreTrainedConfig,
    PretrainedConfig as PretrainedConfig,
)
from quintet.adapters.config import LoraConfig as LoraConfig
from quintet.errors import QuintetError as QuintetError
from quintet.generation.compiling import CompileConfig as CompileConfig
from quintet.generation.config import GenerationConfig as GenerationConfig
from quintet.generation.mixin import GenerationMixin as GenerationMixin
from quintet.generation.outputs import (
    GenerateBeamDecoderOnlyOutput as GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput as GenerateDecoderOnlyOutput,
)
from quintet.generation.processors import (
    EncoderNoRepeatNGramLogitsProcessor as EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor as EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper as EpsilonLogitsWarper,
    EtaLogitsWarper as EtaLogitsWarper,
    ExponentialDecayLengthPenalty as ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor as ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor as ForcedEOSTokenLogitsProcessor,
    FrequencyPenaltyLogitsProcessor as FrequencyPenaltyLogitsProcessor,
    InfNanRemoveLogitsProcessor as InfNanRemoveLogitsProcessor,
    LogitNormalization as LogitNormalization,
    LogitsProcessor as LogitsProcessor,
    LogitsProcessorList as LogitsProcessorList,
    LogitsWarper as LogitsWarper,
    MinLengthLogitsProcessor as MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor as MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper as MinPLogitsWarper,
    NoBadWordsLogitsProcessor as NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor as NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor as PrefixConstrainedLogitsProcessor,
    PresencePenaltyLogitsProcessor as PresencePenaltyLogitsProcessor,
    RepetitionPenaltyLogitsProcessor as RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor as SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor as SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor as SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper as TemperatureLogitsWarper,
    TopHLogitsWarper as TopHLogitsWarper,
    TopKLogitsWarper as TopKLogitsWarper,
    TopPLogitsWarper as TopPLogitsWarper,
    TypicalLogitsWarper as TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor as UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkLogitsProcessor as WatermarkLogitsProcessor,
)
from quintet.generation.stopping import (
    EosTokenCriteria as EosTokenCriteria,
    MaxLengthCriteria as MaxLengthCriteria,
    MaxTimeCriteria as MaxTimeCriteria,
    StoppingCriteria as StoppingCriteria,
    StoppingCriteriaList as StoppingCriteriaList,
    StopStringCriteria as StopStringCriteria,
)
from quintet.generation.streamers import (
    AsyncTextIteratorStreamer as AsyncTextIteratorStreamer,
    BaseStreamer as BaseStreamer,
    TextIteratorStreamer as TextIteratorStreamer,
    TextStreamer as TextStreamer,
)
from quintet.generation.watermarking import WatermarkingConfig as WatermarkingConfig
from quintet.hub import demo_model as demo_model
from quintet.modeling.base import PreTrainedModel as PreTrainedModel
from quintet.models.deepseek_v2 import (
    DeepseekV2Config as DeepseekV2Config,
    DeepseekV2ForCausalLM as DeepseekV2ForCausalLM,
    DeepseekV2ForQuestionAnswering as DeepseekV2ForQuestionAnswering,
    DeepseekV2ForSequenceClassification as DeepseekV2ForSequenceClassification,
    DeepseekV2ForTokenClassification as DeepseekV2ForTokenClassification,
    DeepseekV2Model as DeepseekV2Model,
    DeepseekV2PreTrainedModel as DeepseekV2PreTrainedModel,
)
from quintet.models.deepseek_v3 import (
    DeepseekV3Config as DeepseekV3Config,
    DeepseekV3ForCausalLM as DeepseekV3ForCausalLM,
    DeepseekV3ForQuestionAnswering as DeepseekV3ForQuestionAnswering,
    DeepseekV3ForSequenceClassification as DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification as DeepseekV3ForTokenClassification,
    DeepseekV3Model as DeepseekV3Model,
    DeepseekV3PreTrainedModel as DeepseekV3PreTrainedModel,
)
from quintet.models.qwen2 import (
    Qwen2Config as Qwen2Config,
    Qwen2ForCausalLM as Qwen2ForCausalLM,
    Qwen2ForQuestionAnswering as Qwen2ForQuestionAnswering,
    Qwen2ForSequenceClassification as Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification as Qwen2ForTokenClassification,
    Qwen2Model as Qwen2Model,
    Qwen2PreTrainedModel as Qwen2PreTrainedModel,
)
from quintet.models.qwen2_moe import (
    Qwen2MoeConfig as Qwen2MoeConfig,
    Qwen2MoeForCausalLM as Qwen2MoeForCausalLM,
    Qwen2MoeForQuestionAnswering as Qwen2MoeForQuestionAnswering,
    Qwen2MoeForSequenceClassification as Qwen2MoeForSequenceClassification,
    Qwen2MoeForTokenClassification as Qwen2MoeForTokenClassification,
    Qwen2MoeModel as Qwen2MoeModel,
    Qwen2MoePreTrainedModel as Qwen2MoePreTrainedModel,
)
from quintet.models.zamba2 import (
    Zamba2Config as Zamba2Config,
    Zamba2ForCausalLM as Zamba2ForCausalLM,
    Zamba2ForQuestionAnswering as Zamba2ForQuestionAnswering,
    Zamba2ForSequenceClassification as Zamba2ForSequenceClassification,
    Zamba2ForTokenClassification as Zamba2ForTokenClassification,
    Zamba2HybridDynamicCache as Zamba2HybridDynamicCache,
    Zamba2Model as Zamba2Model,
    Zamba2PreTrainedModel as Zamba2PreTrainedModel,
)
from quintet.parallel.division import DistributedConfig as DistributedConfig
from quintet.pipelines import (
    FeatureExtractionPipeline as FeatureExtractionPipeline,
    Pipeline as Pipeline,
    QuestionAnsweringPipeline as QuestionAnsweringPipeline,
    TextClassificationPipeline as TextClassificationPipeline,
    TextGenerationPipeline as TextGenerationPipeline,
    TokenClassificationPipeline as TokenClassificationPipeline,
    ZeroShotClassificationPipeline as ZeroShotClassificationPipeline,
    pipeline as pipeline,
)
from quintet.quantization import (
    BitsAndBytesConfig as BitsAndBytesConfig,
    FineGrainedFP8Config as FineGrainedFP8Config,
    Int4Config as Int4Config,
    Int8Config as Int8Config,
    TorchAoConfig as TorchAoConfig,
)
from quintet.tokenization import (
    AddedToken as AddedToken,
    BatchEncoding as BatchEncoding,
    PreTrainedTokenizer as PreTrainedTokenizer,
    PreTrainedTokenizerFast as PreTrainedTokenizerFast,
    Qwen2Tokenizer as Qwen2Tokenizer,
    Qwen2TokenizerFast as Qwen2TokenizerFast,
)

__version__: str
__all__: list[str]

"""Checks of combined settings before the first step."""

from quintet.errors import ContextLengthError, InputError
from quintet.modeling.heads import CausalLMHead
from quintet.parallel.context_parallel import check_recurrent, texts_in
from quintet.parallel.world import Degrees
from quintet.tokenization import PreTrainedTokenizer
from quintet.training.building import prediction_layers
from quintet.training.config import LanguageSettings, PreferenceSettings, TrainingConfig
from quintet.training.data import Data
from quintet.training.progress import Progress


def check(
    config: TrainingConfig,
    model: CausalLMHead,
    tokenizer: PreTrainedTokenizer,
    data: Data,
    degrees: Degrees,
) -> None:
    """Refuse what would fail, or learn nothing, later.

    Args:
        config: the settings.
        model: whole.
        tokenizer: its tokenizer.
        data: what is learned from.
        degrees: among how many processes what is divided.

    Raises:
        InputError: the tokenizer has ids that the model has not, there is nothing to learn from or
            nothing that learns, or a loss is asked for that the model has not.
        ContextLengthError: rows are longer than the model's context.
    """
    vocabulary, largest = model.config.vocab_size, max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocabulary:
        raise InputError(
            f"the tokenizer has ids up to {largest}, and the model has {vocabulary}; take the "
            "model's own tokenizer, or model.resize_token_embeddings(len(tokenizer)) first"
        )
    most = model.config.max_position_embeddings
    if data.context > most:
        raise ContextLengthError(
            f"rows of {data.context} tokens are longer than the model's context of {most}; lower "
            "[data] context, or raise max_position_embeddings in [model] config"
        )
    if data.documents == 0:
        raise InputError("there is nothing to learn from: [data] sources have no document")
    if data.paired != isinstance(config.objective, PreferenceSettings):
        kinds = ("pairs of answers", "texts") if data.paired else ("texts", "pairs of answers")
        raise InputError(
            f'[data] holds {kinds[0]}, and [objective] kind = "{config.objective.kind}" learns '
            f"from {kinds[1]}; change one of the two"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            "nothing of the model is trained: all its parameters are frozen; weights of fewer bits "
            "always are, and an [adapter] on them is not"
        )
    _check_prediction(config, model)
    if config.train.compile:
        _check_compiled(data)
    if degrees.cp > 1:
        _check_shared_rows(config, model, data)
    if not any((batch.labels != -100).any() for batch in data.parts(Progress(0, 0, 0.0))):
        raise InputError(
            "the first step has no label that counts: all of it is masked; see [data] train_on, "
            "and whether the template marks what the assistant says"
        )


def _check_prediction(config: TrainingConfig, model: CausalLMHead) -> None:
    """Refuse a loss of prediction layers that are not there."""
    objective = config.objective
    if not isinstance(objective, LanguageSettings) or objective.prediction is None:
        return
    if not prediction_layers(model):
        raise InputError(
            f"[objective] prediction is the weight of prediction layers, and this "
            f"{type(model).__name__} has none; take it out, or give a new DeepSeek-V3 "
            "num_nextn_predict_layers"
        )


def _check_shared_rows(config: TrainingConfig, model: CausalLMHead, data: Data) -> None:
    """Refuse what processes that share rows cannot do."""
    if config.balance.capacity is not None:
        raise InputError(
            "[balance] capacity drops tokens of whole rows, and with [parallel] cp no process has "
            "any; take one of the two out"
        )
    if model.config.recurrent_layers():
        for batch in data.parts(Progress(0, 0, 0.0)):
            check_recurrent(texts_in(batch.input_ids, batch.seq_idx, batch.attention_mask)[0])


def _check_compiled(data: Data) -> None:
    """Refuse to compile layers for rows that are laid out differently in each step."""
    for batch in data.parts(Progress(0, 0, 0.0)):
        several = batch.seq_idx is not None and bool(batch.seq_idx.diff(dim=1).any())
        mask = batch.attention_mask
        if several or (mask is not None and not bool(mask.all())):
            raise InputError(
                "[train] compile is for full rows of one text each, and these hold "
                f"{'several texts' if several else 'padding'}, which lie elsewhere in each step, "
                "where layers would be compiled anew; take compile out, or [data] packing = "
                '"stream" with borders = false'
            )

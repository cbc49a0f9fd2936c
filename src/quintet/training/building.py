"""Builds the objects that settings name: model, tokenizer, adapter, and objective."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quintet.auto import AutoConfig, AutoModelForCausalLM, AutoTokenizer, family
from quintet.errors import CheckpointError, InputError, shown
from quintet.files import read_text
from quintet.folder import AdapterFolderError
from quintet.layers.router import ExpertRouter
from quintet.modeling.decoder import DecoderModel
from quintet.modeling.fresh import new_model
from quintet.modeling.heads import CausalLMHead
from quintet.modeling.mtp import MtpDecoderModel
from quintet.modeling.source import ModelSource
from quintet.tokenization import PreTrainedTokenizer
from quintet.training.adapting import REFERENCE, AdapterSettings, put_adapter, put_on_part
from quintet.training.balance import (
    BalanceLoss,
    BiasBalancer,
    DeviceLimitedBalance,
    ExpertLoads,
    SequenceBalance,
    SwitchBalance,
    TokenDropping,
)
from quintet.training.checkpoints import SavedCheckpoint
from quintet.training.config import (
    BalanceSettings,
    LanguageSettings,
    ModelSettings,
    PreferenceSettings,
    TrainingConfig,
    TrainSettings,
)
from quintet.training.joining import ReferenceLoader
from quintet.training.local_part import LocalPart
from quintet.training.objective import Objective
from quintet.training.objectives import Distillation, LanguageModelling, Preference
from quintet.training.objectives.compared import Running, run_local
from quintet.training.schedule import Schedule
from quintet.training.schedules import Number, schedule_of
from quintet.training.settings import SettingError

# What a new model takes from its tokenizer, where its config does not say it.
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def build_tokenizer(config: TrainingConfig) -> PreTrainedTokenizer:
    """Return the tokenizer that the settings name.

    Raises:
        SettingError: they name none.
        QuintetError: it cannot be read.
    """
    name = config.tokenizer.from_ or config.model.from_
    if name is None:
        raise SettingError(
            "tokenizer.from",
            ": is missing; a model that begins anew takes the tokenizer of a checkpoint",
        )
    tokenizer = AutoTokenizer.from_pretrained(name)
    if config.tokenizer.chat_template is not None:
        path = Path(config.tokenizer.chat_template)
        try:
            tokenizer.chat_template = read_text(path)
        except (OSError, CheckpointError) as error:
            raise SettingError.value(
                "tokenizer.chat_template", str(path), f"cannot be read: {error}"
            ) from error
    return tokenizer


def prepared(
    config: TrainingConfig,
    tokenizer: PreTrainedTokenizer,
    model: CausalLMHead | None,
    start: SavedCheckpoint | None,
    share: LocalPart | None = None,
    references: ReferenceLoader | None = None,
) -> tuple[CausalLMHead, Objective]:
    """Return the model at the start or resumption of its training, and its objective.

    Args:
        config: the settings.
        tokenizer: whose ids the model is for.
        model: in place of what the settings name.
        start: the checkpoint that its training goes on from.
        share: what of the model is built where several processes have it; None for all.
        references: where models lie that it is compared with; None for all of them here.

    Raises:
        SettingError: no model is named, or two are.
        QuintetError: it cannot be read, or is none for these settings.
    """
    named = [key for key in ("from_", "config", "quantize") if getattr(config.model, key)]
    if model is None and share is not None:
        # A run with an adapter saves that alone.
        saved = None if start is None or config.adapter is not None else start.path
        model = build_model(config.model, tokenizer, share, saved)

        def first() -> CausalLMHead:
            # Where nothing was read, the numbers that its parts were drawn from.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.train.seed)
                return build_model(
                    config.model, tokenizer, None if references is None else references.local_part
                )

        objective = build_objective(config, model, first, references)
        if config.adapter is not None:
            put_on_part(model, *_to_put(config, config.adapter, start))
        return model, objective
    if model is None:
        model = build_model(config.model, tokenizer)
    elif named:
        raise SettingError(
            f"model.{named[0].removesuffix('_')}",
            ": names a model, and another one was given; leave one of them out",
        )
    # What it is compared with is the model as it was at first.
    objective = build_objective(config, model, references=references)
    if config.adapter is not None:
        put_adapter(model, *_to_put(config, config.adapter, start))
    elif start is not None:
        _restore(model, start.path)
    return model, objective


def _to_put(
    config: TrainingConfig, own: AdapterSettings, start: SavedCheckpoint | None
) -> tuple[AdapterSettings, str | None]:
    """Return the adapter to put on the model, and the one beside it to compare with."""
    reference = own.from_ if _compares_with_adapter(config) else None
    return own if start is None else AdapterSettings(from_=str(start.path)), reference


def _compares_with_adapter(config: TrainingConfig) -> bool:
    """Return whether answers are compared with the model and its first adapter."""
    own, objective = config.adapter, config.objective
    if own is None or own.from_ is None or not isinstance(objective, PreferenceSettings):
        return False
    return objective.reference is None and not objective.reference_free


def build_model(
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizer,
    share: LocalPart | None = None,
    saved: Path | None = None,
) -> CausalLMHead:
    """Return the model that the settings name.

    Args:
        settings: the settings.
        tokenizer: whose ids a new model is for.
        share: what of it is built where several processes have it; None for all.
        saved: what was made of it meanwhile, whose weights it has.

    Raises:
        SettingError: they name none.
        QuintetError: it cannot be read, or its config breaks a rule.
    """
    more: dict[str, Any] = {}
    if settings.attention is not None:
        more["attn_implementation"] = settings.attention
    given: dict[str, Any] = {
        k: None if v == "none" else v for k, v in (settings.config or {}).items()
    }
    if saved is not None and share is not None:
        return _own_part(ModelSource(saved), settings, share, more)
    if settings.from_ is not None and share is not None:
        source = ModelSource(settings.from_, settings.revision)
        return _own_part(source, settings, share, {**more, **given})
    if settings.from_ is not None:
        for name in ("revision", "quantize"):
            if (value := getattr(settings, name)) is not None:
                more[name] = value
        return _loaded(settings.from_, dtype=settings.dtype, **more, **given)
    if not given:
        raise SettingError(
            "model.from", ": is missing; name a checkpoint, or say what a new model is by config"
        )
    model_type = given.pop("model_type")
    given.setdefault("vocab_size", len(tokenizer))
    for name in SPECIAL:
        given.setdefault(name, getattr(tokenizer, name))
    config = AutoConfig.for_model(model_type, **given, **more)
    cls: type[CausalLMHead] = family(model_type).find("ForCausalLM")
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    # One process draws the same numbers as several.
    return new_model(cls, config, dtype) if share is None else share.new(cls, config, dtype)


def _own_part(
    source: ModelSource, settings: ModelSettings, share: LocalPart, overrides: dict[str, Any]
) -> CausalLMHead:
    try:
        return _part(source, settings, share, overrides)
    except AdapterFolderError as found:
        raise InputError(
            f"{found}: several processes train a model, or an [adapter] on it; name the model as "
            "[model] from and this as [adapter] from, or merge it first: merge_and_unload(), then "
            "save_pretrained(…)"
        ) from None


def _part(
    source: ModelSource, settings: ModelSettings, share: LocalPart, overrides: dict[str, Any]
) -> CausalLMHead:
    config = AutoConfig.from_pretrained(source.name_or_path, revision=source.revision)
    cls: type[CausalLMHead] = family(config.model_type).find("ForCausalLM")
    return share.loaded(
        cls, source, dtype=settings.dtype, quantize=settings.quantize, overrides=overrides
    )


def _loaded(name: str, **options: Any) -> CausalLMHead:
    model = AutoModelForCausalLM.from_pretrained(name, **options)
    if not isinstance(model, CausalLMHead):
        raise InputError(f"{shown(name)} is a {type(model).__name__}, which predicts no tokens")
    return model


def _restore(model: CausalLMHead, saved: Path) -> None:
    """Give a model, or the adapters on it, the weights of a checkpoint."""
    if model.adapters is None:
        model.load_state_dict(type(model).from_pretrained(saved, dtype="auto").state_dict())
        return
    for name in model.active_adapters():
        model.delete_adapter(name)
        model.load_adapter(saved, name, is_trainable=True)
        model.set_adapter(name)


@contextmanager
def computed(model: CausalLMHead, settings: TrainSettings) -> Iterator[None]:
    """Have layers compiled, or recomputed, as the settings say; these are not at the end."""
    decoder = model.base_model
    if settings.compile and isinstance(decoder, DecoderModel):
        for layer in decoder.layers:
            layer.compile()
    if not settings.recompute:
        yield
        return
    model.activation_checkpointing_enable(every_n_layers=int(settings.recompute))
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


def build_objective(
    config: TrainingConfig,
    model: CausalLMHead,
    first: Callable[[], CausalLMHead] | None = None,
    references: ReferenceLoader | None = None,
) -> Objective:
    """Build the objective of a training; call it while the model is as at its start.

    Args:
        config: the settings.
        model: what is trained, or a part of it.
        first: makes it as it is at its start, and as it lies beside, where `model` is not that.
        references: where what it is compared with lies; None for all of it here.

    Raises:
        QuintetError: a model that is compared with cannot be read.
        InputError: the objective is not one for this model.
    """
    settings = config.objective
    if isinstance(settings, LanguageSettings):
        return LanguageModelling(
            settings.z_loss,
            settings.label_smoothing,
            _schedule(settings.prediction),
            balance_losses(config.balance),
            depth=max(1, prediction_layers(model)),
        )
    if balance_losses(config.balance):
        raise InputError(
            f'[balance] has losses, and [objective] kind = "{settings.kind}" none for texts; '
            "take them out"
        )
    if isinstance(settings, PreferenceSettings):
        reference: CausalLMHead | None = None
        running: Running = run_local
        adapter = None
        if settings.reference is not None:
            reference, running = _other("objective.reference", settings.reference, references)
        elif _compares_with_adapter(config):
            adapter = REFERENCE
        elif config.adapter is None and model.adapters is None and not settings.reference_free:
            if first is None:
                reference, running = _placed(copy.deepcopy(model), references, part=False)
            else:
                reference, running = _placed(first(), references, part=True)
        return Preference(
            settings.beta,
            loss=settings.loss,
            label_smoothing=settings.label_smoothing,
            reference=reference,
            reference_adapter=adapter,
            reference_free=settings.reference_free,
            running=running,
        )
    teacher, run_by = _other("objective.teacher", settings.teacher, references)
    return Distillation(teacher, settings.temperature, settings.share, running=run_by)


def _other(key: str, name: str, references: ReferenceLoader | None) -> tuple[CausalLMHead, Running]:
    """Return another checkpoint's model to compare with, and the function that runs it."""
    if references is None:
        return _placed(_loaded(name), None, part=False)
    read = partial(
        _part, settings=ModelSettings(dtype="auto"), share=references.local_part, overrides={}
    )
    try:
        try:
            model = read(ModelSource(name))
        except AdapterFolderError as found:
            with found.of_base() as base:
                model = read(ModelSource(base))
            put_on_part(model, AdapterSettings(from_=name))
    except InputError as refused:
        # What fits the model that learns need not fit another.
        raise SettingError.value(key, name, f"cannot be divided as the model is: {refused}") from (
            refused
        )
    return _placed(model, references, part=True)


def _placed(
    model: CausalLMHead, references: ReferenceLoader | None, *, part: bool
) -> tuple[CausalLMHead, Running]:
    frozen = model.eval().requires_grad_(False)
    return frozen, run_local if references is None else references.placed(frozen, part=part)


def prediction_layers(model: CausalLMHead) -> int:
    """Return the number of layers that look further than the next token."""
    decoder = model.base_model
    return len(decoder.prediction_layers()) if isinstance(decoder, MtpDecoderModel) else 0


def balance_losses(settings: BalanceSettings) -> tuple[BalanceLoss, ...]:
    """Return the configured losses of unbalanced experts."""
    losses: list[BalanceLoss] = []
    if settings.sequence is not None:
        losses.append(SequenceBalance(schedule_of(settings.sequence)))
    limited = [
        _schedule(value) for value in (settings.expert, settings.device, settings.communication)
    ]
    if any(limited):
        devices, reached = settings.devices, settings.reached
        losses.append(DeviceLimitedBalance(*limited, devices=devices, reached=reached))
    switch = [_schedule(value) for value in (settings.auxiliary, settings.z)]
    if any(switch):
        losses.append(SwitchBalance(*switch, scope=settings.scope))
    return tuple(losses)


def _schedule(value: Number | None) -> Schedule | None:
    return None if value is None else schedule_of(value)


def token_dropping(model: CausalLMHead, settings: BalanceSettings) -> TokenDropping | None:
    """Return the dropper of tokens beyond a device's share, or None."""
    if settings.capacity is None:
        return None
    return TokenDropping(
        model, devices=settings.devices, capacity=settings.capacity, exempt=settings.exempt
    )


def expert_loads(model: CausalLMHead, settings: BalanceSettings) -> ExpertLoads | None:
    """Return the counter of the experts' tokens, or None without experts."""
    if settings.bias is not None:
        return BiasBalancer(model)
    routers = any(isinstance(module, ExpertRouter) for module in model.modules())
    return ExpertLoads(model, training=True) if routers else None

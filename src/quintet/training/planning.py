"""Describes a training from its settings, without loading weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quintet.auto import AutoConfig, AutoModelForCausalLM
from quintet.checkpoint.remote import read_headers
from quintet.errors import InputError, shown
from quintet.modeling.heads import CausalLMHead
from quintet.quantization.request import SHORT
from quintet.training.adapting import put_adapter
from quintet.training.building import build_model, build_tokenizer
from quintet.training.checks import check
from quintet.training.config import ModelSettings, TrainingConfig
from quintet.training.data import build_data
from quintet.training.optimizers import build_optimizers
from quintet.training.progress import Progress
from quintet.training.records import Beginning
from quintet.training.settings import plain
from quintet.training.staged import check_staged


def planned(
    config: TrainingConfig, tell: Callable[[str], None] = lambda message: None
) -> Beginning:
    """Prepare a training without weights: a model on the meta device, all texts encoded.

    Raises:
        QuintetError: what would keep it from beginning.
    """
    check_staged(config, config.parallel.given())
    tokenizer = build_tokenizer(config)
    with torch.device("meta"):
        if config.model.from_ is None:
            model = build_model(config.model, tokenizer)
        else:
            model = _described(config.model, config.model.from_)
    if config.adapter is not None:
        # Adapters want weights that are somewhere; memory that nobody writes to is not there.
        put_adapter(model.to_empty(device="cpu"), config.adapter)
    data = build_data(config.data, tokenizer, vocab_size=model.config.vocab_size, tell=tell)
    check(config, model, tokenizer, data, config.parallel.given())
    parts = list(data.parts(Progress(0, 0, 0.0), config.train.parts))
    with build_optimizers(model, config.optimizer) as optimizers:
        nbytes = sum(tensor.nbytes for tensor in optimizers.tensors().values())
        return Beginning(
            folder=Path(config.train.folder),
            model=model,
            steps=config.train.steps,
            tokens=config.train.tokens,
            minutes=config.train.minutes,
            step_tokens=sum(batch.tokens for batch in parts),
            parts=len(parts),
            context=parts[0].input_ids.shape[1],
            documents=data.documents,
            data_tokens=data.tokens,
            optimizer_bytes=nbytes,
            settings=plain(config),
        )


def _described(settings: ModelSettings, name: str) -> CausalLMHead:
    """Return the model of a checkpoint without its weights, of which the heads are read."""
    where: dict[str, Any] = {"revision": settings.revision}
    given: dict[str, Any] = {
        k: None if v == "none" else v for k, v in (settings.config or {}).items()
    }
    config = AutoConfig.from_pretrained(name, **where, **given)
    if settings.attention is not None:
        config.attn_implementation = settings.attention
    read_headers(name, **where)
    model = AutoModelForCausalLM.from_config(config)
    if not isinstance(model, CausalLMHead):
        raise InputError(f"{shown(name)} is a {type(model).__name__}, which predicts no tokens")
    named = settings.dtype != "auto"
    dtype = getattr(torch, settings.dtype) if named else config.torch_dtype or torch.float32
    model = model.to(dtype)
    wish = None if settings.quantize is None else SHORT[settings.quantize]
    scheme = None if wish is None else wish.scheme()
    if scheme is not None:
        model.quantize_modules(scheme, dtype)
        model.tie_weights()
    return model

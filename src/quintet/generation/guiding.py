"""Sets up classifier-free guidance."""

import warnings
from typing import Any, cast

from torch import Tensor

from quintet.errors import InputError
from quintet.generation.config import GenerationConfig
from quintet.generation.processors.base import LogitsProcessor
from quintet.generation.processors.guidance import UnbatchedClassifierFreeGuidanceLogitsProcessor
from quintet.ops.token_ids import check_token_ids


def guidance(
    model: object, config: GenerationConfig, ids: Tensor | None, mask: Tensor | None
) -> list[LogitsProcessor]:
    """Return the guidance processors of the options.

    Args:
        model: what is run.
        config: how strongly (`guidance_scale`).
        ids: (B, T) what it leads away from; the last token of the prompt if not given.
        mask: (B, T), 0 for padding.

    Raises:
        InputError: ids or mask are none.
    """
    scale, of_model = config.guidance_scale, cast("Any", model)
    if ids is not None:
        check_token_ids(ids, of_model.config.vocab_size, "negative_prompt_ids")
    if mask is not None and not isinstance(mask, Tensor):
        raise InputError(f"negative_prompt_attention_mask is a {type(mask).__name__}, not a tensor")
    if scale is None or scale == 1:
        warnings.warn("negative_prompt_ids has no effect without guidance_scale", stacklevel=5)
        return []
    return [
        UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, of_model, ids, mask, config.use_cache)
    ]

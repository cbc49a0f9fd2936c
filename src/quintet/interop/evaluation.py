"""lm-eval's harness knows models of this library by the name `quintet`.

On the command line, `python -m quintet.interop.evaluation` is lm-eval's own command, in which
`--model quintet --model_args pretrained=MODEL,quantize=int8` is one more model.
"""

import copy
import functools
import os
from typing import Any

import torch

from quintet.auto import AutoModelForCausalLM, AutoTokenizer
from quintet.errors import InputError, MissingDependencyError
from quintet.interop.tokenizers import to_transformers
from quintet.modeling.base import PreTrainedModel
from quintet.tokenization import PreTrainedTokenizer

# What lm-eval does with a model and a tokenizer that are there.
HARNESS = (
    *("add_bos_token", "batch_size", "chat_template_args", "enable_thinking", "logits_cache"),
    *("max_batch_size", "max_length", "mixed_precision_dtype", "prefix_token_id", "softmax_dtype"),
    *("think_end_token", "truncation"),
)


def load(
    pretrained: str | os.PathLike[str] | PreTrainedModel,
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizer | None = None,
    *,
    device: str | None = None,
    peft: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizer]:
    """Return a model and its tokenizer, loaded where they are named.

    Args:
        pretrained: a model, or where it is.
        tokenizer: the same; where the model is, if not given.
        device: where to; the GPU if there is one.
        peft: an adapter to put on it.
        trust_remote_code: accepted, without effect: nothing of a checkpoint is executed.
        **options: further ones of `from_pretrained`, as `dtype` and `quantize`.

    Raises:
        InputError: options beside a model that is loaded.
    """
    if isinstance(pretrained, PreTrainedModel):
        if options or tokenizer is None:
            raise InputError(
                f"{', '.join(options) or 'tokenizer=None'}: a model that is loaded comes with its "
                "tokenizer, and with its options in it; give its name to have it loaded"
            )
        model = pretrained
    else:
        if device is not None or "device_map" not in options:
            options["device_map"] = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForCausalLM.from_pretrained(pretrained, **options)
        tokenizer = pretrained if tokenizer is None else tokenizer
    if peft is not None:
        model.load_adapter(peft)
    if not isinstance(tokenizer, PreTrainedTokenizer):
        shared = ("revision", "cache_dir", "token", "local_files_only", "subfolder")
        where = {name: options[name] for name in shared if name in options}
        tokenizer = AutoTokenizer.from_pretrained(tokenizer, **where)
    return model, tokenizer


@functools.cache
def register_lm_eval() -> type[Any]:
    """Make `quintet` a model of lm-eval's, as `simple_evaluate(model="quintet", ...)` finds it.

    Its arguments are those of `from_pretrained`, `pretrained` first, and those of lm-eval that
    say how it is asked: `batch_size`, `max_length`, `add_bos_token` and so on.

    Raises:
        MissingDependencyError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MissingDependencyError(
            "this needs lm-eval and Transformers; install them with pip install 'lm_eval[hf]'"
        ) from error

    class QuintetLM(HFLM):  # type: ignore[misc]
        """A model of this library behind the interface of lm-eval's own Transformers models."""

        def __init__(self, pretrained: Any, tokenizer: Any = None, **options: Any) -> None:
            harness_options = {name: options.pop(name) for name in HARNESS if name in options}
            model, own = load(pretrained, tokenizer, **options)
            super().__init__(
                pretrained=model,
                tokenizer=to_transformers(own),
                backend="causal",
                **harness_options,
            )

        @property
        def config(self) -> Any:
            """The model's config without its quantization, so that lm-eval looks for none."""
            config = copy.copy(super().config)
            vars(config).pop("quantization_config", None)
            return config

    register_model("quintet")(QuintetLM)
    return QuintetLM


def main() -> None:
    """Run lm-eval's command, which knows `--model quintet` by then."""
    register_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()

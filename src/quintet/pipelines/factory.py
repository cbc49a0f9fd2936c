"""`pipeline(task)`: loads and assembles a task."""

import difflib
import importlib
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from quintet.auto import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from quintet.errors import InputError, shown
from quintet.hub import demo_model
from quintet.modeling.placement import first_device
from quintet.pipelines.base import Pipeline

if TYPE_CHECKING:
    from quintet.configuration import PreTrainedConfig
    from quintet.modeling.base import PreTrainedModel
    from quintet.modeling.placement import DeviceMap
    from quintet.tokenization import PreTrainedTokenizer

# The module of each task, its class, and what loads its model.
TASKS: Mapping[str, tuple[str, str, Any]] = MappingProxyType(
    {
        "text-generation": ("text_generation", "TextGenerationPipeline", AutoModelForCausalLM),
        "text-classification": (
            "text_classification",
            "TextClassificationPipeline",
            AutoModelForSequenceClassification,
        ),
        "token-classification": (
            "token_classification",
            "TokenClassificationPipeline",
            AutoModelForTokenClassification,
        ),
        "question-answering": (
            "question_answering",
            "QuestionAnsweringPipeline",
            AutoModelForQuestionAnswering,
        ),
        "feature-extraction": ("feature_extraction", "FeatureExtractionPipeline", AutoModel),
        "zero-shot-classification": (
            "zero_shot_classification",
            "ZeroShotClassificationPipeline",
            AutoModelForSequenceClassification,
        ),
    }
)
# What tells where files are, to model, configuration and tokenizer alike.
PLACES = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
ALIASES = MappingProxyType(
    {"sentiment-analysis": "text-classification", "ner": "token-classification"}
)
# What a model that says nothing else is for, by the end of its class's name.
TASK_OF = MappingProxyType(
    {
        "ForCausalLM": "text-generation",
        "ForSequenceClassification": "text-classification",
        "ForTokenClassification": "token-classification",
        "ForQuestionAnswering": "question-answering",
        "Model": "feature-extraction",
    }
)


def pipeline(
    task: str | None = None,
    model: "str | os.PathLike[str] | PreTrainedModel | None" = None,
    config: "str | os.PathLike[str] | PreTrainedConfig | None" = None,
    tokenizer: "str | os.PathLike[str] | PreTrainedTokenizer | None" = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    device: str | int | torch.device | None = None,
    device_map: "DeviceMap" = None,
    dtype: str | torch.dtype = "auto",
    torch_dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Pipeline:
    """Load model and tokenizer of a task, and return the pipeline.

    Args:
        task: one of `TASKS`, or "sentiment-analysis" or "ner"; if not given, what the model is for.
        model: a name, a directory or a loaded model; for "text-generation" the packaged demo
            model if not given.
        config: in place of the checkpoint's, or where to read it.
        tokenizer: a name, a directory or a loaded tokenizer; the model's own if not given.
        revision: branch, tag or commit of a hub id.
        token: for private repositories.
        device: where the model runs; a GPU if there is one, or where a loaded model is.
        device_map: the other name of `device`.
        dtype: of the weights.
        torch_dtype: the older name of `dtype`.
        trust_remote_code: accepted, without effect: no code of a repository is ever run.
        model_kwargs: further arguments of `from_pretrained`, and any of those above.
        **options: the task's, for every call, and `batch_size`; an `assistant_model` may be a
            name or a directory.

    Raises:
        InputError: an unknown task or option, a loaded model without its tokenizer, or with an
            option that says how to load it.
    """
    if device is not None and device_map is not None:
        raise InputError("device and device_map are two names of the same choice; give one")
    if task is not None:
        task = _known(task)
    if model is None:
        if task not in (None, "text-generation"):
            raise InputError(f"{task} has no model of its own; name one: pipeline({task!r}, …)")
        model = demo_model()
    if isinstance(model, str | os.PathLike):
        kwargs = _once(
            model_kwargs or {},
            config=config,
            revision=revision,
            token=token,
            dtype=(None if dtype == "auto" else dtype) if torch_dtype is None else torch_dtype,
            device_map=device_map if device is None else device,
        )
        config = kwargs.pop("config", None)
        where = {key: kwargs.pop(key) for key in PLACES if key in kwargs}
        if isinstance(config, str | os.PathLike):
            config = AutoConfig.from_pretrained(config, **where)
        if task is None:
            known = AutoConfig.from_pretrained(model, **where) if config is None else config
            task = _task_of((known.architectures or ["ForCausalLM"])[0])
        if config is not None:
            kwargs["config"] = config
        kwargs.setdefault("device_map", "auto")
        loaded = TASKS[task][2].from_pretrained(model, **kwargs, **where)
        tokenizer = model if tokenizer is None else tokenizer
    else:
        _refuse_for_loaded(
            config=config,
            dtype=None if dtype == "auto" else dtype,
            torch_dtype=torch_dtype,
            device_map=device_map,
            model_kwargs=model_kwargs,
        )
        task = _task_of(type(model).__name__) if task is None else task
        loaded = model if device is None else model.to(first_device(device))
        where = {"revision": revision, "token": token}
    if tokenizer is None:
        raise InputError("a loaded model needs its tokenizer: pipeline(task, model, tokenizer=…)")
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer, **where)
    assistant = options.get("assistant_model")
    if isinstance(assistant, str | os.PathLike):
        options["assistant_model"] = AutoModelForCausalLM.from_pretrained(
            assistant, dtype=loaded.dtype, device_map=loaded.device, token=where.get("token")
        )
    module, name, _ = TASKS[task]
    found = getattr(importlib.import_module(f"quintet.pipelines.{module}"), name)
    pipeline: Pipeline = found(loaded, tokenizer, **options)
    return pipeline


def _once(given: Mapping[str, Any], **named: Any) -> dict[str, Any]:
    """Merge named and given arguments of `from_pretrained`."""
    kwargs = dict(given)
    if "torch_dtype" in kwargs:
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
    wishes = {name: value for name, value in named.items() if value is not None}
    for name, value in wishes.items():
        if name in kwargs:
            raise InputError(
                f"{name}={value!r} and model_kwargs[{name!r}]={kwargs[name]!r} say the same thing "
                "twice; give one of them"
            )
    return {**kwargs, **wishes}


def _known(task: str) -> str:
    """Return a task's name, resolving aliases."""
    names = (*TASKS, *ALIASES)
    if task not in names:
        near = difflib.get_close_matches(task, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        raise InputError(f"there is no task {shown(task)}; {hint}")
    return ALIASES.get(task, task)


def _task_of(architecture: str) -> str:
    for suffix, task in TASK_OF.items():
        if architecture.endswith(suffix):
            return task
    raise InputError(
        f"what a {architecture} is for cannot be told; name a task: {', '.join(TASKS)}"
    )


def _refuse_for_loaded(**options: Any) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise InputError(
            f"the model is loaded already, so {', '.join(given)} would have no effect; "
            "pass it to from_pretrained"
        )

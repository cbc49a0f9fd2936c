"""What every model is: a module with a config, read from and written to checkpoints."""

import copy
import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from quintet.checkpoint import StackExperts
from quintet.configuration.base import CONFIG_NAME, PreTrainedConfig
from quintet.errors import InputError
from quintet.folder import checked_path
from quintet.generation.config import GENERATION_CONFIG_NAME, GenerationConfig
from quintet.hub import Pushable
from quintet.layers.moe import Experts
from quintet.modeling import loading
from quintet.modeling.checkpointing import Checkpointing
from quintet.modeling.contract import ModelContract
from quintet.modeling.key_mapping import check_tied, stack_experts
from quintet.modeling.placement import DeviceMap, MaxMemory, named_dtype
from quintet.ops.attention import attention_backend
from quintet.quantization import (
    QuantizationConfig,
    Quantized,
    Scheme,
    Slot,
    apply,
    freeze,
    packed,
    tie,
)

__all__ = ["PreTrainedModel"]


class PreTrainedModel(ModelContract, Checkpointing, Pushable):
    """The base of all models.

    Attributes:
        config_class: the family's configuration.
        base_model_prefix: the attribute that holds the model without its head.
        new_head: prefixes of parameters a checkpoint may lack, because a head that is trained on
            top of a released model begins untrained.
        weight_rules: how tensors of the model and of its checkpoints differ.
        keep_in_fp32: how the names of tensors end that are float32 whatever `dtype` is asked for.
        keep_unquantized: modules that every scheme leaves as they are, because a router's or
            head's rounding costs much and saves little, or something else than a product reads
            the weight.
    """

    config_class: ClassVar[type[PreTrainedConfig]] = PreTrainedConfig
    base_model_prefix: ClassVar[str] = "model"
    new_head: ClassVar[tuple[str, ...]] = ()
    weight_rules: ClassVar[tuple[StackExperts, ...]] = ()
    keep_in_fp32: ClassVar[tuple[str, ...]] = ()
    keep_unquantized: ClassVar[tuple[str, ...]] = ("score", "qa_outputs")

    def __init__(self, config: PreTrainedConfig) -> None:
        if not isinstance(config, self.config_class):
            raise InputError(
                f"{type(self).__name__} takes a quintet.{self.config_class.__name__}, not a "
                f"{type(config).__module__}.{type(config).__qualname__}; where that has a "
                f"to_dict(), {self.config_class.__name__}.from_dict(config.to_dict()) is one"
            )
        # What a caller has set since the config was made is as little believed as a file.
        config.check()
        attention_backend(config.attn_implementation)
        super().__init__(config)
        self.generation_config = GenerationConfig.from_model_config(config)
        self.checkpoint_as_configured(self.config)

    # -- files -------------------------------------------------------------------------------

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig,
        *,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
    ) -> Self:
        """Build a model with random weights; `config` stays the caller's, and as it is.

        Raises:
            InputError: `dtype` (or `torch_dtype`, its older name) is none that weights can have.
        """
        if attn_implementation is not None:
            config = copy.deepcopy(config)
            config.attn_implementation = attn_implementation
        dtype = torch_dtype if dtype is None else dtype
        model = cls(config)
        return model if dtype is None else model.to(named_dtype(dtype))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *,
        config: PreTrainedConfig | str | os.PathLike[str] | None = None,
        generation_config: GenerationConfig | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        dtype: str | torch.dtype | None = "auto",
        torch_dtype: str | torch.dtype | None = None,
        device_map: DeviceMap = None,
        max_memory: MaxMemory | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        variant: str | None = None,
        key_mapping: Mapping[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        trust_remote_code: bool = False,
        low_cpu_mem_usage: bool = True,
        use_safetensors: bool | None = None,
        quantize: str | None = None,
        quantization_config: QuantizationConfig | Mapping[str, Any] | None = None,
        **config_overrides: Any,
    ) -> Self:
        """Load a model, completely or not at all; it comes back in eval mode.

        Names and shapes are checked before any weight is read. Nothing from the checkpoint is
        executed: `trust_remote_code` is accepted and does nothing, as does `low_cpu_mem_usage`.

        Args:
            pretrained_model_name_or_path: a directory, or a hub id; None for a config and a state
                dict alone.
            config: in place of the checkpoint's own, or where to read it; one that is given stays
                the caller's, and as it is.
            generation_config: in place of the checkpoint's own.
            state_dict: weights in memory, in place of the checkpoint's.
            dtype: of the weights; "auto" is the one they were saved in.
            torch_dtype: the older name of `dtype`.
            device_map: where the weights go. A device, or its index, for all of them; "auto" for
                as many GPUs as they take (the CPU where there is none), "balanced" for all GPUs
                evenly, "sequential" for one after the other; or a mapping from parts to devices,
                {"model.layers.0": 0, "": "cpu"}. Activations follow the weights.
            max_memory: how much of each device the weights may take, for example
                {0: "20GB", "cpu": "60GB"}; for device_map="auto", "balanced" or "sequential".
            revision: branch, tag or commit of a hub id.
            cache_dir: where downloads are kept.
            token: for private repositories.
            local_files_only: never use the network.
            subfolder: where in the repository the model is.
            variant: which weights where a repository has several: "fp16" is
                model.fp16.safetensors.
            key_mapping: regular expressions that are replaced in the checkpoint's names, in order.
            ignore_mismatched_sizes: let tensors of another shape start from random weights, with a
                warning, in place of failing.
            output_loading_info: return a pair of the model and a mapping of the names that were
                missing (`missing_keys`), unused (`unexpected_keys`) or of another shape
                (`mismatched_keys`).
            trust_remote_code: accepted, without effect; so is low_cpu_mem_usage.
            use_safetensors: not false; pickled weights are never read.
            quantize: hold the weights in fewer bits, converted one by one as they are read:
                "int8", "int4", "nf4" or "fp8"; "none" turns a quantised checkpoint into plain
                numbers, and None leaves it as it is.
            quantization_config: the same with options, for example a `BitsAndBytesConfig`.
            **config_overrides: keys of the config to replace; with a `config`, only
                `attn_implementation`.

        Raises:
            ModelNotFoundError: no such model.
            CheckpointError: tensors are missing, of other shapes, or unreadable.
            DoesNotFitError: the devices have too little memory for the weights.
            ConfigError: the config breaks a rule.
            InputError: an option that does not exist.
        """
        if use_safetensors is False:
            raise InputError("use_safetensors=False: pickled weights are never read")
        if torch_dtype is not None and dtype != "auto":
            raise InputError(
                f"dtype={dtype!r} and torch_dtype={torch_dtype!r} are one option; give dtype alone"
            )
        source = None
        if pretrained_model_name_or_path is not None:
            source = loading.Source(
                pretrained_model_name_or_path,
                revision,
                cache_dir,
                token,
                local_files_only,
                subfolder,
                variant,
            )
        if generation_config is not None and not cls.can_generate():
            raise InputError(f"generation_config: a {cls.__name__} generates nothing")
        options = loading.Options(
            generation_config=generation_config,
            dtype=dtype if torch_dtype is None else torch_dtype,
            device_map=device_map,
            max_memory=max_memory,
            state_dict=state_dict,
            key_mapping=key_mapping,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            quantize=quantize,
            quantization_config=quantization_config,
        )
        model, report = loading.load(cls, source, config, config_overrides, options)
        # As in Transformers, the type of the result follows the argument.
        return (model, report) if output_loading_info else model  # type: ignore[return-value]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *,
        max_shard_size: int | str = "5GB",
        state_dict: Mapping[str, Tensor] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | bool | None = None,
        save_function: Callable[..., Any] | None = None,
    ) -> None:
        """Write config, generation config and weights, in the layout Transformers reads.

        Whatever happens meanwhile, the directory holds the old checkpoint or the new one.

        Args:
            save_directory: made if needed.
            is_main_process: False in the processes that are to write nothing.
            max_shard_size: of a file of weights: "5GB", "500MiB", a number of bytes.
            state_dict: the weights in place of the model's own.
            safe_serialization: has to be true.
            variant: a word in the names of the files, as in model.fp16.safetensors; weights of
                other variants are left alone.
            push_to_hub: then push the model to the hub, too.
            repo_id: where to; the name of the directory if not given.
            token: for the hub.
            save_function: accepted, without effect: the files are always written whole, by this
                library; `is_main_process` says by whom.

        Raises:
            SaveError: writing failed; a checkpoint that was there is still loadable.
            InputError: `safe_serialization=False`; pickled weights are never written. Or tied
                weights that are two different ones.
        """
        if not safe_serialization:
            raise InputError("safe_serialization=False: pickled weights are never written")
        if not is_main_process:
            return
        save_directory = checked_path(save_directory, "save_directory")
        self.config.architectures = [type(self).__name__]
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        texts = {CONFIG_NAME: self.config.to_json_string()}
        if self.can_generate():
            texts[GENERATION_CONFIG_NAME] = self.generation_config.to_json_string()
        given = self.state_dict() if state_dict is None else state_dict
        tied = self.tied_names()
        tensors, files = packed(self, given, self.weight_rules, tied=tied, dtype=self.dtype)
        check_tied(tensors, tied)
        loading.write(
            save_directory,
            {name: tensor for name, tensor in tensors.items() if name not in tied},
            files,
            rules=self.weight_rules,
            max_shard_size=max_shard_size,
            variant=variant,
            texts=texts,
        )
        if push_to_hub:
            self.push_to_hub(
                repo_id or os.path.basename(os.path.abspath(save_directory)),
                token=token,
                max_shard_size=max_shard_size,
                state_dict=state_dict,
                variant=variant,
            )

    # -- the parts of a model ----------------------------------------------------------------

    @property
    def base_model(self) -> "PreTrainedModel":
        """The model without its head; itself where it has none."""
        base = self._modules.get(self.base_model_prefix)
        return base if isinstance(base, PreTrainedModel) else self

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the module that turns ids into vectors."""
        return self.base_model.get_submodule("embed_tokens")  # type: ignore[return-value]

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the module that turns ids into vectors, and with it the vocabulary's size."""
        self.base_model.add_module("embed_tokens", value)
        self.config.vocab_size = value.num_embeddings
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear | None:
        """Return the module that turns vectors into logits of ids; None without one."""
        return None

    def tied_names(self) -> dict[str, str]:
        """Return the parameters that are other parameters under a second name."""
        if not self.config.tie_word_embeddings or self.get_output_embeddings() is None:
            return {}
        return {"lm_head.weight": f"{self.base_model_prefix}.embed_tokens.weight"}

    def optional_names(self, held: Iterable[str]) -> tuple[str, ...]:
        """Return prefixes of parts the model does without when a checkpoint `held` none of them."""
        return ()

    def drop(self, prefixes: tuple[str, ...]) -> None:
        """Take away the optional parts that a checkpoint did not have (a family overrides this)."""

    def tie_weights(self) -> None:
        """Make tied parameters one again, after one of them was replaced."""
        for alias, name in self.tied_names().items():
            (path, _, leaf), origin = alias.rpartition("."), name.rpartition(".")[0]
            module, source = self.get_submodule(path), self.get_submodule(origin)
            if module is not source and not tie(module, source):
                setattr(module, leaf, self.get_parameter(name))

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """Change the vocabulary's size; new rows begin as the mean of the old ones.

        Raises:
            InputError: a size below 1, or one that cuts off the padding token.
        """
        old = self.get_input_embeddings()
        if any(isinstance(m, Quantized) for m in (old, self.get_output_embeddings())):
            raise InputError(
                "the vocabulary of a model whose embeddings or head are quantised cannot change "
                "its size; load it without quantization_config, resize it, and quantise it then"
            )
        size = old.num_embeddings if new_num_tokens is None else new_num_tokens
        multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in (size, multiple)):
            raise InputError(
                f"new_num_tokens={new_num_tokens!r}, pad_to_multiple_of={pad_to_multiple_of!r}: "
                "both have to be integers of at least 1"
            )
        if pad_to_multiple_of:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if old.padding_idx is not None and old.padding_idx >= size:
            raise InputError(
                f"new_num_tokens={size} would cut off pad_token_id={old.padding_idx}; "
                "keep it, or set another pad_token_id first"
            )
        old.weight = _resized(old.weight, size)
        old.num_embeddings = size
        head = self.get_output_embeddings()
        if head is not None:
            if "lm_head.weight" not in self.tied_names():
                head.weight = _resized(head.weight, size)
            head.out_features = size
        self.config.vocab_size = size
        self.tie_weights()
        return old

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *others: Any, **named: Any
    ) -> None:
        """Take experts under the names that files have for them, one by one."""
        errors: list[str] = others[-1] if others else named["error_msgs"]
        errors += stack_experts(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *others, **named)

    # -- quantisation ------------------------------------------------------------------------

    def quantize_modules(self, scheme: Scheme, dtype: torch.dtype) -> dict[str, Slot]:
        """Replace modules by quantised ones without weights; return where these go, by name."""
        return apply(
            self,
            scheme,
            keep=self.keep_unquantized,
            embedding=self.get_input_embeddings(),
            head=self.get_output_embeddings(),
            tied="lm_head.weight" in self.tied_names(),
            dtype=dtype,
        )

    def note_quantization(self, quantization: QuantizationConfig | None) -> None:
        """Write down in the config what the weights are held as; None for plain numbers."""
        vars(self.config).pop("quantization_config", None)
        if quantization is not None:
            freeze(self)
            vars(self.config)["quantization_config"] = quantization.to_dict()

    # -- state -------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first parameter that is not always float32."""
        dtypes = (
            parameter.dtype
            for name, parameter in self.named_parameters()
            if parameter.is_floating_point() and not name.endswith(self.keep_in_fp32)
        )
        return next(dtypes, torch.float32)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter; of the first that has one where weights are offloaded.

        What has no device (`meta`) between the calls of a forward is brought there for them, and
        buffers stay.
        """
        tensors = itertools.chain(self.parameters(), self.buffers())
        devices = (tensor.device for tensor in tensors if not tensor.is_meta)
        return next(devices, torch.device("meta"))

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Choose the attention backend of the next forward: eager, sdpa or flash_attention_2.

        Raises:
            UnsupportedBackendError: there is no such backend.
            MissingDependencyError: its package is not installed.
        """
        attention_backend(attn_implementation)
        self.config.attn_implementation = attn_implementation

    def init_weights(self) -> None:
        """Draw fresh weights: normal with `initializer_range`, biases zero, norms one."""
        for module in self.modules():
            self.init_module(module)
        self.tie_weights()

    def init_module(self, module: nn.Module) -> None:
        """Draw the weights of one module (a family extends this for modules of its own)."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, Experts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()


def _resized(weight: Tensor, size: int) -> nn.Parameter:
    rows = weight.detach()[:size]
    if size > len(rows):
        mean = rows.to(torch.float32).mean(dim=0, keepdim=True).to(rows.dtype)
        rows = torch.cat((rows, mean.expand(size - len(rows), -1)))
    return nn.Parameter(rows.clone(), requires_grad=weight.requires_grad)

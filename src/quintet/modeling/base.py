"""The base class of all models: a module with a config, loaded from and saved to checkpoints."""

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from quintet.checkpoint import InMemory
from quintet.configuration.base import PreTrainedConfig
from quintet.errors import InputError
from quintet.folder import CONFIG_NAME, checked_path
from quintet.generation.config import GENERATION_CONFIG_NAME, GenerationConfig
from quintet.hub import Pushable
from quintet.modeling import loading
from quintet.modeling.adapting import Adapting
from quintet.modeling.checkpointing import Checkpointing
from quintet.modeling.contract import ModelContract
from quintet.modeling.dividing import world_for
from quintet.modeling.key_mapping import check_tied, stack_experts
from quintet.modeling.placement import DeviceMap, MaxMemory, named_dtype
from quintet.modeling.saving import write_together
from quintet.modeling.source import ModelSource
from quintet.parallel.division import DistributedConfig, requested_division
from quintet.parallel.together import Together
from quintet.quantization import QuantizationConfig, packed

__all__ = ["PreTrainedModel"]


class PreTrainedModel(ModelContract, Checkpointing, Adapting, Pushable):
    """Base of all models: built from a config, loaded from and saved to checkpoints."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
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
        """Build a model with random weights, from a copy of `config`.

        One of Transformers for the same family is taken, too.

        Raises:
            InputError: the config is of another family, or `dtype` (or `torch_dtype`, its older
                name) is none that weights can have.
        """
        config = cls.config_class.of(config)
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
        tp_plan: str | Mapping[str, str] | None = None,
        tp_size: int | None = None,
        device_mesh: DeviceMesh | None = None,
        distributed_config: DistributedConfig | Mapping[str, Any] | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        variant: str | None = None,
        gguf_file: str | None = None,
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
            pretrained_model_name_or_path: a directory, a GGUF file, or a hub id; None for a config
                and a state dict alone.
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
            tp_plan: "auto" divides the model among the processes that torchrun started, as does
                device_map="auto" there; each reads only what it holds. With one process it is
                whole.
            tp_size: among so many; all if not given.
            device_mesh: among the processes of a mesh, with dimensions named "tp", "pp" or "dp".
            distributed_config: how many processes divide what, as a `DistributedConfig` or a
                mapping.
            revision: branch, tag or commit of a hub id.
            cache_dir: where downloads are kept.
            token: for private repositories.
            local_files_only: never use the network.
            subfolder: where in the repository the model is.
            variant: which weights where a repository has several: "fp16" is
                model.fp16.safetensors.
            gguf_file: which file of a directory or hub id, where the model is one in GGUF; one that
                is named in place of a directory, or alone in it, needs no name here.
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
            DistributedError: other processes did not come, or failed.
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
            source = ModelSource(
                pretrained_model_name_or_path,
                revision,
                cache_dir,
                token,
                local_files_only,
                subfolder,
                variant,
                gguf_file,
            )
        if generation_config is not None and not cls.can_generate():
            raise InputError(f"generation_config: a {cls.__name__} generates nothing")
        distributed = requested_division(
            tp_plan, tp_size, device_mesh, distributed_config, auto=device_map == "auto"
        )
        world = None
        if distributed is not None:
            world = world_for(
                cls, source, config, config_overrides, distributed, device_map, max_memory
            )
        options = loading.Options(
            world=world,
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

        Of a model with adapters, the one in use is written, alone and as PEFT does; for a whole
        model, call `merge_and_unload` or `delete_adapter` first.

        Whatever happens meanwhile, the directory holds the old checkpoint or the new one.

        A model that several processes hold is one ordinary checkpoint, too. All of them have to
        call this; the first writes, and has one whole tensor at a time.

        Args:
            save_directory: made if needed.
            is_main_process: False in the processes that are to write nothing; where several hold
                the model, the first of them writes unless it is False there.
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
        several = self.world is not None and self.world.degrees.size > 1
        if several and (state_dict is not None or push_to_hub):
            raise InputError(
                f"{'state_dict' if state_dict is not None else 'push_to_hub'}: several processes "
                "hold this model, and write it together into a directory; load that in one process "
                "for more"
            )
        if not is_main_process and not several:
            return
        if self.adapters is not None and self.adapters.configs:
            # As in Transformers: the base model is where it was.
            with Together(self.world if several else None, "while it saved"):
                # Every process has all of them.
                if is_main_process and (self.world is None or self.world.rank == 0):
                    self.save_adapter(save_directory)
            return
        save_directory = checked_path(save_directory, "save_directory")
        self.config.architectures = [type(self).__name__]
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        texts = {CONFIG_NAME: self.config.to_json_string()}
        if self.can_generate():
            texts[GENERATION_CONFIG_NAME] = self.generation_config.to_json_string()
        if self.world is not None and several:
            write_together(
                self,
                self.world,
                save_directory,
                max_shard_size=max_shard_size,
                variant=variant,
                texts=texts,
                writes=is_main_process,
            )
            return
        given = self.state_dict() if state_dict is None else InMemory(state_dict).state_dict
        tied = self.tied_names()
        tensors, files = packed(self, given, self.expert_stacks, tied=tied, dtype=self.dtype)
        check_tied(tensors, tied)
        loading.write(
            save_directory,
            {name: tensor for name, tensor in tensors.items() if name not in tied},
            files,
            stacks=self.expert_stacks,
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

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *others: Any, **named: Any
    ) -> None:
        """Accept experts one by one, under their names in files."""
        errors: list[str] = others[-1] if others else named["error_msgs"]
        errors += stack_experts(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *others, **named)

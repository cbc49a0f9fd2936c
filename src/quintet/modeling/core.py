"""The parts of a model: config, embeddings, head, tied parameters."""

import copy
import itertools
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from quintet.checkpoint import StackExperts
from quintet.configuration.base import PreTrainedConfig
from quintet.errors import InputError, shown
from quintet.generation.config import GenerationConfig
from quintet.generation.plan import Configuring, read_config
from quintet.layers.mamba2 import GatedRMSNorm
from quintet.layers.moe import Experts
from quintet.layers.norm import RMSNorm
from quintet.layers.router import ExpertRouter
from quintet.ops.attention import attention_backend
from quintet.parallel.context_parallel import Sequences
from quintet.parallel.division import PLAN
from quintet.parallel.stage import Stage
from quintet.parallel.styles import plan_of
from quintet.parallel.world import World
from quintet.quantization import QuantizationConfig, Quantized, Scheme, Slot, apply, freeze, tie

# As `vocab_size` of a config.
MOST_TOKENS = 2**24


class ModelCore(nn.Module):
    """The interface of a model to loading, placement and saving.

    Attributes:
        config: a copy of the one that was given.
        config_class: the family's configuration.
        hf_device_map: the device of each part, only there where they are several.
        world: the processes that hold the model together; None if this one has all of it.
        stage: which of its layers are here; None if all are.
        sequences: how it learns from rows that several processes share; None if this one reads
            whole rows. A forward that is called reads whole rows all the same.
        base_model_prefix: the attribute that holds the model without its head.
        new_head: prefixes of parameters a checkpoint may lack, because a head that is trained on
            top of a released model begins untrained.
        expert_stacks: how tensors of the model and of its checkpoints differ.
        keep_in_fp32: how the names of tensors end that are float32 whatever `dtype` is asked for.
        keep_unquantized: modules that every scheme leaves as they are, because a router's or
            head's rounding costs much and saves little, or something else than a product reads
            the weight.
    """

    config: PreTrainedConfig
    hf_device_map: dict[str, torch.device]
    world: World | None = None
    stage: Stage | None = None
    sequences: Sequences | None = None
    config_class: ClassVar[type[PreTrainedConfig]] = PreTrainedConfig
    base_model_prefix: ClassVar[str] = "model"
    new_head: ClassVar[tuple[str, ...]] = ()
    expert_stacks: ClassVar[tuple[StackExperts, ...]] = ()
    keep_in_fp32: ClassVar[tuple[str, ...]] = ()
    keep_unquantized: ClassVar[tuple[str, ...]] = ("score", "qa_outputs")

    def __init__(self, config: PreTrainedConfig) -> None:
        if not isinstance(config, self.config_class):
            raise InputError(
                f"{type(self).__name__} takes a quintet.{self.config_class.__name__}, not a "
                f"{type(config).__module__}.{type(config).__qualname__}; "
                f"{type(self).__name__}.from_config(config) takes that of Transformers, too"
            )
        # What a caller has set since the config was made is as little believed as a file.
        config.check()
        attention_backend(config.attn_implementation)
        super().__init__()
        # Of its own: what becomes of the model (its size, its dtype) is not said of others.
        self.config = copy.deepcopy(config)
        self.generation_config = GenerationConfig.from_model_config(config)

    @property
    def ends_here(self) -> bool:
        """Whether this process has the last layer, the norm and the head."""
        return self.stage is None or self.stage.last

    @property
    def generation_config(self) -> GenerationConfig:
        """Defaults of `generate()`; accepts a Transformers config."""
        generation_config: GenerationConfig = vars(self)["_generation_config"]
        return generation_config

    @generation_config.setter
    def generation_config(self, value: Configuring) -> None:
        vars(self)["_generation_config"] = read_config(value)

    # -- the parts of a model ----------------------------------------------------------------

    @property
    def base_model(self) -> "ModelCore":
        """The model without its head."""
        base = self._modules.get(self.base_model_prefix)
        return base if isinstance(base, ModelCore) else self

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding."""
        return self.base_model.get_submodule("embed_tokens")  # type: ignore[return-value]

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding, and with it `vocab_size`."""
        self.base_model.add_module("embed_tokens", value)
        self.config.vocab_size = value.num_embeddings
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear | None:
        """Return the output head, or None."""
        return None

    def tied_names(self) -> dict[str, str]:
        """Return the names of tied parameters, mapped to the parameter they are."""
        if not self.config.tie_word_embeddings or self.get_output_embeddings() is None:
            return {}
        return {"lm_head.weight": f"{self.base_model_prefix}.embed_tokens.weight"}

    def optional_names(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return prefixes of optional parts that a checkpoint with these names lacks."""
        return ()

    def drop(self, prefixes: tuple[str, ...]) -> None:
        """Remove optional parts that a checkpoint lacks (a family overrides this)."""

    def tie_weights(self) -> None:
        """Tie parameters again after one of them was replaced."""
        for alias, name in self.tied_names().items():
            (path, _, leaf), origin = alias.rpartition("."), name.rpartition(".")[0]
            module, source = self.get_submodule(path), self.get_submodule(origin)
            if module is not source and not tie(module, source):
                setattr(module, leaf, self.get_parameter(name))

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """Change the vocabulary size; new rows start as the mean of the old ones.

        Raises:
            InputError: a size below 1, or one that cuts off the padding token.
        """
        old = self.get_input_embeddings()
        if any(isinstance(m, Quantized) for m in (old, self.get_output_embeddings())):
            raise InputError(
                "the vocabulary of a model whose embeddings or head are quantised cannot change "
                "its size; load it without quantization_config, resize it, and quantise it then"
            )
        if any("adapters" in m._modules for m in (old, self.get_output_embeddings()) if m):
            raise InputError(
                "there is an adapter on the embeddings or the head, whose vocabulary is of the "
                "size it has; resize it before the adapter is put there, or merge_and_unload()"
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
        if size > MOST_TOKENS:
            raise InputError(f"new_num_tokens={size} has to be at most {MOST_TOKENS}")
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

    # -- quantisation ------------------------------------------------------------------------

    def quantize_modules(
        self, scheme: Scheme, dtype: torch.dtype, *, divided: bool = False
    ) -> dict[str, Slot]:
        """Replace modules by empty quantised ones; return the slots to fill, by name.

        Args:
            dtype: of the vectors of ids.
            divided: whether the model was cut among processes before.
        """
        return apply(
            self,
            scheme,
            keep=self.keep_unquantized,
            embedding=self.get_input_embeddings(),
            head=self.get_output_embeddings(),
            tied="lm_head.weight" in self.tied_names(),
            dtype=dtype,
            divided=divided,
        )

    def note_quantization(self, quantization: QuantizationConfig | None) -> None:
        """Record the quantisation in the config; None removes it."""
        vars(self.config).pop("quantization_config", None)
        if quantization is not None:
            freeze(self)
            stored = quantization.keeping(self.maps_in_numbers())
            vars(self.config)["quantization_config"] = stored

    def maps_in_numbers(self) -> list[str]:
        """Return the names of linear maps that are not quantised."""
        maps = (nn.Linear, ExpertRouter)
        return [
            path
            for path, module in self.named_modules(remove_duplicate=False)
            if isinstance(module, maps) and not isinstance(module, Quantized)
        ]

    # -- processes ---------------------------------------------------------------------------

    @property
    def tp_size(self) -> int | None:
        """The tensor-parallel size, or None if one process holds the whole model."""
        return None if self.world is None else self.world.degrees.tp

    @property
    def supports_tp_plan(self) -> bool:
        """Whether tensor parallelism is supported."""
        return bool(self.tp_plan)

    @property
    def tp_plan(self) -> dict[str, str]:
        """The tensor-parallel plan in Transformers' format; informative only.

        Raises:
            InputError: it is set.
        """
        return plan_of(self)

    @tp_plan.setter
    def tp_plan(self, plan: object) -> None:
        raise InputError(f"tp_plan={shown(plan)} cannot be set: {PLAN}")

    # -- state -------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first parameter that is not kept in float32."""
        dtypes = (
            parameter.dtype
            for name, parameter in self.named_parameters()
            if parameter.is_floating_point()
            and not name.endswith(self.keep_in_fp32)
            # An adapter's are float32 on any model.
            and ".adapters." not in name
        )
        return next(dtypes, torch.float32)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter, or of the first one that is not offloaded.

        What has no device (`meta`) between the calls of a forward is brought there for them, and
        buffers stay.
        """
        tensors = itertools.chain(self.parameters(), self.buffers())
        devices = (tensor.device for tensor in tensors if not tensor.is_meta)
        return next(devices, torch.device("meta"))

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype a tensor gets in a model of dtype `dtype`."""
        return torch.float32 if name.endswith(self.keep_in_fp32) else dtype

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Choose the attention backend: eager, sdpa or flash_attention_2.

        Raises:
            UnsupportedBackendError: there is no such backend.
            MissingDependencyError: its package is not installed.
        """
        attention_backend(attn_implementation)
        self.config.attn_implementation = attn_implementation

    def init_weights(self) -> None:
        """Initialise all weights: normal with `initializer_range`, biases zero, norms one."""
        for module in self.modules():
            # Without memory there is nothing to draw, which torch takes its time for.
            if any(not weight.is_meta for weight in module.parameters(recurse=False)):
                self.init_module(module)
        self.tie_weights()

    def init_module(self, module: nn.Module) -> None:
        """Initialise the weights of one module (a family extends this for its own)."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, Experts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
        if isinstance(module, RMSNorm | GatedRMSNorm):
            nn.init.ones_(module.weight)
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

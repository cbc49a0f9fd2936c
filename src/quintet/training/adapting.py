"""The `[adapter]` table: a few numbers beside a model's weights are trained in their place."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import nn

from quintet.adapters.config import LoraConfig, broken_rule
from quintet.errors import InputError, UnsupportedModelError, shown
from quintet.modeling.adapted_rows import AdaptedRows
from quintet.modeling.base import PreTrainedModel
from quintet.modeling.heads import CausalLMHead
from quintet.modeling.init_on_meta import init_on_meta
from quintet.training.settings import SettingError, key_of, plain

# What an adapter is called that the one which trains is compared with.
REFERENCE = "reference"
# The stacks of routed experts, which are parameters of their layers and no linear maps.
_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """The `[adapter]` table: W + s · B A, of which A and B are trained (arXiv:2106.09685).

    The names are `LoraConfig`'s and PEFT's, and what they mean is said there. Left alone, all
    linear maps but the head's get matrices of rank 16; routers never do unless they are named.

    Attributes:
        from_: an adapter to go on with, a folder or a hub id; what it is, its own file says.
        experts: whether routed experts are adapted, too, each by matrices of its own.
        r: the rank.
        lora_alpha: s = lora_alpha / r, or lora_alpha / √r with `use_rslora`.
        target_modules: the modules that are adapted, by the ends of their names or by a regular
            expression; "all-linear" for all linear maps but the head.
        exclude_modules: those that are not, though targeted.
        target_parameters: matrices that are no linear map's, such as "mlp.gate.weight".
        layers_to_transform: the layers that are adapted; None for all.
        layers_pattern: how the list of layers is called.
        rank_pattern: other ranks, by regular expressions that names end with.
        alpha_pattern: other alphas, by the same.
        lora_dropout: the share of the inputs of A that is left out in training.
        bias: which biases are trained: "none", "all", or "lora_only" for those beside an A and B.
        use_rslora: scale by the square root of the rank (arXiv:2312.03732).
        use_dora: train a magnitude for each row beside its direction (arXiv:2402.09353).
        lora_bias: whether B has a bias.
        modules_to_save: modules that are trained whole, such as "lm_head" or "norm".
        trainable_token_indices: the ids whose vectors are trained.
        init_lora_weights: true to begin as no change; "gaussian" the same with another A; false
            with random numbers.
    """

    from_: str | None = None
    experts: bool = False
    r: int = 16
    lora_alpha: float = 32.0
    target_modules: tuple[str, ...] | str | None = "all-linear"
    exclude_modules: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] | None = None
    trainable_token_indices: tuple[int, ...] | None = None
    init_lora_weights: bool | Literal["gaussian"] = True

    def __post_init__(self) -> None:
        if broken := broken_rule(self._values()):
            key, rule = broken
            raise SettingError.value(key, plain(getattr(self, key)), f"has to be {rule}")
        if self.experts or self.target_parameters:
            for key in ("use_dora", "lora_bias", "lora_dropout"):
                if value := getattr(self, key):
                    field = "experts" if self.experts else "target_parameters"
                    raise SettingError.value(
                        key,
                        value,
                        f"cannot be with {field}, which are parameters and not maps; take one of "
                        "the two out",
                    )
        if self.from_ is not None:
            own = AdapterSettings()
            for one in fields(self):
                if one.name != "from_" and getattr(self, one.name) != getattr(own, one.name):
                    raise SettingError.value(
                        key_of(one),
                        plain(getattr(self, one.name)),
                        "contradicts from, as an adapter that is gone on with is what its own "
                        "file says; take one of the two out",
                    )

    @property
    def reads_weights(self) -> bool:
        """Whether an adapter begins with numbers of the model's, and not of its own or its file."""
        own = self.modules_to_save or self.trainable_token_indices or self.bias != "none"
        return self.from_ is None and bool(self.use_dora or own)

    def config(self) -> LoraConfig:
        """Return the configuration of a new adapter."""
        values = self._values()
        if self.experts:
            values["target_parameters"] = [*(self.target_parameters or ()), *_EXPERTS]
        return LoraConfig(task_type="CAUSAL_LM", **values)

    def _values(self) -> dict[str, Any]:
        own = (one.name for one in fields(self) if one.name not in ("from_", "experts"))
        return {name: plain(getattr(self, name)) for name in own}


@dataclass(frozen=True, slots=True)
class Trained:
    """The trained parameters of a model, and their minimum memory.

    Attributes:
        parameters: how many numbers are trained.
        total: how many there are.
        weight_bytes: the bytes of all weights, those trained included.
        learning: the bytes of gradients and of the two moments of AdamW, in float32.
    """

    parameters: int
    total: int
    weight_bytes: int
    learning: int

    @classmethod
    def count(cls, model: nn.Module) -> "Trained":
        """Count a model, whose matrices may be in fewer bits."""
        trained = [one for one in model.parameters() if one.requires_grad]
        parameters = sum(one.numel() for one in trained)
        whole = (
            model.num_parameters()
            if isinstance(model, PreTrainedModel)
            else sum(one.numel() for one in model.parameters())
        )
        tensors = {id(one): one for one in (*model.parameters(), *model.buffers())}
        nbytes = sum(one.numel() * one.element_size() for one in tensors.values())
        return cls(parameters, whole, nbytes, sum(4 * 3 * one.numel() for one in trained))

    def __str__(self) -> str:
        """Format it as a line."""
        share = 100 * self.parameters / max(self.total, 1)
        return (
            f"trains {_short(self.parameters)} of {_short(self.total)} parameters ({share:.2g} %); "
            f"weights {self.weight_bytes / 1e6:,.0f} MB, gradients and moments "
            f"{self.learning / 1e6:,.0f} MB, beside what layers keep of a step"
        )


def put_adapter(
    model: PreTrainedModel, settings: AdapterSettings, reference: str | None = None
) -> None:
    """Put a new adapter on a model, or load one to resume; only it is trained from then on.

    Args:
        model: the model.
        settings: what it is.
        reference: another one to compare with, which is not in use, and not trained.

    Raises:
        SettingError: a new adapter does not fit the model, or there is one on it.
        ModelNotFoundError: the one to go on with is not there.
        CheckpointError: it is damaged, or is another model's.
    """
    if model.adapters is not None and model.adapters.configs:
        raise SettingError(
            "adapter",
            f": the model comes with the adapter {shown(next(iter(model.adapters.configs)))}; to "
            "go on with it, name its base as [model] from and its folder as [adapter] from; for "
            "another one on top of it, merge_and_unload() it and save_pretrained() the whole",
        )
    if reference is not None:
        model.load_adapter(reference, REFERENCE)
    if settings.from_ is not None:
        model.load_adapter(settings.from_, is_trainable=True)
        return
    try:
        model.add_adapter(settings.config())
    except (InputError, UnsupportedModelError) as refused:
        raise SettingError("adapter", f": {refused}") from refused


def put_on_part(
    model: CausalLMHead, settings: AdapterSettings, reference: str | None = None
) -> None:
    """Put adapters on a part of a model as on the whole: they are whole until they are divided.

    Args:
        model: the part.
        settings: what is trained.
        reference: another one to compare with, which is not in use, and not trained.

    Raises:
        SettingError: a new adapter does not fit the model.
        ModelNotFoundError: the one to go on with is not there.
        CheckpointError: it is damaged, or is another model's.
    """
    whole = init_on_meta(type(model), model.config)
    for name, parameter in [*whole.named_parameters(remove_duplicate=False)]:
        # With the shape and the device of the whole, and next to no memory.
        zero = torch.zeros((), dtype=model.dtype_of(name, model.dtype), device=model.device)
        path, _, leaf = name.rpartition(".")
        whole.get_submodule(path)._parameters[leaf] = nn.Parameter(zero.expand(parameter.shape))
    put_adapter(whole, settings, reference)
    model.requires_grad_(False)
    _share(model, whole)
    whole.require_adapters().move(whole, model)


def whole_of(model: CausalLMHead) -> CausalLMHead:
    """Return the whole of a model of which this is a part: without memory, with its adapters."""
    whole = init_on_meta(type(model), model.config)
    if model.adapters is not None:
        whole.requires_grad_(False)
        _share(whole, model)
    for path, module in model.named_modules():
        adapters = module._modules.get("adapters")
        if isinstance(adapters, nn.ModuleDict):
            whole.get_submodule(path).adapters = copy.deepcopy(adapters).to("meta")
    return whole


def _share(model: CausalLMHead, other: CausalLMHead) -> None:
    """Let a model know the adapters of another one."""
    for module in model.modules():
        if isinstance(module, AdaptedRows):
            object.__setattr__(module, "adapters", other.adapters)


def _short(count: int) -> str:
    for size, name in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.1f}{name}"
    return str(count)

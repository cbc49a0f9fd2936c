"""Activation checkpointing of a model's layers, under the names that trainers call."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quintet.configuration.base import PreTrainedConfig
from quintet.errors import ConfigError, shown
from quintet.layers.recompute import Recompute
from quintet.modeling.core import ModelCore


class Checkpointing(ModelCore):
    """Adds activation checkpointing to a model.

    Attributes:
        supports_gradient_checkpointing: that it can be asked for.
        gradient_checkpointing: whether the layers of this model, without a head, are recomputed.
        recompute: how.
    """

    supports_gradient_checkpointing: ClassVar[bool] = True
    gradient_checkpointing: bool = False
    recompute: Recompute = Recompute()
    _input_grads: RemovableHandle | None = None

    def checkpoint_as_configured(self, config: PreTrainedConfig) -> None:
        """Apply `gradient_checkpointing` of an older config, and drop the key.

        Raises:
            ConfigError: it is neither true nor false.
        """
        given = vars(config).pop("gradient_checkpointing", False)
        if not isinstance(given, bool | None):
            raise ConfigError(f"gradient_checkpointing={shown(given)} has to be true or false")
        self.gradient_checkpointing = bool(given)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute layers in the backward pass, to store fewer activations.

        Args:
            activation_checkpointing_kwargs: options of `torch.utils.checkpoint.checkpoint`, such as
                {"use_reentrant": False}, which is the default. With true, inputs are made to
                require gradients, as otherwise frozen embeddings would cut off what is behind.
            every_n_layers: recompute the first of so many layers, and hold what the others need.
            offload: hold what recomputed layers are given in the host's memory.

        Raises:
            InputError: an option that does not exist, or of another kind.
        """
        options = activation_checkpointing_kwargs
        recompute = Recompute({} if options is None else options, every_n_layers, offload)
        base = self._layers_owner()
        base.recompute, base.gradient_checkpointing = recompute, True
        if recompute.reentrant:
            self.enable_input_require_grads()

    def activation_checkpointing_disable(self) -> None:
        """Store activations again, and stop requiring gradients of the inputs."""
        base = self._layers_owner()
        base.recompute, base.gradient_checkpointing = Recompute(), False
        self.disable_input_require_grads()

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether layers are recomputed in training."""
        return self._layers_owner().gradient_checkpointing

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute layers; the older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """Hold the activations again; the older name of `activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed; the older name of `is_activation_checkpointing`."""
        return self.is_activation_checkpointing

    def enable_input_require_grads(self) -> None:
        """Make embeddings require gradients even if their weights are frozen."""
        base = self._layers_owner()
        if base._input_grads is None:
            base._input_grads = base.get_input_embeddings().register_forward_hook(_require_grads)

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        base = self._layers_owner()
        if base._input_grads is not None:
            base._input_grads.remove()
            base._input_grads = None

    def _layers_owner(self) -> "Checkpointing":
        base = self.base_model
        assert isinstance(base, Checkpointing)
        return base


def _require_grads(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)

"""Names by which trainers, adapters and launchers inspect a model; nothing here computes."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quintet.configuration.base import PreTrainedConfig
from quintet.errors import InputError
from quintet.generation.mixin import GenerationMixin
from quintet.modeling.core import ModelCore
from quintet.quantization import Quantized, QuantizedEmbedding


class ModelContract(ModelCore):
    """Methods and attributes that tools expect of any model.

    Attributes:
        main_input_name: the argument of `forward` whose size is the size of a batch.
        model_tags: what the model is tagged with when it is pushed to the hub.
        warnings_issued: what tools have warned of once, which they note here.
    """

    main_input_name: ClassVar[str] = "input_ids"
    is_parallelizable: ClassVar[bool] = False
    model_tags: list[str] | None = None
    name_or_path: str

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.name_or_path = config.name_or_path
        self.warnings_issued: dict[str, Any] = {}

    @classmethod
    def can_generate(cls) -> bool:
        """Return whether this class has a language-modelling head."""
        return issubclass(cls, GenerationMixin)

    # -- what there is of it -----------------------------------------------------------------

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """A small input for any forward."""
        ids = torch.tensor([[7, 6, 0, 0, 1]], dtype=torch.long, device="cpu")
        return {"input_ids": ids % self.config.vocab_size}

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the parameters, tied ones once.

        Args:
            only_trainable: those alone that get gradients, which quantised ones never do.
            exclude_embeddings: all but the vectors of ids, and what is tied to them.
        """
        left_out: set[int] = set()
        if exclude_embeddings:
            kinds = (nn.Embedding, QuantizedEmbedding)
            vectors = [module for module in self.modules() if isinstance(module, kinds)]
            left_out = {id(t) for module in vectors for t in _tensors(module)}
        plain = sum(
            parameter.numel()
            for parameter in self.parameters()
            if (parameter.requires_grad or not only_trainable) and id(parameter) not in left_out
        )
        if only_trainable:
            return plain
        quantized = [module for module in self.modules() if isinstance(module, Quantized)]
        # A tied head has the tensors of the embedding.
        first_of = {module: next(module.buffers(), None) for module in quantized}
        # What another stage runs holds nothing here.
        by_tensor = {id(first): module for module, first in first_of.items() if first is not None}
        return plain + sum(
            module.weight_count for first, module in by_tensor.items() if first not in left_out
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of parameters and buffers, tied ones once.

        The weights of a quantised model are buffers.
        """
        tensors: Iterable[Tensor] = self.parameters()
        nbytes = sum(t.numel() * t.element_size() for t in tensors)
        if return_buffers:
            nbytes += sum(t.numel() * t.element_size() for t in self.buffers())
        return nbytes

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Add tags for the hub."""
        given = [tags] if isinstance(tags, str) else list(tags)
        self.model_tags = list(dict.fromkeys([*(self.model_tags or ()), *given]))

    # -- its parts ---------------------------------------------------------------------------

    def get_decoder(self) -> ModelCore:
        """Return the model without its head."""
        return self.base_model

    def set_decoder(self, decoder: ModelCore) -> None:
        """Replace the model without its head.

        Raises:
            InputError: this model has no head, so there is nothing around its decoder.
        """
        if self.base_model is self:
            raise InputError(f"{type(self).__name__} is a decoder itself; it cannot be replaced")
        self.add_module(self.base_model_prefix, decoder)
        self.tie_weights()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the output head.

        Where the config ties it to the vectors of the ids, it is no longer tied from then on
        unless it shares their weight.

        Raises:
            InputError: the model has no such module.
        """
        old = self.get_output_embeddings()
        if old is None:
            raise InputError(f"{type(self).__name__} has no output embeddings to replace")
        name = next(name for name, module in self.named_children() if module is old)
        self.add_module(name, new_embeddings)
        if new_embeddings.weight is not self.get_input_embeddings().weight:
            self.config.tie_word_embeddings = False

    @property
    def _no_split_modules(self) -> set[str]:
        """The module classes that stay on one device: the layers."""
        layers = self.get_decoder().get_submodule("layers")
        return {type(layer).__name__ for layer in layers.children()}

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """The names of parameters that are tied to others."""
        return self.tied_names()

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """The same, under Transformers 5's name."""
        return self._tied_weights_keys

    @property
    def _keys_to_ignore_on_save(self) -> set[str] | None:
        """Names that checkpoints leave out, so that trainers do not miss them."""
        return set(self._tied_weights_keys) or None


def vocabulary_of(embedding: nn.Module, config: PreTrainedConfig) -> int:
    """Return the number of vectors in an embedding.

    What an adapter puts around it tells no number; then it is the config's.
    """
    if isinstance(embedding, nn.Embedding | QuantizedEmbedding):
        return embedding.num_embeddings
    return config.vocab_size


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]

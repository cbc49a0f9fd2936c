"""Adapters on a model, under the method names of Transformers."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from quintet.adapters.beginnings import of_original
from quintet.adapters.collection import Adapters
from quintet.adapters.config import LoraConfig
from quintet.adapters.files import open_adapter
from quintet.adapters.forwards import Active
from quintet.adapters.layout import ModuleLayout, layout_of
from quintet.adapters.merging import Merge, merge
from quintet.adapters.reading import (
    Adaptations,
    MisfitError,
    names_of,
    read_adapter,
    warn_of_missing,
)
from quintet.adapters.targets import expected, new_adapter, targeted
from quintet.adapters.writing import adapter_state, save_adapter
from quintet.checkpoint import InMemory, Weights
from quintet.configuration.numbers import is_finite
from quintet.errors import CheckpointError, InputError, shown
from quintet.folder import checked_path
from quintet.modeling.adapted_rows import AdaptedRows
from quintet.quantization import Quantized


class Adapting(AdaptedRows):
    """Adds adapter methods to a model."""

    name_or_path: str

    def load_adapter(
        self,
        peft_model_id: str | os.PathLike[str] | None = None,
        adapter_name: str | None = None,
        *,
        peft_config: LoraConfig | Mapping[str, Any] | None = None,
        adapter_state_dict: Mapping[str, Tensor] | None = None,
        low_cpu_mem_usage: bool = True,
        is_trainable: bool = False,
        hotswap: bool | str = False,
        adapter_kwargs: Mapping[str, Any] | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
    ) -> None:
        """Load an adapter, completely or not at all, and make it the only active one.

        Args:
            peft_model_id: a directory, or a hub id, with an adapter in the layout of PEFT; or one
                in GGUF, as llama.cpp has them.
            adapter_name: what it is to be called by; "default" if not given.
            peft_config: in place of the file's; with `adapter_state_dict`, for an adapter in
                memory.
            adapter_state_dict: its tensors in place of the files', named as there.
            low_cpu_mem_usage: accepted, without effect: nothing is in memory twice.
            is_trainable: whether it gets gradients.
            hotswap: whether it takes the place of the adapter of that name; "auto" where there is
                one.
            adapter_kwargs: any of the following, as a mapping.
            revision: branch, tag or commit of a hub id.
            cache_dir: where downloads are kept.
            token: for private repositories.
            local_files_only: never use the network.
            subfolder: where in the repository the adapter is.

        Raises:
            ModelNotFoundError: no such directory or repository.
            CheckpointError: it is no adapter, is damaged, or does not fit this model.
            UnsupportedModelError: it is of a kind, or asks for something, that is not here.
            InputError: there is one of that name, or the model is divided among processes.
        """
        self._check_whole()
        adapters = Adapters() if self.adapters is None else self.adapters
        adapter_name = "default" if adapter_name is None else adapter_name
        if hotswap not in (True, False, "auto"):
            raise InputError(f"hotswap={shown(hotswap)} has to be True, False or 'auto'")
        swaps = adapter_name in adapters.configs if hotswap == "auto" else hotswap
        if swaps:
            adapters.check_known([adapter_name])
        else:
            adapters.check_new(adapter_name)
        self._check_unmerged(adapters)
        config = None if peft_config is None else LoraConfig.of(peft_config)
        weights: Weights | None = None
        where = "adapter_state_dict"
        if adapter_state_dict is not None:
            weights = InMemory(adapter_state_dict)
        if peft_model_id is not None and (config is None or weights is None):
            where_from = {
                "revision": revision,
                "cache_dir": cache_dir,
                "token": token,
                "local_files_only": local_files_only,
                "subfolder": subfolder,
            }
            hub_options = dict(adapter_kwargs or {})
            if unknown := sorted(hub_options.keys() - where_from.keys()):
                raise InputError(
                    f"adapter_kwargs has {shown(unknown)}; there are {', '.join(where_from)}"
                )
            root, found, files = open_adapter(
                peft_model_id, self.config.to_dict(), **where_from | hub_options
            )
            config, where = config or found, where if weights is not None else str(root)
            weights = weights or files
        if config is None or weights is None:
            raise InputError(
                "load_adapter needs the directory or the hub id of an adapter, or peft_config and "
                "adapter_state_dict"
            )
        # Weights that are made in inference mode could not be trained, ever.
        with torch.inference_mode(False):
            layout = self._layout()
            try:
                adaptations = read_adapter(layout, config, weights, where)
            except MisfitError as error:
                raise CheckpointError(f"{error}\n{self._whose(config)}") from error
            config = of_original(layout, config, adaptations)
        if swaps:
            adapters.remove(self, [adapter_name])
        warn_of_missing(expected(layout, config), names_of(layout, adaptations), where)
        self._put(adapters, adapter_name, config, adaptations, trains=is_trainable)

    def set_adapter(
        self, adapter_name: str | Sequence[str], weights: Sequence[float] | None = None
    ) -> None:
        """Activate one adapter, or several whose changes are summed.

        Args:
            adapter_name: its name, or a list of names; none for an empty list.
            weights: what the changes of each are multiplied by, one if not given.

        Raises:
            InputError: there is no such adapter, or two of them exclude each other.
        """
        adapters = self.require_adapters()
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        adapters.check_known(names)
        factors = [1.0] * len(names) if weights is None else list(weights)
        if len(factors) != len(names) or len(set(names)) < len(names):
            raise InputError(
                f"set_adapter({names}, weights={factors}) has to name each adapter once, with a "
                "weight each"
            )
        if not all(map(is_finite, factors)):
            raise InputError(f"weights={shown(factors)} has to be a list of finite numbers")
        self._check_unmerged(adapters)
        adapters.use(self, [Active(n, float(w)) for n, w in zip(names, factors, strict=True)])

    def active_adapters(self) -> list[str]:
        """Return the names of the active adapters."""
        return [one.name for one in self.require_adapters().active]

    def disable_adapters(self) -> None:
        """Deactivate all adapters until `enable_adapters`."""
        adapters = self.require_adapters()
        self._check_unmerged(adapters)
        adapters.enabled = False
        adapters.install(self)

    def enable_adapters(self) -> None:
        """Activate the adapters again that `disable_adapters` deactivated."""
        adapters = self.require_adapters()
        adapters.enabled = True
        adapters.install(self)

    def add_adapter(
        self,
        adapter_config: LoraConfig | Mapping[str, Any] | object,
        adapter_name: str | None = None,
    ) -> None:
        """Add a new adapter for training, and make it the only active one.

        Nothing else of the model gets gradients from then on.

        Args:
            adapter_config: what it is; PEFT's `LoraConfig` is one, too.
            adapter_name: what it is to be called by; "default" if not given.

        Raises:
            InputError: there is one of that name, the config targets nothing that can have one, or
                the model is divided among processes.
            ConfigError: a value of the config breaks its rule.
            UnsupportedModelError: it asks for something that is not here.
        """
        self._check_whole()
        adapters = Adapters() if self.adapters is None else self.adapters
        adapter_name = adapters.check_new("default" if adapter_name is None else adapter_name)
        config = LoraConfig.of(adapter_config)
        config.base_model_name_or_path = self.name_or_path or None
        with torch.inference_mode(False), torch.no_grad():
            layout = self._layout()
            adaptations = new_adapter(layout, config)
        if isinstance(config.target_modules, str):
            # Other readers understand fewer expressions than paths.
            config.target_modules = [layout.named(spot.path) for spot in targeted(layout, config)]
        self._put(adapters, adapter_name, config, adaptations, trains=True)

    def get_adapter_state_dict(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """Return an adapter's tensors by their names in files; the active one by default.

        Raises:
            InputError: there is no such adapter, or several are in use.
        """
        adapters = self.require_adapters()
        name = self._one(adapter_name)
        return adapter_state(self._layout(), adapters.parts(self, name))

    def save_adapter(
        self, save_directory: str | os.PathLike[str], adapter_name: str | None = None
    ) -> None:
        """Write an adapter in PEFT's layout; the active one by default.

        Raises:
            SaveError: writing failed; what was there before is untouched.
            InputError: there is no such adapter, or several are in use.
        """
        adapters = self.require_adapters()
        name = self._one(adapter_name)
        config = LoraConfig.of(adapters.configs[name])
        config.base_model_name_or_path = config.base_model_name_or_path or self.name_or_path or None
        directory = checked_path(save_directory, "save_directory")
        save_adapter(directory, config, self.get_adapter_state_dict(name))

    # -- in the weights ----------------------------------------------------------------------

    def merge_adapter(self, adapter_names: Sequence[str] | None = None) -> None:
        """Merge adapters into the weights, in float32, rounded once; see `unmerge_adapter`.

        The model is as fast as without adapters then. Quantised matrices become plain numbers.

        Args:
            adapter_names: which; those in use if not given.

        Raises:
            InputError: there is no such adapter, or some are in the weights already.
            UnsupportedModelError: several layers share a weight, with an adapter for each.
        """
        adapters = self.require_adapters()
        if adapters.merged is not None:
            raise InputError("there are adapters in the weights; call unmerge_adapter() first")
        active = adapters.active
        if adapter_names is not None:
            active = tuple(map(Active, adapters.check_known(adapter_names)))
        adapters.use(self, active)
        adapters.merged = merge(self, adapters.places, active, self.dtype)
        adapters.install(self)
        self._note_ties()

    def unmerge_adapter(self) -> None:
        """Take merged adapters out again; the weights are restored bit by bit.

        Raises:
            InputError: there are none in them.
        """
        adapters = self.require_adapters()
        if not isinstance(adapters.merged, Merge):
            raise InputError("there is no adapter in the weights; merge_adapter() puts them there")
        adapters.merged.undo()
        adapters.merged = None
        adapters.install(self)
        self._note_ties()

    def merge_and_unload(self, adapter_names: Sequence[str] | None = None) -> Self:
        """Merge adapters for good, remove all of them, and return the model.

        Args:
            adapter_names: which; those in use if not given.

        Raises:
            InputError: there is no such adapter, or others are in the weights already.
            UnsupportedModelError: several layers share a weight, with an adapter for each.
        """
        adapters = self.require_adapters()
        if adapters.merged is None or adapter_names is not None:
            self.merge_adapter(adapter_names)
        adapters.merged = None
        adapters.remove(self, list(adapters.configs))
        if not any(isinstance(module, Quantized) for module in self.modules()):
            self.note_quantization(None)
        return self

    def _note_ties(self) -> None:
        """Record in the config whether head and embedding are tied; an adapter changes one."""
        head = self.get_output_embeddings()
        if head is None or self.adapters is None:
            return
        if (
            self.config.tie_word_embeddings
            and head.weight is not self.get_input_embeddings().weight
        ):
            self.adapters.unties, self.config.tie_word_embeddings = True, False
        elif self.adapters.unties and head.weight is self.get_input_embeddings().weight:
            self.adapters.unties, self.config.tie_word_embeddings = False, True

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters.

        Raises:
            InputError: there is no such adapter.
        """
        adapters = self.require_adapters()
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_unmerged(adapters)
        adapters.remove(self, list(dict.fromkeys(adapters.check_known(names))))

    def _put(
        self,
        adapters: Adapters,
        name: str,
        config: LoraConfig,
        adaptations: Adaptations,
        *,
        trains: bool,
    ) -> None:
        self._check_unmerged(adapters)
        for module in self.modules():
            if isinstance(module, AdaptedRows):
                object.__setattr__(module, "adapters", adapters)
        if trains:
            for parameter in self.parameters():
                parameter.requires_grad_(False)
        adapters.put(self, name, config, adaptations, trains=trains)
        adapters.use(self, [Active(name)])

    def _one(self, name: str | None) -> str:
        """Return an adapter's name; None means the active one."""
        adapters = self.require_adapters()
        if name is not None:
            return adapters.check_known([name])[0]
        if len(adapters.active) != 1:
            used = ", ".join(repr(one.name) for one in adapters.active) or "none"
            raise InputError(
                f"there are {len(adapters.active)} adapters in use ({used}); say which is meant "
                "with adapter_name, or use one with set_adapter"
            )
        return adapters.active[0].name

    def _check_unmerged(self, adapters: Adapters) -> None:
        if adapters.merged is not None:
            raise InputError("there are adapters in the weights; call unmerge_adapter() first")

    def _check_whole(self) -> None:
        degrees = None if self.world is None else self.world.degrees
        if degrees is not None and max(degrees.tp, degrees.ep, degrees.pp) > 1:
            raise InputError(
                f"tp={degrees.tp}, ep={degrees.ep}, pp={degrees.pp} gave this process a part of "
                "the model, and an adapter is of whole matrices: put it on the model in one "
                "process, merge_and_unload() it, save_pretrained() that, and load the result in "
                "several"
            )

    def _whose(self, config: LoraConfig) -> str:
        """Describe the adapter's base model, and this one."""
        sizes = f"{self.config.num_hidden_layers} layers of {self.config.hidden_size}"
        this_model = (
            f"{self.name_or_path or 'not from a file'}, a {self.config.model_type} with {sizes}"
        )
        base = config.base_model_name_or_path
        origin = f"was trained on {shown(base)}" if base else "does not say what it was trained on"
        return f"The adapter {origin}; this model is {this_model}"

    def _layout(self) -> ModuleLayout:
        headless = self.base_model is self
        pairs = ((a.rpartition(".")[0], b.rpartition(".")[0]) for a, b in self.tied_names().items())
        heads = ["score", "qa_outputs", "lm_head"]
        return layout_of(
            self,
            layers=self.config.num_hidden_layers,
            prefix=f"{self.base_model_prefix}." if headless else "",
            tied=next((pair for pair in pairs if pair[0] == "lm_head"), None),
            heads=heads,
        )

"""The five families as one list: what each is made of, and what is said of all of them.

A test of `tests/conformance` runs for every entry; a sixth family is one more.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import quintet
import support
from families import deepseek, qwen2, qwen2_moe, zamba2

__all__ = ["FAMILIES", "HEADS", "WIDE", "Family", "each", "each_head", "each_variant"]

HEADS = (
    "Model",
    "ForCausalLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
SHARED_HEADS = HEADS[:3]
# Changes that make vectors long enough for all kernels.
WIDE: dict[str, dict[str, Any]] = {
    "qwen2": {"head_dim": 16},
    "qwen2-moe": {"head_dim": 16},
    "zamba2": {"hidden_size": 64, "mamba_d_state": 16},
    "deepseek-v2": {"kv_lora_rank": 32},
    "deepseek-v3": {"kv_lora_rank": 32},
}


def every_layer(config: Any) -> Sequence[int]:
    return range(config.num_hidden_layers)


def nowhere(config: Any) -> Sequence[int]:
    return ()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Family:
    """One family and how it is compared.

    Attributes:
        name: what its tests are called by.
        prefix: what the names of its classes begin with.
        config: makes our configuration of a small model.
        twins: makes a model of ours and one of Transformers with the same random weights, of a
            class, with changes to the configuration, and an attention backend of ours.
        randomise: gives a model weights at which an error shows.
        variants: changes to the configuration that together reach every branch.
        thorough: the variants that are compared under every padding and way.
        shallow: changes that leave one layer of each kind, where time is by the layer.
        heads_there: the heads that Transformers has too.
        ways: how attention is computed: by a backend, or absorbed (by sdpa) where that exists.
        attends: the layers with attention.
        routes: the layers with experts.
        compared: further outputs that Transformers has too.
        alone: changes where Transformers is not compared with.
        rounded: changes under which rounding cannot change which experts a token takes.
        exceptions: why a variant is left out of a padding, an output, or "splits" of a text.
    """

    name: str
    prefix: str
    config: Callable[..., Any]
    twins: Callable[[str, dict[str, Any], str], tuple[Any, Any]]
    randomise: Callable[[Any], Any]
    variants: Mapping[str, dict[str, Any]]
    thorough: tuple[str, ...]
    shallow: Mapping[str, Any] = field(default_factory=lambda: {"num_hidden_layers": 2})
    heads_there: tuple[str, ...] = SHARED_HEADS
    ways: tuple[str, ...] = ("eager", "sdpa")
    attends: Callable[[Any], Sequence[int]] = every_layer
    routes: Callable[[Any], Sequence[int]] = nowhere
    compared: tuple[str, ...] = ()
    alone: Mapping[str, Any] = field(default_factory=dict)
    rounded: Mapping[str, Any] = field(default_factory=dict)
    exceptions: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return self.name

    def cls(self, head: str) -> Any:
        """The class of a head, from where everyone imports it."""
        return getattr(quintet, self.prefix + head)

    def model_of(self, head: str = "ForCausalLM", **changes: Any) -> Any:
        """A model of ours with random weights, the same at every call."""
        torch.manual_seed(1)
        model = self.cls(head)(self.config(**{**self.alone, **changes})).eval()
        self.randomise(model)
        return model

    def backend(self, way: str, monkeypatch: pytest.MonkeyPatch) -> str:
        """Choose a way to compute attention, and return the backend that goes with it."""
        if "absorbed" in self.ways:
            deepseek.absorb(monkeypatch, way == "absorbed")
        return "sdpa" if way == "absorbed" else way

    def cells(self, variant: str) -> Iterator[tuple[str, str]]:
        """How a variant is padded and computed when Transformers is compared with."""
        paddings = [p for p in ("left", "right", "none") if (variant, p) not in self.exceptions]
        if variant in self.thorough:
            yield from ((padding, way) for padding in paddings for way in self.ways)
        else:
            yield from ((paddings[0], way) for way in self.ways if way != "eager")


def routed_deepseek(config: Any) -> Sequence[int]:
    return range(config.first_k_dense_replace, config.num_hidden_layers)


def routed_qwen2_moe(config: Any) -> Sequence[int]:
    if config.num_experts == 0:
        return ()
    step = config.decoder_sparse_step
    layers = range(step - 1, config.num_hidden_layers, step)
    return [i for i in layers if i not in config.mlp_only_layers]


def deepseek_family(name: str, prefix: str, **values: Any) -> Family:
    def twins(head: str, changes: dict[str, Any], backend: str) -> tuple[Any, Any]:
        # Transformers counts a prediction layer in every config, and has none.
        fixed = {"num_nextn_predict_layers": 0} if prefix == "DeepseekV3" else {}
        return deepseek.twins(prefix, head, {**fixed, **changes}, backend)

    return Family(
        name=name,
        prefix=prefix,
        config=lambda **changes: deepseek.config_of(prefix, **changes),
        twins=twins,
        randomise=deepseek.randomise,
        ways=("eager", "sdpa", "absorbed"),
        routes=routed_deepseek,
        compared=("router_logits",),
        rounded={"num_experts_per_tok": 8, "n_group": 4, "topk_group": 4},
        **values,
    )


FAMILIES = (
    Family(
        name="qwen2",
        prefix="Qwen2",
        config=support.small_config,
        twins=lambda head, changes, backend: support.twins(f"Qwen2{head}", changes, backend),
        randomise=qwen2.randomise,
        variants=qwen2.VARIANTS,
        thorough=("gqa", "sliding", "yarn-mscale"),
        heads_there=HEADS,
        exceptions={
            ("dynamic", "left"): "there a row's base follows the batch's longest row",
            ("dynamic", "right"): "there a row's base follows the batch's longest row",
            ("dynamic", "splits"): "the base follows the length, keys in a cache keep theirs",
        },
    ),
    Family(
        name="qwen2-moe",
        prefix="Qwen2Moe",
        config=qwen2_moe.small_config,
        twins=lambda head, changes, backend: qwen2_moe.twins(f"Qwen2Moe{head}", changes, backend),
        randomise=qwen2_moe.randomise,
        variants=qwen2_moe.VARIANTS,
        thorough=("gqa", "sliding", "every-second"),
        heads_there=HEADS,
        routes=routed_qwen2_moe,
        compared=("router_logits", "aux_loss"),
        rounded={"num_experts_per_tok": 6},
        exceptions={("dense", "router_logits"): "there it fails without a layer that has experts"},
    ),
    deepseek_family(
        "deepseek-v2",
        "DeepseekV2",
        variants=deepseek.V2_VARIANTS,
        thorough=("plain", "groups", "yarn"),
    ),
    deepseek_family(
        "deepseek-v3",
        "DeepseekV3",
        variants=deepseek.V3_VARIANTS,
        thorough=("plain", "rotated-halves", "yarn"),
        heads_there=HEADS[:4],
    ),
    Family(
        name="zamba2",
        prefix="Zamba2",
        config=zamba2.small_config,
        twins=lambda head, changes, backend: zamba2.twins(f"Zamba2{head}", changes, backend),
        randomise=zamba2.randomised,
        variants=zamba2.SHAPES,
        thorough=("7b", "2.7b", "bias"),
        shallow={"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"]},
        attends=lambda config: config.hybrid_layer_ids,
        # There, step sizes have a lower limit in prompts and none in steps.
        alone={"time_step_min": 0.2, "time_step_max": 1.0},
        exceptions={("bias", "left"): "there biases at padding get into a row's state"},
    ),
)

each = pytest.mark.parametrize("family", FAMILIES, ids=str)
each_head = pytest.mark.parametrize(
    ("family", "head"),
    [pytest.param(f, head, id=f"{f.name}-{head}") for f in FAMILIES for head in HEADS],
)


def each_variant(*, thorough: bool = False, but: str = "") -> pytest.MarkDecorator:
    """Run a test for every variant of every family, or for those that are compared thoroughly.

    Args:
        thorough: only the latter.
        but: leave out what is an exception from this.
    """
    return pytest.mark.parametrize(
        ("family", "variant"),
        [
            pytest.param(family, variant, id=f"{family.name}-{variant}")
            for family in FAMILIES
            for variant in (family.thorough if thorough else family.variants)
            if (variant, but) not in family.exceptions
        ],
    )

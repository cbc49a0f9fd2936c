"""Inputs of losses: final states and router outputs."""

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from quintet.errors import InputError
from quintet.layers.context import Notes
from quintet.layers.router import ExpertRouter
from quintet.modeling.base import PreTrainedModel
from quintet.modeling.heads import CausalLMHead
from quintet.modeling.moe import MoeCausalLMHead
from quintet.modeling.mtp import MtpCausalLMHead
from quintet.modeling.outputs import BaseModelOutputWithPast, MoeModelOutputWithPast
from quintet.ops.labels import IGNORED
from quintet.parallel.context_parallel import Chunks
from quintet.parallel.regions import reduced
from quintet.training.batch import Batch


@dataclass(frozen=True, slots=True)
class States:
    """The outputs of one run of a model without its head.

    Where other processes have the last layers, the states mean nothing.

    Attributes:
        hidden: (B, T, C), normalised, from which the head predicts the next token.
        ahead: the same of each prediction layer, for the tokens after that.
        router_logits: (B·T, E) of each layer with experts, those of prediction layers last. Of
            layers in other processes there are none.
        chunks: which of the tokens of rows these are of, where processes share rows; None for all.
    """

    hidden: Tensor
    ahead: tuple[Tensor, ...] = ()
    router_logits: tuple[Tensor, ...] = ()
    chunks: Chunks | None = None

    def own(self, x: Tensor, value: int = 0) -> Tensor:
        """Return this process's tokens of rows (B, T, ...), padded with `value`."""
        return x if self.chunks is None else self.chunks.of(x, value)


def language_model(model: PreTrainedModel) -> CausalLMHead:
    """Return a model that predicts tokens.

    Raises:
        InputError: it is another.
    """
    if not isinstance(model, CausalLMHead):
        raise InputError(
            f"a {type(model).__name__} predicts no tokens; an objective of texts needs a model "
            "with a language-modelling head, such as AutoModelForCausalLM makes"
        )
    return model


def states_of(model: CausalLMHead, batch: Batch, *, routed: bool = False, depth: int = 0) -> States:
    """Run a model over a batch, up to its head.

    Args:
        model: the model.
        batch: what it reads; texts in a row do not see each other, padding is left out. Where
            processes share rows, each runs over its tokens of them.
        routed: keep what the routers computed.
        depth: how many prediction layers it has that are to be run; 0 for none of them.

    Raises:
        InputError: the model has no experts, or another number of prediction layers.
    """
    options: dict[str, Any] = {}
    if routed:
        if not isinstance(model, MoeCausalLMHead):
            raise InputError(f"a {type(model).__name__} has no experts that could be balanced")
        options["output_router_logits"] = True
    if depth:
        found = model.prediction_depth() if isinstance(model, MtpCausalLMHead) else 0
        if found != depth:
            raise InputError(
                f"the objective is of {depth} prediction layers and the {type(model).__name__} has "
                f"{found}; give depth={found}" + ("" if found else ", that is, prediction=None")
            )
    if (sequences := model.sequences) is not None:
        output_states = sequences.states(
            batch.input_ids, batch.seq_idx, batch.attention_mask, depth, routed=routed
        )
        chunks = sequences.chunks(batch.input_ids.shape[1])
        return States(
            output_states.hidden, output_states.ahead, output_states.router_logits, chunks
        )
    output = cast(
        "BaseModelOutputWithPast",
        model.base_model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            seq_idx=batch.seq_idx,
            use_cache=False,
            output_hidden_states=depth > 0,
            return_dict=True,
            **options,
        ),
    )
    hidden = output.last_hidden_state
    main = output.router_logits if isinstance(output, MoeModelOutputWithPast) else None
    logits: tuple[Tensor, ...] = main or ()
    ahead: tuple[Tensor, ...] = ()
    if depth and model.ends_here and isinstance(model, MtpCausalLMHead):
        assert output.hidden_states is not None
        texts = model.texts(
            hidden, {"seq_idx": batch.seq_idx}, batch.attention_mask, None, None, use_cache=False
        )
        embeds = output.hidden_states[0]
        notes = Notes(router_logits=routed)
        ahead = tuple(
            model.model.look_ahead(hidden, embeds, batch.attention_mask, None, texts, notes)
        )
        logits += tuple(x.flatten(0, 1).to(hidden.device) for x in notes.router_logits or ())
    return States(hidden, ahead, logits)


def routers_run(model: CausalLMHead, depth: int) -> int:
    """Count the layers with experts that `states_of` runs, those in other processes too."""
    prediction_layers = (
        model.model.prediction_layers() if isinstance(model, MtpCausalLMHead) else []
    )
    idle = 0 if depth else sum(map(_routers, prediction_layers))
    return _routers(model) - idle


def _routers(module: nn.Module) -> int:
    return sum(isinstance(one, ExpertRouter) for one in module.modules())


def log_probs_of_rows(model: CausalLMHead, batch: Batch, targets: Tensor) -> Tensor:
    """Return log p of the targets (B, T) of each row, added up, (B,)."""
    states = states_of(model, batch)
    assert model.ends_here
    own = model.scored_head().sums(states.hidden, states.own(targets, IGNORED)).log_prob.sum(dim=1)
    return own if states.chunks is None else reduced(own, states.chunks.group)

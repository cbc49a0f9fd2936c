"""The outputs of `generate(return_dict_in_generate=True)`, and their recording."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from quintet.cache import Cache
from quintet.generation.config import GenerationConfig
from quintet.modeloutput import ModelOutput

__all__ = [
    "ForwardOutput",
    "GenerateBeamDecoderOnlyOutput",
    "GenerateDecoderOnlyOutput",
    "GenerationRecord",
    "Speculation",
]

# One tensor a layer.
Layers = tuple[Tensor, ...]


@dataclass(slots=True)
class Speculation:
    """Statistics of speculative decoding.

    Attributes:
        accepted: for each forward that checked a draft, how many tokens of each row it drafted
            and how many of those were taken; rows that had ended have (0, 0).
    """

    accepted: list[list[tuple[int, int]]] = field(default_factory=list)

    @property
    def drafted_tokens(self) -> int:
        """The number of drafted tokens."""
        return sum(drafted for turn in self.accepted for drafted, _ in turn)

    @property
    def accepted_tokens(self) -> int:
        """The number of accepted tokens."""
        return sum(accepted for turn in self.accepted for _, accepted in turn)

    def of_row(self, row: int) -> tuple[int, int]:
        """Return the number of drafted and accepted tokens of a row."""
        turns = [turn[row] for turn in self.accepted]
        return sum(drafted for drafted, _ in turns), sum(accepted for _, accepted in turns)

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that were accepted; 0 without drafts."""
        return self.accepted_tokens / max(1, self.drafted_tokens)

    @property
    def tokens_per_forward(self) -> float:
        """The mean number of tokens per row and verifying forward."""
        turns = sum(1 for turn in self.accepted for drafted, _ in turn if drafted)
        return 1 + self.accepted_tokens / turns if turns else 1.0


@dataclass(eq=False)
class GenerateDecoderOnlyOutput(ModelOutput):
    """Sequences (B, T + new) and, per step, the requested values.

    Shapes: scores and logits (B, V), after and before the processors; attentions (B, H, T, S) and
    hidden_states (B, T, C) of every layer, T the prompt in the first step and 1 in the others.
    `speculation` tells how many drafted tokens were taken, where some were drafted.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    attentions: tuple[Layers, ...] | None = None
    hidden_states: tuple[Layers, ...] | None = None
    past_key_values: Cache | None = None
    speculation: Speculation | None = None


@dataclass(eq=False)
class GenerateBeamDecoderOnlyOutput(ModelOutput):
    """Sequences of a beam search, best first per prompt, and the requested values.

    Shapes: sequences (B·returned, T + new); sequences_scores (B·returned,) log-probabilities over
    length to the power of the length penalty; beam_indices (B·returned, new) the row of B·beams
    that each token was added to, -1 behind the end; the others as without beams, for B·beams rows.
    """

    sequences: Tensor
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    attentions: tuple[Layers, ...] | None = None
    hidden_states: tuple[Layers, ...] | None = None
    past_key_values: Cache | None = None


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """The output of one forward.

    Shapes: logits (B, P, V) of the last P positions; attentions and hidden states of every layer,
    where they were asked for.
    """

    logits: Tensor
    attentions: Layers | None
    hidden_states: Layers | None

    def at(self, place: int, new: int) -> "ForwardOutput":
        """Return the output for the token at `place` of `new`."""

        def seen(weights: Tensor) -> Tensor:
            keys = weights.shape[-1] - new + place + 1
            return weights[:, :, place : place + 1, :keys]

        weights, states = self.attentions, self.hidden_states
        return ForwardOutput(
            self.logits[:, place : place + 1],
            None if weights is None else tuple(seen(layer) for layer in weights),
            None if states is None else tuple(x[:, place : place + 1] for x in states),
        )

    def repeat(self, copies: int) -> "ForwardOutput":
        """Repeat every row, copies side by side."""
        if copies == 1:
            return self
        return ForwardOutput(
            self.logits.repeat_interleave(copies, dim=0),
            _repeated(self.attentions, copies),
            _repeated(self.hidden_states, copies),
        )


@dataclass(slots=True)
class GenerationRecord:
    """The values that a generation records per step; lists that are not None."""

    scores: list[Tensor] | None = None
    logits: list[Tensor] | None = None
    attentions: list[Layers] | None = None
    hidden_states: list[Layers] | None = None
    wanted: bool = False

    @classmethod
    def of(cls, config: GenerationConfig) -> "GenerationRecord":
        """Return the record that a config requests."""
        if not config.return_dict_in_generate:
            return cls()
        return cls(
            scores=[] if config.output_scores else None,
            logits=[] if config.output_logits else None,
            attentions=[] if config.output_attentions else None,
            hidden_states=[] if config.output_hidden_states else None,
            wanted=True,
        )

    def forward(self, output: ForwardOutput) -> None:
        """Record a forward's output."""
        if self.logits is not None:
            # A processor of the caller's may write into what it is given.
            self.logits.append(output.logits[:, -1].float().clone())
        if self.attentions is not None and output.attentions is not None:
            self.attentions.append(output.attentions)
        if self.hidden_states is not None and output.hidden_states is not None:
            self.hidden_states.append(output.hidden_states)

    def seen_scores(self) -> tuple[Tensor, ...] | None:
        """Return the scores of all steps so far, for stopping criteria."""
        return None if self.scores is None else tuple(self.scores)

    def fields(self) -> dict[str, Any]:
        """Return the recorded lists under the outputs' field names."""
        recorded = {
            "scores": self.scores,
            "logits": self.logits,
            "attentions": self.attentions,
            "hidden_states": self.hidden_states,
        }
        return {name: tuple(steps) for name, steps in recorded.items() if steps is not None}


def _repeated(layers: Layers | None, copies: int) -> Layers | None:
    if layers is None:
        return None
    return tuple(layer.repeat_interleave(copies, dim=0) for layer in layers)

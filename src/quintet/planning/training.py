"""Training on each device of a split: bytes, and seconds per step.

Of each parameter there is a number in float32 that is stepped (4 bytes), a gradient (4, or 2 where
it is kept in 16 bits) and what the optimiser keeps (8 by AdamW, 4 of a matrix by Muon), all in
slices among `fsdp` groups. Products in bfloat16 want a rounded copy: of two layers at a time where
parameters are in slices, for the next is gathered while one runs; else of all.

A step of N tokens a device multiplies forward, and twice that backward; a layer that is recomputed
goes forward once more. Sequence parallelism keeps 1/tp of what norms between matrices read, and
sends as much as the sums in whose place it gathers and scatters. FSDP gathers parameters forward
and backward and scatters gradients, 3 · P numbers; stages wait (pp - 1) of (m + pp - 1) rounds of m
parts each (1F1B). What is expected is all of that in turn, at most is as if all overlapped at the
peaks.
"""

import re
from dataclasses import dataclass
from typing import Literal

from quintet.errors import InputError
from quintet.measurement.flops import attention_flops
from quintet.planning.activations import expert_numbers, numbers_per_map, numbers_per_scan
from quintet.planning.communication import Network
from quintet.planning.inference import EXCHANGED, DecodePace, sums_of
from quintet.planning.shares import PlannedModel, StageShare
from quintet.planning.weights import EMBEDDING, ROUTED
from quintet.planning.world import Split

MASTER = 4
# Of the loss, so many logits are there at once, in float32 with their gradient.
LOGITS = 2**22
# What a layer has outside the matrices that tp cuts: norms, and Zamba2's map behind a block.
_BETWEEN = re.compile(r"layers\.\d+\.(mamba_decoder\.)?(\w*layernorm|linear)\.weight$")


@dataclass(frozen=True, slots=True)
class Training:
    """A training's settings.

    Attributes:
        context: tokens of a row.
        rows: rows of a step, in all groups together.
        part_rows: rows of a group that go through a stage at once.
        itemsize: bytes of what products are of: 2 of bfloat16 beside masters, 4 of float32.
        gradient: bytes of a gradient that is kept.
        optimizer: adamw, or muon for matrices of layers.
        recompute: whether of a layer nothing but its input is kept.
        sequence_parallel: whether norms and residuals are of a slice of the tokens on each of tp.
        kernels: whether the project's kernels for CPUs run, which keep less.
    """

    context: int
    rows: int
    part_rows: int = 1
    itemsize: int = 2
    gradient: int = 4
    optimizer: Literal["adamw", "muon"] = "adamw"
    recompute: bool = False
    sequence_parallel: bool = False
    kernels: bool = False

    def parts(self, split: Split) -> int:
        """Return the number of parts in which a group has its rows."""
        return max(1, -(-self.rows // split.groups // self.part_rows))

    def tokens(self, split: Split) -> int:
        """Return the tokens of a part."""
        return min(self.part_rows, -(-self.rows // split.groups)) * self.context

    def check(self, split: Split) -> None:
        """Refuse a split that these settings do not go with, as a training would.

        Raises:
            InputError: it is one; it says what goes.
        """
        if not self.sequence_parallel:
            return
        if split.tp == 1:
            raise InputError(
                "sequence parallelism divides tokens among the devices of tp, and tp=1 leaves all "
                "to one; let tp be more, or leave it out"
            )
        if split.exchanges:
            raise InputError(
                f"sequence parallelism leaves experts the tokens of tp={split.tp} devices, and "
                f"ep={split.ep} sends them to others; let ep be at most tp"
            )
        if split.pp > 1 and self.recompute:
            raise InputError(
                f"sequence parallelism does not go with recomputed layers in pp={split.pp} stages; "
                "leave one of the three out"
            )


@dataclass(frozen=True, slots=True)
class TrainingFootprint:
    """The memory of the device that needs the most, in bytes.

    Attributes:
        weights: the numbers that are stepped.
        gradients: of these.
        optimizer: what the optimiser keeps.
        copies: rounded or gathered weights, and the gradients of one layer of them.
        activations: what the backward pass needs.
        logits: of the loss.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        states = self.weights + self.gradients + self.optimizer
        return states + self.copies + self.activations + self.logits


def training_footprint(model: PlannedModel, split: Split, work: Training) -> TrainingFootprint:
    """Return the memory of the device that needs the most.

    Raises:
        InputError: the model cannot be split so.
    """
    work.check(split)
    found = []
    stages = model.stages(split)
    for number, stage in enumerate(stages):
        parameters = stage.share.others / split.fsdp + stage.share.routed / split.expert_fsdp
        # Until its backward comes, a stage keeps as many parts as there are stages behind it.
        waiting = min(work.parts(split), split.pp - number)
        last = number == split.pp - 1
        found.append(
            TrainingFootprint(
                weights=round(MASTER * parameters),
                gradients=round(work.gradient * parameters),
                optimizer=round(_optimizer(stage, split, work)),
                copies=_copies(stage, split, work),
                activations=waiting * _activations(model, stage, split, work),
                logits=_logits(model, split, work) if last else 0,
            )
        )
    return max(found, key=lambda one: one.total)


def _optimizer(stage: StageShare, split: Split, work: Training) -> float:
    size = 0.0
    for kind, count in stage.share.counts.items():
        matrices = work.optimizer == "muon" and kind != EMBEDDING
        shared = split.expert_fsdp if kind == ROUTED else split.fsdp
        size += (4 if matrices else 8) * count / shared
    return size


def _copies(stage: StageShare, split: Split, work: Training) -> int:
    whole = stage.share.others + stage.share.routed
    if split.fsdp == 1 and split.expert_fsdp == 1:
        return whole * work.itemsize if work.itemsize < MASTER else 0
    outside = stage.share.counts[EMBEDDING]
    if split.pp > 1:
        # Between the parts of a step, weights are not given up.
        return whole * work.itemsize + stage.largest * work.itemsize
    layers = min(2, len(stage.layers)) * stage.largest
    return (layers + outside) * work.itemsize + (stage.largest + outside) * work.itemsize


def _activations(model: PlannedModel, stage: StageShare, split: Split, work: Training) -> int:
    tokens, width = work.tokens(split), model.config.hidden_size
    all_layers = model.remembered(
        ("kept", split.tp, split.ep, work.kernels, work.sequence_parallel),
        lambda: [
            _numbers(model, layer, split, work) for layer in range(model.config.num_hidden_layers)
        ],
    )
    per_layer = [all_layers[layer] for layer in stage.layers]
    slices = split.tp if work.sequence_parallel else 1
    stored = width / slices * len(per_layer) + max(per_layer) if work.recompute else sum(per_layer)
    # Around the layers: vectors of ids, and the last norm's input and output, in float32.
    around = (2 + 1 / slices) * width
    return round(tokens * (stored * work.itemsize + around * 4))


def _numbers(model: PlannedModel, layer: int, split: Split, work: Training) -> float:
    """Return the numbers kept per token in a layer on a device."""
    stored = 0.0
    for weight in model.of_layer(layer):
        shape = model.part(weight, split)
        if weight.kind == ROUTED:
            if len(shape) == 3 and weight.name.endswith("down_proj"):
                # As many of a token's experts as there are here on average.
                sent = model.active * (1 / split.tp if split.exchanges else 1 / split.ep)
                stored += numbers_per_map(work.kernels) * sent * expert_numbers(shape[1], shape[2])
        elif len(shape) == 2 and not weight.name.endswith("mlp.gate.weight"):
            share = weight.uses / len(weight.layers) if weight.uses else 0.0
            stored += numbers_per_map(work.kernels) * sum(shape) * share
        elif weight.name.endswith("mamba.norm.weight"):
            stored += numbers_per_scan(work.kernels) * shape[0]
        if work.sequence_parallel and _BETWEEN.search(weight.name):
            # What it reads, of which what is kept of maps counts all.
            stored -= (1 - 1 / split.tp) * weight.shape[-1]
    return stored


def _logits(model: PlannedModel, split: Split, work: Training) -> int:
    vocabulary = -(-model.config.vocab_size // split.tp)
    return 2 * 4 * min(work.tokens(split) * vocabulary, max(LOGITS, vocabulary))


def step(model: PlannedModel, split: Split, work: Training, network: Network) -> DecodePace:
    """Estimate a step, in tokens of all groups."""
    device, tokens, parts = network.device, work.tokens(split), work.parts(split)
    expected: dict[str, float] = {}
    least: dict[str, float] = {}
    for stage in model.stages(split):
        products = _products(model, stage, split, work) * tokens / device.flops
        sums = _sums(model, stage, split, work, network)
        exchange = _exchange(model, stage, split, work, network)
        costs_of_part = {"products": products / device.reached, "sums": sums, "exchange": exchange}
        once = {"gathers": _gathers(stage, split, work, network)}
        bubble = (split.pp - 1) / parts * sum(costs_of_part.values())
        costs = {
            **{k: v * parts for k, v in costs_of_part.items()},
            **once,
            "bubble": bubble * parts,
        }
        if sum(costs.values()) > sum(expected.values()):
            expected = costs
            least = {**costs, "products": products * (parts + split.pp - 1)}
            del least["bubble"]
    done = split.groups * parts * tokens
    return DecodePace(float(done), expected, least)


def _products(model: PlannedModel, stage: StageShare, split: Split, work: Training) -> float:
    """Return the operations of a token on one device."""
    share, config = stage.share, model.config
    groups = split.ep / split.tp if split.exchanges else 1.0
    chosen = model.active / model.experts * groups if model.experts else 0.0
    weights = sum(share.products.values()) + chosen * sum(share.routed_products.values())
    beside = attention_flops(config, work.context / 2) * len(stage.layers)
    beside /= config.num_hidden_layers * split.tp
    return (2 * weights + beside) * (4 if work.recompute else 3)


def _sums(
    model: PlannedModel, stage: StageShare, split: Split, work: Training, network: Network
) -> float:
    if split.tp == 1:
        return 0.0
    states = work.tokens(split) * model.config.hidden_size * work.itemsize
    count = sum(sums_of(model.config, layer) for layer in stage.layers)
    # As many again backward, where each device's part of an input's gradient adds up.
    return count * network.all_reduce(states, split.tp) * (3 if work.recompute else 2)


def _exchange(
    model: PlannedModel, stage: StageShare, split: Split, work: Training, network: Network
) -> float:
    if not split.exchanges:
        return 0.0
    own = work.tokens(split) / split.tp
    sent = own * model.active * model.config.hidden_size * EXCHANGED
    layers = sum(layer in model.routed_layers for layer in stage.layers)
    return layers * network.exchange(sent, split.ep) * (3 if work.recompute else 2)


def _gathers(stage: StageShare, split: Split, work: Training, network: Network) -> float:
    """Return the seconds of gathering parameters and scattering gradients."""
    seconds = 0.0
    stride = split.tp
    parts = 1 if split.pp > 1 else work.parts(split)
    for numbers, count in (
        (stage.share.others, split.fsdp),
        (stage.share.routed, split.expert_fsdp),
    ):
        nbytes = numbers * work.itemsize
        gathered = network.gather(nbytes, count, stride)
        scattered = network.gather(numbers * work.gradient, count, stride)
        seconds += 2 * parts * gathered + scattered
    if split.dp > 1:
        parameters = stage.share.others / split.fsdp + stage.share.routed / split.expert_fsdp
        seconds += 2 * network.gather(parameters * work.gradient, split.dp, stride * split.fsdp)
    return seconds

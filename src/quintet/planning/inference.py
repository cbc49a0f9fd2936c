"""Inference on each device of a split: bytes, and seconds per step.

A step of N tokens reads the weights that they meet and the cache behind them, multiplies, and waits
for other devices. What is expected is all of that in turn, products at the share of a device's peak
that large ones reach; at most, all of it overlaps and products run at the peak. What programs are
measured at lies between.

- Routed experts are hit evenly: of E, N tokens with A each leave (1 - A/E)^N untouched.
- A layer's sums among t devices move 2(t - 1)/t · N · C numbers through each.
- An exchange among p devices sends each token's A vectors in FP8 and returns them in 16 bits, 3
  bytes a number (V3 §3.2.2); that tokens go to few nodes, and once to each, is not counted.
- Stages work at once on as many parts of the rows as there are stages, or as there are rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from quintet.measurement.flops import attention_flops
from quintet.models.deepseek_v2 import DeepseekV2Config
from quintet.models.deepseek_v3 import DeepseekV3Config
from quintet.models.zamba2 import Zamba2Config
from quintet.planning.caches import cache_layers, draft_bytes, token_bytes
from quintet.planning.communication import Network
from quintet.planning.shares import PlannedModel, StageShare
from quintet.planning.world import Split, World

# Bytes of an exchanged number, there and back.
EXCHANGED = 3


@dataclass(frozen=True, slots=True)
class Workload:
    """The lengths and numbers of requests.

    Attributes:
        context: tokens of a row, prompt and answer.
        rows: rows at once, in all groups together.
        step_tokens: the most tokens of prompts that a device runs over at once.
        itemsize: bytes of a number of the hidden states.
        cache_dtype: what the cache keeps numbers in.
        predicts: whether prediction layers draft.
    """

    context: int
    rows: int = 1
    step_tokens: int = 2048
    itemsize: int = 2
    cache_dtype: str = "bfloat16"
    predicts: bool = False

    def rows_of(self, split: Split) -> int:
        """Return the rows of one group."""
        return -(-self.rows // split.groups)


@dataclass(frozen=True, slots=True)
class Footprint:
    """The memory of the device that needs the most, in bytes.

    Attributes:
        kinds: of weights, by kind.
        token: of the cache, for each token of each row of a group.
        row: of the cache, for each row besides.
        cache: of the rows asked for.
        working: of hidden states, the widest layer's numbers and logits of a step.
    """

    kinds: Mapping[str, int]
    token: float
    row: int
    cache: int
    working: int

    @property
    def weights(self) -> int:
        """The sum over all kinds."""
        return sum(self.kinds.values())

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.working

    def rows_in(self, room: float, context: int) -> int:
        """Return the number of a group's rows that a cache of `room` bytes has."""
        per_row = self.token * context + self.row
        return int(max(room, 0) // per_row) if per_row else 0

    def tokens_in(self, room: float) -> int:
        """Return the number of one row's tokens that a cache of `room` bytes has."""
        return int(max(room - self.row, 0) // self.token) if self.token else 0


@dataclass(frozen=True, slots=True)
class DecodePace:
    """A speed, with its time by component.

    Attributes:
        tokens: how many are made or read in a round, by all devices.
        expected: seconds of a round by their cause, one after the other.
        least: the same at the peaks; the longest is the bound.
    """

    tokens: float
    expected: Mapping[str, float]
    least: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """The expected seconds of a round."""
        return sum(self.expected.values())

    @property
    def tokens_per_second(self) -> float:
        """The expected tokens per second."""
        return self.tokens / self.seconds

    @property
    def at_most(self) -> float:
        """Tokens a second if all overlaps."""
        return self.tokens / max(self.least.values())

    def nodes(self, tokens_per_second: float, world: World) -> float:
        """Return the number of nodes like those of `world` that this pace needs."""
        return tokens_per_second / self.tokens_per_second * world.nodes

    @property
    def bound(self) -> str:
        """The kind of cost that takes longest at the peaks."""
        return max(self.least, key=lambda cause: self.least[cause])


def footprint(model: PlannedModel, split: Split, work: Workload) -> Footprint:
    """Return the memory of the device that needs the most.

    Raises:
        InputError: the model cannot be split so, or drafts by layers that it does not have.
    """
    layers = cache_layers(model.config, split.tp)
    drafts = draft_bytes(model.config, work.itemsize) if work.predicts else 0
    found = []
    for number, stage in enumerate(model.stages(split)):
        token = sum(token_bytes(layers[i], work.cache_dtype) for i in stage.layers)
        if number == split.pp - 1:
            # Whose states prediction layers read.
            token += drafts
        row = 4 * sum(layers[i].state for i in stage.layers)
        rows = work.rows_of(split)
        step = min(work.step_tokens, rows * work.context)
        # States twice, and the widest map's.
        numbers = 2 * model.config.hidden_size + model.widest(split)
        working = step * numbers * work.itemsize
        if number == split.pp - 1:
            # Logits are gathered for the choice of a token, in float32.
            working += rows * model.config.vocab_size * 4
        cache = round(rows * (token * work.context + row))
        kinds = {kind: n for kind, n in stage.share.nbytes.items() if n}
        found.append(Footprint(kinds, token, row, cache, working))
    return max(found, key=lambda one: one.total)


def decode(model: PlannedModel, split: Split, work: Workload, network: Network) -> DecodePace:
    """Estimate decoding, each row at the end of its context."""
    rows = work.rows_of(split)
    parts = min(split.pp, rows)
    rows_of_part = -(-rows // parts)
    layers = cache_layers(model.config, split.tp)
    slowest = _Step(model, split, work, network, rows_of_part, work.context, absorbed=True)
    costs = []
    for stage in model.stages(split):
        elements = sum(
            token_bytes(layers[i], work.cache_dtype) * work.context + 8 * layers[i].state
            for i in stage.layers
        )
        costs.append(slowest.costs(stage, rows_of_part * elements, logits=rows_of_part))
    expected, least = _longest(costs)
    # A token has been through all stages before its row's next one begins.
    return DecodePace(float(work.rows), _times(expected, split.pp), _times(least, split.pp))


def prefill(model: PlannedModel, split: Split, work: Workload, network: Network) -> DecodePace:
    """Estimate prefill, one piece after the other per group."""
    tokens = min(work.step_tokens, work.context * work.rows_of(split))
    step = _Step(model, split, work, network, tokens, work.context / 2, absorbed=False)
    costs = [step.costs(stage, 0.0, logits=1) for stage in model.stages(split)]
    expected, least = _longest(costs)
    groups = min(split.groups, work.rows)
    return DecodePace(float(groups * tokens), expected, least)


def moved(model: PlannedModel, split: Split, work: Workload) -> float:
    """Return the bytes that pass through a device in a layer on average, for each token."""
    t, p, width = split.tp, split.ep, model.config.hidden_size
    layers = model.config.num_hidden_layers
    sums = sum(sums_of(model.config, layer) for layer in range(layers))
    routed = len(model.routed_layers) if split.exchanges else 0
    # An exchange takes the place of a sum, and half of it to gather what came back.
    nbytes = 2 * (t - 1) / t * width * work.itemsize * (sums - routed / 2)
    nbytes += routed * model.active * width * EXCHANGED * (p - 1) / p / t
    return nbytes / layers


Costs = tuple[Mapping[str, float], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class _Step:
    """A step of one group: `tokens` at once, each of which sees `seen`."""

    model: PlannedModel
    split: Split
    work: Workload
    network: Network
    tokens: int
    seen: float
    absorbed: bool

    def costs(self, stage: StageShare, cached: float, logits: int) -> Costs:
        """Return the seconds of a stage by their causes: expected, and at the least."""
        device = self.network.device
        memory = self._read(stage) / device.bandwidth
        cache = cached / device.bandwidth
        products = self._products(stage)
        shared = {
            "weights": memory,
            "cache": cache,
            "sums": self._sums(stage, logits),
            "exchange": self._exchange(stage),
            "stages": self._send(),
        }
        expected = {**shared, "products": products / device.reached}
        del shared["weights"], shared["cache"]
        return expected, {**shared, "memory": memory + cache, "products": products}

    def _read(self, stage: StageShare) -> float:
        return stage.share.read + stage.share.routed_read * self.model.hit(self._met())

    def _met(self) -> float:
        """Return the number of tokens that the experts of this device may be sent."""
        groups = self.split.ep // self.split.tp if self.split.exchanges else 1
        return self.tokens * groups

    def _products(self, stage: StageShare) -> float:
        """Return the seconds of products at a device's peak."""
        device, model, share = self.network.device, self.model, stage.share
        chosen = model.active / model.experts if model.experts else 0.0
        rates = {False: device.flops, True: device.fp8 or device.flops}
        seconds = 0.0
        for in_fp8, rate in rates.items():
            routed = share.routed_products[in_fp8] * chosen * self._met()
            seconds += 2 * (share.products[in_fp8] * self.tokens + routed) / rate
        attention = self.tokens * self._attention() * len(stage.layers)
        attention /= model.config.num_hidden_layers * self.split.tp
        return seconds + attention / device.flops

    def _attention(self) -> float:
        """Return the operations of attention and recurrences for one token, in all layers."""
        config = self.model.config
        if self.absorbed and isinstance(config, DeepseekV2Config | DeepseekV3Config):
            heads, rank = config.num_attention_heads, config.kv_lora_rank
            return (
                2
                * config.num_hidden_layers
                * heads
                * self.seen
                * (2 * rank + config.qk_rope_head_dim)
            )
        return attention_flops(config, self.seen)

    def _sums(self, stage: StageShare, logits: int) -> float:
        t, config = self.split.tp, self.model.config
        if t == 1:
            return 0.0
        states = self.tokens * config.hidden_size * self.work.itemsize
        per_sum = self.network.all_reduce(states, t)
        seconds = per_sum * sum(sums_of(config, i) for i in stage.layers)
        if self.split.exchanges:
            # What was exchanged is gathered, where a sum would have been.
            gathered = self.network.gather(states, t)
            seconds -= (per_sum - gathered) * self._routed_layers(stage)
        if 0 in stage.layers:
            seconds += per_sum
        if config.num_hidden_layers - 1 in stage.layers:
            seconds += self.network.gather(logits * config.vocab_size * 4, t)
        return seconds

    def _exchange(self, stage: StageShare) -> float:
        if not self.split.exchanges:
            return 0.0
        own = self.tokens / self.split.tp
        sent = own * self.model.active * self.model.config.hidden_size * EXCHANGED
        return self._routed_layers(stage) * self.network.exchange(sent, self.split.ep)

    def _routed_layers(self, stage: StageShare) -> int:
        return sum(layer in self.model.routed_layers for layer in stage.layers)

    def _send(self) -> float:
        if self.split.pp == 1:
            return 0.0
        nbytes = self.tokens * self.model.config.hidden_size * self.work.itemsize
        return self.network.send(nbytes / self.split.tp, self.split.tp * self.split.dp)


def sums_of(config: object, layer: int) -> int:
    """Return the number of sums over tensor-parallel processes in a layer."""
    if isinstance(config, Zamba2Config):
        return 3 if layer in config.hybrid_layer_ids else 1
    return 2


def _longest(costs: list[Costs]) -> Costs:
    return max((c[0] for c in costs), key=lambda c: sum(c.values())), max(
        (c[1] for c in costs), key=lambda c: max(c.values())
    )


def _times(costs: Mapping[str, float], count: int) -> Mapping[str, float]:
    return {cause: seconds * count for cause, seconds in costs.items()}

"""Whatever texts a step has, and wherever they are kept, each goes through the recurrence alone."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet import DynamicCache
from quintet.backends import REGISTRY
from quintet.cache import PooledCache
from quintet.kernels.ssm import MixerWeights
from quintet.ops.conv import causal_conv, continued
from quintet.ops.mamba2 import Mixed, heads_and_groups, mix_stepwise
from quintet.ops.ssd import recurrence, step_sizes

pytest.importorskip("triton", reason="Triton is made for Linux")

from families import zamba2
from on_triton.mamba2 import BF16, F16, F32, Scene, inputs
from quintet.triton import mamba2 as kernels
from quintet.triton.backend import BACKEND
from quintet.triton.texts import Texts
from support import relative_error

CPU = torch.device("cpu")
UNIT = {F32: 2.0**-24, BF16: 2.0**-9, F16: 2.0**-11}
# Of so many roundings of what does not cancel; of five hundred scenes, the worst had 3.9.
ROUNDINGS = 8


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    counts = st.sampled_from([0, 1, 2, 5, 16, 17, 31, 32, 33, 64, 65, 70])
    tokens = draw(st.lists(counts, min_size=1, max_size=3).filter(any))
    G, each = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    rows = draw(st.none() | st.permutations(range(5)))
    nowhere = draw(st.integers(0, 5))
    return Scene(
        tokens=tokens,
        heads=(G * each, draw(st.sampled_from([3, 16, 20])), G, draw(st.sampled_from([2, 16, 24]))),
        taps=draw(st.integers(1, 4)),
        dtype=draw(st.sampled_from([F32, BF16, F16])),
        rows=rows and [-1 if i == nowhere else row for i, row in enumerate(rows[: len(tokens)])],
        kept=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


def sizes(
    projected: Tensor, weights: MixerWeights, window: Tensor, state: Tensor, tiny: float
) -> tuple[Mixed, Tensor, Tensor]:
    """Return what a text makes, and how large that and the state may be if nothing cancels.

    What is added up is taken for its magnitude, and no less than the smallest normal number is,
    below which roundings do not become smaller. The logarithm u of a decay is rounded, too, by
    which the decay is off by u roundings; (1 + u)·exp(-u) < 1.3·exp(-u/2).
    """
    made = mix_stepwise(projected, weights, window.clone(), state.clone(), None, chunk_size=64)
    z, raw, dt = torch.split(projected, [len(weights.norm), len(weights.taps), len(weights.D)], -1)
    bias = None if weights.conv_bias is None else weights.conv_bias.abs()
    wide = continued(raw.abs(), window.abs(), weights.taps.shape[1])
    convolved = causal_conv(wide, weights.taps.abs(), bias) + tiny
    steps = step_sizes(dt, weights.dt_bias, weights.dt_limits, None)
    A = -weights.A_log.exp()
    (x, b, c), (of_x, of_b, of_c) = (
        heads_and_groups(one, weights) for one in (made.convolved, convolved)
    )
    y, _ = recurrence(x, steps, A, b, c, weights.D, state)
    of_y, largest = recurrence(of_x, steps, A / 2, of_b, of_c, weights.D.abs(), state.abs())
    gate, G = F.silu(z), weights.num_groups
    gated, of_gated = (
        torch.unflatten(one, -1, (G, -1))
        for one in (y.flatten(2) * gate, of_y.flatten(2) * gate.abs())
    )
    # What all are divided by is off by the mean of what each of its squares is off by.
    square = gated.square().mean(-1, keepdim=True) + weights.eps
    of_norm = gated.abs() * (of_gated * gated.abs()).mean(-1, keepdim=True) / square
    size = ((of_gated + of_norm) / square.sqrt()).flatten(2) * weights.norm.abs()
    return made, size + made.out.abs() + tiny, largest + tiny


def doubles(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) else x


def roundings(made: Tensor, right: Tensor, size: Tensor, dtype: torch.dtype) -> float:
    """Return of how many roundings of what does not cancel the difference is, at the most."""
    return float(((made - right).abs() / (UNIT[dtype] * size)).max()) if len(made) else 0.0


@given(scenes())
@settings(max_examples=12)
@torch.no_grad()
def test_any_texts_on_any_rows(scene: Scene) -> None:
    given_ = dict(inputs(CPU, scene=scene))
    weights = MixerWeights(*map(doubles, given_["weights"]))
    (H, P, _, N), (C, W) = scene.heads, weights.taps.shape
    before = [doubles(given_[name]) for name in ("window", "state")]
    mixed = kernels.mix_texts(**given_)
    assert mixed is not None
    made = mixed[0]
    assert made.dtype == scene.dtype
    untouched = set(range(len(before[0]) if scene.kept else 0))
    for i, (begin, end) in enumerate(pairwise(given_["texts"].ends.tolist())):
        row = i if scene.rows is None else scene.rows[i]
        held = scene.kept and row >= 0
        window, state = torch.zeros(1, W - 1, C).double(), torch.zeros(1, H, P, N).double()
        if held:
            window, state = (x[row, None] for x in before)
        if end == begin:
            continue
        own = given_["projected"][None, begin:end].double()
        right, size, largest = sizes(own, weights, window, state, torch.finfo(scene.dtype).tiny)
        assert roundings(made[begin:end], right.out[0], size[0], scene.dtype) <= ROUNDINGS
        if held:
            untouched.remove(row)
            now = given_["state"][row]
            assert torch.equal(given_["window"][row].double(), right.window[0])
            assert roundings(now, right.state[0], largest[0], scene.dtype) <= ROUNDINGS
    for row in untouched:
        for name, old in zip(("window", "state"), before, strict=True):
            assert torch.equal(given_[name][row].double(), old[row])


@torch.no_grad()
def test_a_text_does_not_see_the_others() -> None:
    scene = Scene([40, 3, 1], rows=(2, 0, 1), dtype=BF16)
    together, alone = dict(inputs(CPU, scene=scene)), dict(inputs(CPU, scene=scene))
    made = kernels.mix_texts(**together)
    assert made is not None
    for i, (begin, end) in enumerate(pairwise(together["texts"].ends.tolist())):
        ends = torch.tensor([0, end - begin]).int()
        one = Texts(1, end - begin, ends, together["texts"].rows[i : i + 1])
        own = kernels.mix_texts(
            **{**alone, "texts": one, "projected": alone["projected"][begin:end]}
        )
        assert own is not None
        assert all(torch.equal(x, y[begin:end]) for x, y in zip(own, made, strict=True))
    for name in ("window", "state"):
        assert torch.equal(alone[name], together[name])


@pytest.mark.parametrize(
    "change",
    [
        lambda g: {"projected": g["projected"].double()},
        lambda g: {"projected": g["projected"][:, 1:]},
        lambda g: {"state": g["state"].bfloat16()},
        lambda g: {"state": g["state"].mT.contiguous().mT},
        lambda g: {"window": g["window"][:, 1:]},
        lambda g: {"window": None},
        lambda g: {"weights": g["weights"]._replace(num_groups=3)},
        lambda g: {"texts": Texts(3, 5, g["texts"].ends.long())},
    ],
    ids=["float64", "narrow", "rounded states", "turned", "short", "half", "groups", "int64"],
)
@torch.no_grad()
def test_what_it_was_not_written_for_is_left_to_the_definition(change: Any) -> None:
    known = dict(inputs(CPU, scene=Scene([5, 2, 1])))
    assert kernels.mix_texts(**known | change(known)) is None
    assert kernels.mix_texts(**known) is not None


@torch.no_grad()
def test_a_whole_zamba2(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("QUINTET_KERNELS", "0")
    two = {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"]}
    model = zamba2.model_of(**two, mamba_ngroups=2).bfloat16()
    ids = torch.randint(1, 101, (2, 24), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 21).long()
    mask[0, :17] = 0

    def logits() -> list[Tensor]:
        made = [model(ids[:, :21], attention_mask=mask, use_cache=True)]
        for at in range(21, 24):
            step = model(ids[:, at : at + 1], past_key_values=made[0].past_key_values)
            made.append(step)
        return [one.logits[mask.bool()] if i == 0 else one.logits for i, one in enumerate(made)]

    calls: list[int] = []

    def counted(*given: Any) -> Any:
        calls.append(given[5].most)
        return through(*given)

    through = kernels.through_states
    fresh.setattr(kernels, "through_states", counted)
    right = logits()
    assert not calls
    with REGISTRY.registered(BACKEND):
        made = logits()
    assert calls
    for one, other in zip(made, right, strict=True):
        assert relative_error(one, other) <= 2**-5


@pytest.mark.parametrize("cache", ["dynamic", "pool"])
@torch.no_grad()
def test_texts_in_a_row_of_a_zamba2_are_mixed_at_once(
    cache: str, fresh: pytest.MonkeyPatch
) -> None:
    fresh.setenv("QUINTET_KERNELS", "0")
    model = zamba2.model_of(num_hidden_layers=2, layers_block_type=["mamba", "hybrid"])
    # Prompts; a step, a piece of a prompt and a row that waits; documents that nothing is kept of.
    forwards = [([3, 2, 18], True), ([1, 20, 0], True), ([2, 0, 1], True), ([5, 1, 17], False)]
    texts: list[Texts] = []

    def run() -> list[Tensor]:
        config = model.config
        past = DynamicCache(config) if cache == "dynamic" else PooledCache(config, 3, 48)
        made = []
        for i, (lengths, keeps) in enumerate(forwards):
            g = torch.Generator().manual_seed(i)
            ids = torch.randint(1, 101, (1, sum(lengths)), generator=g)
            ends = torch.tensor([0, *lengths]).cumsum(0).int()
            how = {"past_key_values": past} if keeps else {"use_cache": False}
            made.append(model(ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends, **how).logits)
            if i == 0:
                past.snapshot()
            elif i == 1:
                # Back to where all were, and to some way into what came since.
                past.crop(torch.tensor([3, 9, 18]))
        return made

    def seen(*given: Any) -> Any:
        texts.append(given[5])
        return through(*given)

    through = kernels.through_states
    fresh.setattr(kernels, "through_states", seen)
    right = run()
    assert not texts
    with REGISTRY.registered(BACKEND):
        made = run()
    assert [one.n for one in texts] == [3, 3, 2, 2, 2, 2, 3, 3]
    # What a forward says to the device is said once for all layers.
    assert all(one is other for one, other in zip(texts[::2], texts[1::2], strict=True))
    for one, other in zip(made, right, strict=True):
        assert relative_error(one, other) <= 1e-5

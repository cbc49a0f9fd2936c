"""On kernels, a row's logits are the same bits whoever shares the batch, and however it was cut."""

import os
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from conformance.families import FAMILIES, WIDE, Family, each
from quintet.kernels.native import available

pytestmark = pytest.mark.skipif(not available(), reason="there are no kernels on this machine")
ROWS, LONGEST = 6, 330
# As wide as the kernel for prompts takes them.
HEADS: dict[str, dict[str, Any]] = {
    "qwen2": {"head_dim": 32},
    "qwen2-moe": {"head_dim": 32},
    "deepseek-v2": {"v_head_dim": 32},
    "deepseek-v3": {"v_head_dim": 32},
}
WIDER = {
    "qwen2": {"hidden_size": 896, "intermediate_size": 4864, "head_dim": 64},
    "qwen2-moe": {"hidden_size": 1536, "moe_intermediate_size": 704, "head_dim": 64},
    "deepseek-v2": {"hidden_size": 2048, "moe_intermediate_size": 352, "kv_lora_rank": 512},
    "deepseek-v3": {"hidden_size": 1536, "moe_intermediate_size": 352, "kv_lora_rank": 512},
    "zamba2": {"hidden_size": 896, "mamba_d_state": 64},
}
IDS = torch.randint(101, (ROWS, LONGEST), generator=torch.Generator().manual_seed(9))
formats = pytest.mark.parametrize("quantize", [None, "int8", "int4"])
some = settings(
    max_examples=int(os.environ.get("QUINTET_SCHEDULES", "4")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
Models = Callable[..., Any]
# How many tokens of each row pass in each of some forwards: few of any, or a prompt's.
COUNTS = st.integers(1, ROWS).flatmap(
    lambda n: st.lists(
        st.one_of(
            st.lists(st.integers(0, 16), min_size=n, max_size=n).filter(any),
            st.lists(st.integers(17, 70), min_size=n, max_size=n),
        ),
        min_size=1,
        max_size=4,
    )
)


@pytest.fixture(autouse=True)
def invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are summed as steps are, where it is asked for."""
    monkeypatch.setenv("QUINTET_BATCH_INVARIANT", "1")


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Load a small model of a family, in a format; it is made once for all formats."""

    @cache
    def saved(family: Family, wider: bool) -> Path:
        folder = tmp_path_factory.mktemp(family.name)
        widths = WIDER[family.name] if wider else {}
        sizes = {**family.shallow, **WIDE[family.name], **HEADS.get(family.name, {}), **widths}
        family.model_of(**sizes).save_pretrained(folder)
        return folder

    def load(family: Family, quantize: str | None, *, wider: bool = False) -> Any:
        folder, cls = saved(family, wider), family.cls("ForCausalLM")
        return cls.from_pretrained(folder, quantize=quantize, dtype=torch.bfloat16).eval()

    return load


@torch.no_grad()
def run(model: Any, rows: Sequence[int], schedule: Sequence[Sequence[int]]) -> list[Tensor]:
    """The last logits of rows whose texts pass as many tokens at a time as the schedule says."""
    cache, at = model.new_cache(), [0] * len(rows)
    made: list[list[Tensor]] = [[] for _ in rows]
    with model.fused_session(cache):
        for counts in schedule:
            pieces = [IDS[row, a : a + n] for row, a, n in zip(rows, at, counts, strict=True)]
            ends = torch.tensor([0, *accumulate(counts)])
            has = [row for row, n in enumerate(counts) if n]
            logits = model(
                torch.cat(pieces)[None],
                past_key_values=cache,
                cu_seq_lens_q=ends,
                logits_to_keep=ends[1:][has] - 1,
            ).logits[0]
            at = [a + n for a, n in zip(at, counts, strict=True)]
            for row, own in zip(has, logits, strict=True):
                made[row].append(own)
    return [torch.stack(row) if row else torch.empty(0) for row in made]


def check(model: Any, schedule: Sequence[Sequence[int]], threads: int) -> None:
    rows = range(len(schedule[0]))
    torch.set_num_threads(threads)
    together = run(model, rows, schedule)
    torch.set_num_threads(1)
    for row in rows:
        own = [[counts[row]] for counts in schedule if counts[row]]
        if own:
            assert torch.equal(run(model, [row], own)[0], together[row])


@formats
@each
def test_a_row_does_not_see_who_shares_the_batch(
    family: Family, quantize: str | None, model_of: Models
) -> None:
    model = model_of(family, quantize)

    @some
    @given(schedule=COUNTS, threads=st.integers(1, 3))
    def holds(schedule: list[list[int]], threads: int) -> None:
        # In fewer bits, a text of up to 16 tokens without a past passes layers one by one.
        first = [[17 + row for row in range(len(schedule[0]))]] if quantize else []
        check(model, first + schedule, threads)

    holds()


@each
def test_nor_by_default_where_prompts_have_forwards_of_their_own(
    family: Family, model_of: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QUINTET_BATCH_INVARIANT")
    model = model_of(family, None)

    @some
    @given(schedule=COUNTS, threads=st.integers(1, 3))
    def holds(schedule: list[list[int]], threads: int) -> None:
        first = [17 + 9 * row for row in range(len(schedule[0]))]
        check(model, [first, *schedule], threads)

    holds()


# Each format in families of every kind of layer, and each family in fewer bits and without.
@pytest.mark.parametrize(
    ("family", "quantize"),
    [
        (family, quantize)
        for family in FAMILIES
        for quantize in (None, "int4" if family.name in ("qwen2", "deepseek-v2") else "int8")
    ],
    ids=str,
)
def test_nor_does_it_at_widths_of_released_models(
    family: Family, quantize: str | None, model_of: Models
) -> None:
    model = model_of(family, quantize, wider=True)
    steps = [[1] * ROWS, [1, 4, 0, 2, 1, 1], [1] * ROWS]
    check(model, [[20, 33, 64, 17, 40, 18], *steps], 2)
    if quantize is None:
        check(model, [[3, 1, 16, 7, 2, 9], *steps], 3)


@pytest.mark.parametrize("quantize", [None, "int8"])
@each
def test_nor_how_its_prompt_was_cut(family: Family, quantize: str | None, model_of: Models) -> None:
    model = model_of(family, quantize)
    whole = run(model, [0], [[LONGEST]])[0]
    # States go on from whole blocks of 64; more than 16 tokens are a prompt.
    odd = [] if family.name == "zamba2" else [(150, 180), (17, 40, 100, 173)]
    for cuts in ((192, 138), (64, 64, 128, 74), *odd):
        pieces = run(model, [0], [[n] for n in cuts])[0]
        assert torch.equal(pieces[-1], whole[-1]), cuts

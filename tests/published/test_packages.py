"""Operations as published packages compute them, whose interfaces stand-ins have in PyTorch.

The stand-ins have the names, the order and the defaults of what the packages publish.
"""

import inspect
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import FAMILIES
from on_triton.attention import BF16, Scene, inputs
from quintet.cache import PooledCache, row_memory
from quintet.cache.fixed import FixedRows
from quintet.kernels.matrix import Matrix
from quintet.ops import paged
from quintet.ops.quantized import fp8_linears
from quintet.ops.ssd import recurrence, step_sizes
from quintet.published import (
    BACKENDS,
    deep_gemm,
    flash_attention,
    flash_mla,
    mamba_ssm,
    packages,
)
from quintet.triton.texts import Texts

CPU = torch.device("cpu")
NO_LIMIT = (0.0, float("inf"))
Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put functions in place as a module, and let adapters read tensors on the CPU."""

    def put(name: str, **functions: Any) -> None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    for one in (flash_attention, flash_mla, deep_gemm, mamba_ssm):
        monkeypatch.setattr(one, "takes", lambda *tensors: True)
    return put


# -- flash-attn ------------------------------------------------------------------------------------


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Each text's queries, aligned with its last keys, over the keys of its pages or its own."""
    assert causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert int(cu_seqlens_k.diff().max()) <= max_seqlen_k
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
    assert block_table is None or k.shape[1] % 256 == 0
    made = torch.zeros_like(q)
    for i, (T, S) in enumerate(zip(cu_seqlens_q.diff(), cu_seqlens_k.diff(), strict=True)):
        first = int(cu_seqlens_q[i])
        if block_table is None:
            begin = int(cu_seqlens_k[i])
            keys, values = k[begin : begin + S], v[begin : begin + S]
        else:
            keys, values = (x[block_table[i].long()].flatten(0, 1)[:S] for x in (k, v))
        groups = q.shape[1] // keys.shape[1]
        keys, values = (x.float().repeat_interleave(groups, dim=1) for x in (keys, values))
        own = q[first : first + T].float()
        scores = torch.einsum("thd,shd->hts", own, keys) * (softmax_scale or q.shape[-1] ** -0.5)
        place = torch.arange(int(T))[:, None] + S - T
        slot = torch.arange(int(S))
        seen = (slot <= place) & ((slot >= place - window_size[0]) | (window_size[0] < 0))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
        made[first : first + T] = torch.einsum("hts,shd->thd", weights, values).to(q.dtype)
    return made


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    """The same of equally many queries each."""
    assert isinstance(cache_seqlens, Tensor)
    n, T = q.shape[:2]
    ends = torch.arange(n + 1, dtype=torch.int32) * T
    lengths = torch.nn.functional.pad(cache_seqlens.cumsum(0).int(), (1, 0))
    return flash_attn_varlen_func(
        q.flatten(0, 1), k_cache, v_cache, ends, lengths, T, 10**6, softmax_scale=softmax_scale,
        causal=causal, window_size=window_size, block_table=block_table,
    ).view_as(q)  # fmt: skip


@pytest.mark.parametrize(
    "scene",
    [
        Scene([(1, 300), (1, 3), (1, 0)], page=256, dtype=BF16),
        Scene([(2, 40), (2, 9)], page=256, dtype=BF16, window=20, heads=(6, 2)),
        Scene([(7, 0), (1, 60), (5, 33)], page=256, dtype=BF16, window=16),
        Scene([(2, 3), (1, 5)], page=256, dtype=BF16, nowhere=1),
        Scene([(9, 0), (4, 0)], page=0, dtype=BF16),
    ],
    ids=["steps", "drafts in a window", "prompts and steps", "nowhere", "texts of one row"],
)
@torch.no_grad()
def test_attention_over_pages_by_flash_attn(scene: Scene, install: Install) -> None:
    install(
        "flash_attn",
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=flash_attn_with_kvcache,
    )
    known = dict(inputs(CPU, scene=scene))
    made, right = flash_attention.attend_pages(**known), paged.attend_pages.definition(**known)
    assert made is not None
    assert (made.shape, made.dtype) == (right.shape, right.dtype)
    assert float((made - right).abs().max()) <= 2**-7 * float(right.abs().max())


@pytest.mark.parametrize(
    "scene",
    [
        Scene([(1, 5)], page=256),
        Scene([(1, 5)], page=16, dtype=BF16),
        Scene([(1, 5)], page=256, dtype=BF16, sizes=(12, 12)),
        Scene([(1, 5)], page=256, dtype=BF16, sizes=(512, 64), shared=True, heads=(2, 1)),
        Scene([(1, 5)], page=256, dtype=BF16, bits=8),
    ],
    ids=["float32", "short pages", "odd sizes", "latents", "codes"],
)
@torch.no_grad()
def test_what_flash_attn_does_not_take_is_left_to_others(scene: Scene, install: Install) -> None:
    install("flash_attn")
    assert flash_attention.attend_pages(**inputs(CPU, scene=scene)) is None


# -- FlashMLA --------------------------------------------------------------------------------------


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[object, None]:
    """Nothing yet: what this is asked with is for those who call an older one."""
    lengths, rows, heads = args
    assert lengths.dtype == torch.int32
    assert rows % heads == 0
    assert not kwargs
    return PLAN, None


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: object,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries of equally many tokens, aligned with the last of the keys, which are values too."""
    assert tile_scheduler_metadata is PLAN
    assert causal
    assert softmax_scale is not None
    assert block_table is not None
    assert cache_seqlens is not None
    assert block_table.dtype == cache_seqlens.dtype == torch.int32
    assert k_cache.shape[1:] == (64, 1, 576)
    assert k_cache.is_contiguous()
    n, T, H, _ = q.shape
    made, sums = q.new_zeros(n, T, H, head_dim_v), torch.zeros(n, H, T)
    for i, S in enumerate(cache_seqlens.tolist()):
        held = k_cache[block_table[i].long()].flatten(0, 2)[:S].float()
        scores = torch.einsum("thd,sd->hts", q[i].float(), held) * softmax_scale
        seen = torch.arange(S) <= torch.arange(T)[:, None] + S - T
        scores = scores.masked_fill(~seen, -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0)
        made[i] = torch.einsum("hts,sd->thd", weights, held[:, :head_dim_v]).to(q.dtype)
    return made, sums


PLAN = object()
LATENT: dict[str, Any] = {"sizes": (512, 64), "shared": True, "heads": (4, 1), "dtype": BF16}


def beside(latents: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as they lie in one piece of memory."""
    whole = torch.cat((latents, keys), dim=-1).contiguous()
    return whole[..., :512], whole[..., 512:]


@pytest.mark.parametrize(
    "scene",
    [
        Scene([(1, 90), (1, 3), (1, 0)], page=64, **LATENT),
        Scene([(2, 140), (2, 9)], page=128, **LATENT),
        Scene([(1, 3), (1, 5)], page=64, nowhere=1, **LATENT),
    ],
    ids=["steps", "drafts", "nowhere"],
)
@torch.no_grad()
def test_attention_over_latents_by_flash_mla(scene: Scene, install: Install) -> None:
    functions = get_mla_metadata, flash_mla_with_kvcache
    install("flash_mla", **{one.__name__: one for one in functions})
    known = dict(inputs(CPU, scene=scene))
    # What lies apart would have to be copied.
    assert flash_mla.attend_pages(**known) is None
    known["k"] = beside(*known["k"])
    made, right = flash_mla.attend_pages(**known), paged.attend_pages.definition(**known)
    assert made is not None
    assert (made.shape, made.dtype) == (right.shape, right.dtype)
    assert float((made - right).abs().max()) <= 2**-7 * float(right.abs().max())
    assert flash_mla.attend_pages(**{**known, "window": 5}) is None


@torch.no_grad()
def test_a_pool_on_a_gpu_holds_latents_as_flash_mla_reads_them(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = get_mla_metadata, flash_mla_with_kvcache
    install("flash_mla", **{one.__name__: one for one in functions})
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": 1}
    family = next(one for one in FAMILIES if one.name == "deepseek-v2")
    model = family.model_of(**sizes).bfloat16()
    ids, logits = torch.arange(6, 20).view(2, 7), []
    for joining in ((), ("cpu",)):
        monkeypatch.setattr(row_memory, "_JOINING", joining)
        pool = PooledCache(model.config, 3, 128)
        made = [model(ids[:, a:b], past_key_values=pool).logits for a, b in ((0, 5), (5, 7))]
        logits.append(torch.cat(made, dim=1))
    torch.testing.assert_close(*logits, rtol=0, atol=float(logits[0].abs().max()) * 2**-6)
    rows = FixedRows(pool, torch.tensor([6, 6]), torch.ones(2).long(), 64)
    memory, pages = rows.memory(0), rows.segment(2, 1, CPU, None).pages
    assert memory is not None
    assert pages is not None
    q = torch.randn(2, 4, 512).bfloat16(), torch.randn(2, 4, 64).bfloat16()
    given = {"q": q, "k": memory, "v": None, "pages": pages, "window": None, "scale": 0.05}
    made, right = flash_mla.attend_pages(**given), paged.attend_pages.definition(**given)
    assert made is not None
    assert float((made - right).abs().max()) <= 2**-7 * float(right.abs().max())


# -- DeepGEMM --------------------------------------------------------------------------------------


def fp8_gemm_nt(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    d: Tensor,
    c: Tensor | None = None,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    alpha: float | None = None,
) -> None:
    """Rows in blocks of 1 x 128 times a weight in blocks of 128 x 128."""
    (x, x_scale), (w, w_scale) = a, b
    assert x.dtype == w.dtype == torch.float8_e4m3fn
    assert x_scale.shape == (len(x), x.shape[1] // 128)
    assert w_scale.shape == (-(-len(w) // 128), w.shape[1] // 128)
    rows = x.float() * x_scale.repeat_interleave(128, dim=1)
    scale = w_scale.repeat_interleave(128, dim=0)[: len(w)].repeat_interleave(128, dim=1)
    d.copy_(rows @ (w.float() * scale).T)


@torch.no_grad()
def test_many_rows_by_deep_gemm(install: Install) -> None:
    install("deep_gemm", fp8_gemm_nt=fp8_gemm_nt)
    g = torch.Generator().manual_seed(0)

    def weight(rows: int) -> Matrix:
        numbers = torch.randn(rows, 256, generator=g).to(torch.float8_e4m3fn)
        scale = torch.rand(-(-rows // 128), 2, generator=g) + 0.5
        bias = torch.randn(rows, generator=g).bfloat16()
        return Matrix(numbers, scale, bias, block=(128, 128))

    maps, x = [weight(136), weight(128)], torch.randn(5, 13, 256, generator=g).bfloat16()
    x[0, 0] = 0
    made, right = deep_gemm.linears(x, maps), fp8_linears.definition(x, maps)
    assert made is not None
    for one, other in zip(made, right, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        # A number of e4m3 is off by up to 2^-4 of itself, a sum of many by less.
        assert float((one - other).float().norm()) <= 2**-4 * float(other.float().norm())
        assert not torch.equal(one, other)
    assert deep_gemm.linears(x[:4], maps) is None
    assert deep_gemm.linears(x.float(), maps) is None
    assert deep_gemm.linears(x, [maps[0]._replace(block=(1, 256))]) is None


# -- mamba_ssm -------------------------------------------------------------------------------------


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """A token of each state, whose A, D and step sizes are of channels."""
    (n, H, P, N), G = state.shape, B.shape[1]
    assert x.shape == dt.shape == (n, H, P)
    assert A.shape == (H, P, N)
    assert D is not None
    # Where a head's channels have one step size, the package asks this of all three.
    assert dt_bias is not None
    assert A.stride(-1) == A.stride(-2) == dt.stride(-1) == dt_bias.stride(-1) == 0
    b, c = (one.float().repeat_interleave(H // G, dim=1) for one in (B, C))
    taken = (dt * x)[..., None] * b[:, :, None]
    state.copy_(state * (dt[..., None] * A).exp() + taken)
    return ((state * c[:, :, None]).sum(-1) + D * x).to(x.dtype)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> tuple[Tensor, Tensor]:
    """All tokens, one after the other."""
    assert D is not None
    assert return_final_states
    assert chunk_size > 0
    y, state = recurrence(x, dt, A, B, C, D, initial_states)
    return y.to(x.dtype), state


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("begins", [True, False])
@torch.no_grad()
def test_states_by_mamba_ssm(T: int, begins: bool, install: Install) -> None:
    triton = "mamba_ssm.ops.triton"
    install(f"{triton}.selective_state_update", selective_state_update=selective_state_update)
    install(f"{triton}.ssd_combined", mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    for parent in ("mamba_ssm", "mamba_ssm.ops", triton):
        install(parent, __path__=[])
    g = torch.Generator().manual_seed(T)
    sizes = H, P, G, N = 4, 3, 2, 5
    convolved = torch.randn(2 * T, H * P + 2 * G * N, generator=g)
    dt, scalars = torch.randn(2 * T, H, generator=g), tuple(torch.randn(3, H, generator=g))
    counts = torch.tensor([T, max(T - 2, 0)])
    before = None if begins else torch.randn(2, H, P, N, generator=g)
    kept = torch.empty(2, H, P, N) if before is None else before.clone()
    texts = Texts(2, T, counts=counts)
    y, steps = mamba_ssm.through_states(
        convolved, dt, scalars, (0.01, 1.5), sizes, texts, before if begins else kept, kept
    )
    wanted = step_sizes(dt.view(2, T, H), scalars[0], (0.01, 1.5), counts)
    x, b, c = torch.split(convolved.view(2, T, -1), [H * P, G * N, G * N], dim=-1)
    b, c = (torch.unflatten(one, -1, (G, N)) for one in (b, c))
    x = torch.unflatten(x, -1, (H, P))
    right, state = recurrence(x, wanted, -scalars[1].exp(), b, c, scalars[2], before)
    torch.testing.assert_close(steps.view(2, T, H), wanted)
    torch.testing.assert_close(y.view(2, T, H, P), right)
    torch.testing.assert_close(kept, state)
    assert y.is_contiguous()


@torch.no_grad()
def test_a_mixer_goes_through_mamba_ssm(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is made for Linux")
    from on_triton import mamba2 as given
    from quintet.triton import mamba2 as kernels

    def through(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(arguments)
        return kernels.through_states(*arguments)

    calls: list[Any] = []
    monkeypatch.setattr(mamba_ssm, "through_states", through)
    scene = given.Scene([3, 2], width=3, heads=(2, 16, 1, 16))
    made = given.outcome(mamba_ssm.mamba2, **given.inputs(CPU, scene=scene))
    right = given.outcome(kernels.mamba2, **given.inputs(CPU, scene=scene))
    assert len(calls) == 1
    assert made is not None
    assert right is not None
    assert all(map(torch.equal, made, right))


# -- interfaces ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("called", "published"),
    [
        (flash_attention.FlashAttention.flash_attn_varlen_func, flash_attn_varlen_func),
        (flash_attention.FlashAttention.flash_attn_with_kvcache, flash_attn_with_kvcache),
        (flash_mla.FlashMLA.flash_mla_with_kvcache, flash_mla_with_kvcache),
        (deep_gemm.DeepGEMM.fp8_gemm_nt, fp8_gemm_nt),
        (mamba_ssm.StateUpdate.selective_state_update, selective_state_update),
        (mamba_ssm.ChunkScan.mamba_chunk_scan_combined, mamba_chunk_scan_combined),
    ],
    ids=lambda function: function.__qualname__,
)
def test_what_is_called_is_what_is_published(called: Any, published: Any) -> None:
    ours = list(inspect.signature(called).parameters.values())[1:]
    theirs = inspect.signature(published).parameters
    by_place = [one.name for one in ours if one.kind is one.POSITIONAL_OR_KEYWORD]
    assert by_place == list(theirs)[: len(by_place)]
    assert {one.name for one in ours} <= set(theirs)
    needed = {name for name, one in theirs.items() if one.default is one.empty}
    assert needed <= {one.name for one in ours}


def test_each_says_why_a_machine_cannot_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(backend.on_request for backend in BACKENDS)
    found: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert packages.lacking("toy", 80)() == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(packages, "find_spec", lambda name: name if name in found else None)
    told = "toy is for compute capability 9.0 to 9.0, and this is 8.9"
    assert packages.lacking("toy", 90, 90)() == told
    assert packages.lacking("toy", 80)() == "the package toy is not installed"
    found.append("toy")
    assert packages.lacking("toy", 80)() is None


def test_tensors_of_a_cpu_are_left_to_others() -> None:
    assert not packages.takes(torch.ones(2))

"""What a process has set around a call changes nothing of what a model of any family computes."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from comparisons import TOLERANCE
from conformance.families import Family, each
from quintet import Cache, DynamicCache, OffloadedCache, QuantizedCache, StaticCache
from quintet.errors import InputError
from support import relative_error

Mode = Callable[[], AbstractContextManager[Any]]
TEXT = torch.randint(101, (2, 32), generator=torch.Generator().manual_seed(7))
# A prompt, a step of the kind that kernels take whole, and more than such a step.
PIECES = (7, 1, 20, 4)
MODES: dict[str, Mode] = {
    "grad": torch.enable_grad,
    "no-grad": torch.no_grad,
    "inference": torch.inference_mode,
}
PAIRS = tuple(itertools.product(MODES, repeat=2))
# Three in a row such that any two of the places have every pair of modes.
ORDERS = [(*pair, tuple(MODES)[(i + i // 3) % 3]) for i, pair in enumerate(PAIRS)]
CACHES: dict[str, Callable[[Any], Cache]] = {
    "dynamic": DynamicCache,
    "static": lambda config: StaticCache(config, 40),
    "offloaded": OffloadedCache,
    "quantised": QuantizedCache,
}


def in_pieces(model: Any, cache: Cache, modes: tuple[str, ...], text: Tensor = TEXT) -> Tensor:
    """Logits of a text given piece by piece, each under the next of the modes."""
    made = []
    for ids, mode in zip(text.split(PIECES, dim=1), modes, strict=True):
        with MODES[mode]():
            made.append(model(ids, past_key_values=cache).logits.detach().clone())
    return torch.cat(made, dim=1)


# -- which mode gradients are in ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded"])
@each
def test_a_cache_goes_on_in_any_mode(family: Family, kind: str) -> None:
    model = family.model_of(**family.shallow)
    expected = in_pieces(model, CACHES[kind](model.config), ("no-grad",) * 4)
    for order in ORDERS:
        made = in_pieces(model, CACHES[kind](model.config), (*order, order[0]))
        assert relative_error(made, expected) < TOLERANCE, order


@each
def test_codes_refuse_gradients_before_they_change(family: Family) -> None:
    model = family.model_of(**family.shallow)
    expected = in_pieces(model, QuantizedCache(model.config), ("no-grad",) * 4)
    for order in itertools.product(("no-grad", "inference"), repeat=2):
        cache = QuantizedCache(model.config)
        made = []
        for ids, mode in zip(TEXT.split(PIECES, dim=1), order * 2, strict=True):
            with pytest.raises(InputError, match="no gradient"), torch.enable_grad():
                model(ids, past_key_values=cache)
            with MODES[mode]():
                made.append(model(ids, past_key_values=cache).logits.clone())
        assert relative_error(torch.cat(made, dim=1), expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@each
def test_rows_change_and_states_return_in_any_mode(family: Family, kind: str) -> None:
    model = family.model_of(**family.shallow)
    mask = torch.ones_like(TEXT[:, :7])
    mask[0, :3] = 0
    results = []
    for order in [("no-grad",) * 3, *ORDERS]:
        cache = CACHES[kind](model.config)
        with MODES[order[0]]():
            model(TEXT[:, :7], attention_mask=mask, past_key_values=cache)
            cache.snapshot()
        with MODES[order[1]]():
            model(TEXT[:, 7:10], past_key_values=cache)
            cache.crop(torch.tensor([5, 8]))
        with MODES[order[2]]():
            cache.batch_select_indices(torch.tensor([1, 0, 1]))
            results.append(model(TEXT[[1, 0, 1], 10:14], past_key_values=cache).logits.detach())
            cache.reset()
            results[-1] = results[-1].clone()
            assert cache.get_seq_length() == 0
    for made, order in zip(results[1:], ORDERS, strict=True):
        assert relative_error(made, results[0]) < TOLERANCE, order


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "queries-alone"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@each
def test_what_is_written_later_leaves_a_graph_alone(
    family: Family, kind: str, frozen: bool
) -> None:
    """A loss of an earlier piece has the gradients it would have had at once."""
    model = family.model_of(**family.shallow)
    if frozen:
        # Keys have no gradient, and queries need them for theirs.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name or "q_b_proj" in name)

    def gradients(then: str | None) -> list[Tensor]:
        model.zero_grad()
        cache = CACHES[kind](model.config)
        with torch.no_grad():
            model(TEXT[:, :5], past_key_values=cache)
            cache.snapshot()
        loss = model(TEXT[:, 5:9], past_key_values=cache, labels=TEXT[:, 5:9]).loss
        if then is not None:
            with MODES[then]():
                cache.crop(5)
                model(TEXT[:, 20:24], past_key_values=cache)
                cache.crop(5)
                model(TEXT[:, 20:21], past_key_values=cache)
                cache.reset()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients(None)
    assert expected
    for then in MODES:
        for made, right in zip(gradients(then), expected, strict=True):
            assert torch.equal(made, right), then


# -- who derives ----------------------------------------------------------------------------


def rms_error(made: Tensor, right: Tensor) -> float:
    """How far apart they are in the root mean square: the largest of many roundings is chance."""
    return float((made - right).square().mean().sqrt() / right.square().mean().sqrt())


def loss_of(model: Any) -> Callable[..., Tensor]:
    """A loss as a function of the embeddings' weights, with all others as they are."""
    name = "model.embed_tokens.weight"

    def loss(weight: Tensor, ids: Tensor = TEXT[:, :6]) -> Tensor:
        given = {"input_ids": ids, "use_cache": False}
        logits = torch.func.functional_call(model, {name: weight}, kwargs=given).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    return loss


@each
def test_rows_of_padding_and_labels_can_be_mapped_over(family: Family) -> None:
    """Each row's own gradient, as for private training: masks and labels are mapped, too."""
    model = family.model_of(**family.rounded, tie_word_embeddings=False)
    if family.routes(model.config):
        return  # vmap has no rule for how many tokens an expert gets
    model.requires_grad_(requires_grad=False)
    weight = model.get_output_embeddings().weight.detach().clone()
    ids, mask = TEXT[:, :6], torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    labels = ids.clone()
    labels[0, 2] = -100

    def loss(weight: Tensor, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        given = (ids[None],)
        options = {"attention_mask": mask[None], "labels": labels[None], "use_cache": False}
        parameters = {"lm_head.weight": weight}
        made = torch.func.functional_call(model, parameters, given, options, tie_weights=False)
        return made.loss  # type: ignore[no-any-return]

    gradient = torch.func.grad(loss)
    apart = [gradient(weight, *row) for row in zip(ids, mask, labels, strict=True)]
    together = torch.func.vmap(gradient, in_dims=(None, 0, 0, 0))(weight, ids, mask, labels)
    assert relative_error(together, torch.stack(apart)) < TOLERANCE


# torch.func.jvp scripts what it decomposes.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each
def test_derivatives_of_every_kind_agree(family: Family, dtype: torch.dtype) -> None:
    model = family.model_of(**family.rounded, tie_word_embeddings=False).to(dtype)
    model.requires_grad_(requires_grad=False)
    loss, weight = loss_of(model), model.get_input_embeddings().weight.detach().clone()
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    direction = torch.randn_like(weight) / weight.numel() ** 0.5

    leaf = weight.clone().requires_grad_()
    (plain,) = torch.autograd.grad(loss(leaf), leaf)
    assert rms_error(torch.func.grad(loss)(weight).float(), plain.float()) < tolerance

    if not family.routes(model.config):
        # Which tokens an expert gets is a number of them, which vmap has no rule for.
        rows = TEXT[:, None, :6]
        apart = torch.stack([torch.func.grad(loss)(weight, ids).float() for ids in rows])
        together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, rows)
        assert rms_error(together.float(), apart) < tolerance

    expected = (plain.float() * direction.float()).sum()
    _, forward = torch.func.jvp(loss, (weight,), (direction,))
    assert rms_error(forward.float(), expected) < 5 * tolerance
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    assert rms_error(tangent.float(), expected) < 5 * tolerance


@each
def test_a_gradient_has_a_gradient(family: Family) -> None:
    """A penalty on the gradient, in bfloat16 as in float32, where torch's sdpa has none."""
    found = []
    for dtype, backend in ((torch.float32, "eager"), (torch.bfloat16, "sdpa")):
        model = family.model_of(**family.rounded, tie_word_embeddings=False).to(dtype)
        model.config.attn_implementation = backend
        model.requires_grad_(requires_grad=False)
        weight = model.get_input_embeddings().weight.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(model)(weight), weight, create_graph=True)
        (second,) = torch.autograd.grad(grad.float().square().sum(), weight)
        found.append(second.float())
    assert rms_error(found[1], found[0]) < 0.1


# -- what is set for all of torch --------------------------------------------------------------


@contextmanager
def put(set_it: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    set_it(value)
    try:
        yield
    finally:
        set_it(before)


# No warning of operations that are not deterministic: they are errors.
AROUND: dict[str, Mode] = {
    "deterministic": lambda: put(torch.use_deterministic_algorithms, True, False),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "autocast-off": lambda: torch.autocast("cpu", enabled=False),
    "bfloat16": lambda: put(torch.set_default_dtype, torch.bfloat16, torch.get_default_dtype()),
    "float64": lambda: put(torch.set_default_dtype, torch.float64, torch.get_default_dtype()),
    "meta": lambda: torch.device("meta"),
    "default-meta": lambda: put(torch.set_default_device, "meta", None),
    "saved-tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
}
MASK = torch.ones(2, 9, dtype=torch.long)
MASK[0, :3] = 0
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])


def all_it_makes(model: Any) -> list[Tensor]:
    """Losses, gradients, weights and states: of a padded batch, of packed texts, of steps."""
    ids = TEXT[:, :9]
    model.zero_grad()
    labels = ids.masked_fill(MASK == 0, -100)
    padded = model(ids, attention_mask=MASK, labels=labels, use_cache=False)
    packed = model(ids, position_ids=PACKED, labels=ids)
    (padded.loss + packed.loss).backward()
    made = [padded.loss, packed.loss, padded.logits, packed.logits]
    made += [p.grad for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        told = model(ids, attention_mask=MASK, output_attentions=True, output_hidden_states=True)
        made += [*told.attentions, *told.hidden_states]
        for cache in (DynamicCache(model.config), StaticCache(model.config, 16)):
            cache.snapshot()
            made.append(model(ids, attention_mask=MASK, past_key_values=cache).logits)
            cache.snapshot()
            made.append(model(ids[:, :2], past_key_values=cache).logits)
            cache.crop(torch.tensor([7, 10], device="cpu"))
            made.append(model(ids[:, :1], past_key_values=cache).logits)
    return [x.detach().clone() for x in made]


@each
def test_nothing_around_a_call_changes_what_it_makes(family: Family) -> None:
    model = family.model_of(**family.shallow)
    expected = all_it_makes(model)
    largest = [float(right.abs().max()) for right in expected]
    for name, around in AROUND.items():
        with around():
            found = all_it_makes(model)
        for made, right, most in zip(found, expected, largest, strict=True):
            assert (made.dtype, made.device) == (right.dtype, right.device), name
            # A gradient may be nothing but rounding, and under a mode kernels give way to formulas.
            assert float((made - right).abs().max()) <= max(2e-5 * most, 1e-6), name


@each
def test_the_number_of_threads_changes_nothing(family: Family) -> None:
    model = family.model_of(**family.shallow)
    expected = in_pieces(model, DynamicCache(model.config), ("no-grad",) * 4)
    for count in (1, 2):
        with put(torch.set_num_threads, count, torch.get_num_threads()):
            made = in_pieces(model, DynamicCache(model.config), ("no-grad",) * 4)
        assert relative_error(made, expected) < TOLERANCE


@each
def test_another_thread_makes_the_same(family: Family) -> None:
    model = family.model_of(**family.shallow)
    expected = all_it_makes(model)
    with ThreadPoolExecutor(1) as pool, torch.inference_mode(), torch.device("meta"):
        # A thread has modes of its own.
        found = pool.submit(all_it_makes, model).result()
    for made, right in zip(found, expected, strict=True):
        assert float((made - right).abs().max()) <= max(1e-5 * float(right.abs().max()), 1e-6)


@each
def test_autocast_computes_in_its_dtype(family: Family) -> None:
    """Prompts, steps and training, as near as that dtype is."""
    model = family.model_of(**family.rounded)
    expected = in_pieces(model, DynamicCache(model.config), ("no-grad",) * 4)
    for dtype in (torch.bfloat16, torch.float16):
        for mode in ("no-grad", "inference", "grad"):
            for cache in (DynamicCache(model.config), StaticCache(model.config, 40)):
                with torch.autocast("cpu", dtype):
                    made = in_pieces(model, cache, (mode,) * 4)
                error = (made.float() - expected).square().mean().sqrt()
                assert float(error / expected.square().mean().sqrt()) < 0.05, (dtype, mode)
        with torch.autocast("cpu", dtype):
            loss = model(TEXT, labels=TEXT).loss
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(bool(grad.isfinite().all()) for grad in grads)

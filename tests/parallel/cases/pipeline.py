"""Cases of layers on several processes; each process compares with a model that is whole."""

import os
import signal
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from parallel.cases.generate import chooses, ids_of, models, raised, same_in_all
from parallel.cases.tensor import family, world
from quintet.errors import InputError
from quintet.generation import in_turns as turns
from quintet.modeling.loading import Options, load
from quintet.modeling.source import ModelSource
from quintet.parallel.apply import shard_model, shards_of
from quintet.parallel.pipeline import Pipeline, layout_of
from quintet.parallel.placement import Shard, table_of
from quintet.parallel.stages import stages_of
from quintet.training.batch import Batch
from quintet.training.objectives.next_token import LanguageModelling
from quintet.training.objectives.states import states_of
from quintet.training.progress import Progress
from quintet.training.step import accumulate
from support import relative_error

# The weight of a loss of what happens in layers.
SMALL = 1e-3


def steps(name: str, changes: dict[str, Any], degrees: dict[str, int], padded: bool) -> None:
    """Go on with a cache, token by token, as the last stage finds them in the whole model."""
    whole, parts = (family(name).model_of(**changes) for _ in range(2))
    here = world(**degrees)
    shard_model(parts, here)
    stage = parts.stage
    held = sum(parameter.numel() for parameter in parts.parameters())
    assert held < 0.9 * sum(parameter.numel() for parameter in whole.parameters())
    torch.manual_seed(1)
    ids = torch.randint(1, 101, (2, 7))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    caches: list[Any] = [None, None]
    with torch.inference_mode():
        for _ in range(3):
            made = [
                model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True)
                for model, past in zip((whole, parts), caches, strict=True)
            ]
            wanted, found = (output.logits for output in made)
            caches = [output.past_key_values for output in made]
            assert found.shape == wanted.shape
            if stage.last:
                assert relative_error(found, wanted) < 1e-5
            else:
                assert found.is_meta
            assert caches[1].get_seq_length() == caches[0].get_seq_length()
            ids = wanted[:, -1:].argmax(dim=-1)
            mask = torch.cat((mask, torch.ones_like(ids)), dim=1)
    assert 0 < caches[1].nbytes < caches[0].nbytes


def parts_of(vocabulary: int) -> list[Batch]:
    """Make parts of different sizes: several texts a row, padding, and one without labels."""
    parts = []
    for rows, length in ((2, 9), (1, 6), (2, 7), (1, 5)):
        ids = torch.randint(1, vocabulary, (rows, length))
        labels = torch.where(torch.rand(rows, length) < 0.7, ids, -100)
        parts.append(Batch(input_ids=ids, labels=labels))
    texts = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1, 1]])
    parts[0] = replace(parts[0], seq_idx=texts)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    labels = parts[2].labels.masked_fill(mask == 0, -100)
    parts[2] = replace(parts[2], attention_mask=mask, labels=labels)
    parts[3] = replace(parts[3], labels=torch.full_like(parts[3].labels, -100))
    return parts


def gradients(
    name: str,
    changes: dict[str, Any],
    degrees: dict[str, int],
    schedule: str,
    runs_each: int,
    backwards: bool = False,
) -> None:
    """Compare the loss of a step in parts, and its gradients, with those of one process."""
    whole, model = (family(name).model_of(**changes).train() for _ in range(2))
    here = world(**degrees)
    layout = layout_of(schedule, runs_each)
    stages = stages_of(model, degrees["pp"], layout[0], folded=layout[1], backwards=backwards)
    if layout[1]:
        # A layer that runs again does so for the stage it is of.
        model.gradient_checkpointing_enable()
    shards = shards_of(model, table_of(model), here)
    shard_model(model, here, stages)
    torch.manual_seed(1)
    parts = parts_of(100)
    ahead = name == "deepseek-v3" and changes.get("num_nextn_predict_layers")
    objective = LanguageModelling(z_loss=1e-3, prediction=0.3 if ahead else None)
    at = Progress(0, 0, 0.0)
    wanted = accumulate(whole, objective, parts, at, nullcontext)
    # A loss of what each layer makes, which no stage has of the others.
    seen: list[list[Tensor]] = [[], []]
    for one, made in zip((whole, model), seen, strict=True):
        for index, layer in enumerate(islice(one.model.layers, one.config.num_hidden_layers)):
            layer.register_forward_hook(partial(_note, made, one, index))
    for part in parts:
        states_of(whole, part)
        (SMALL * sum(seen[0])).backward()
        seen[0].clear()
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(objective.counts(part))
    found: list[float] = []

    def forward(number: int) -> Any:
        seen[1].clear()
        if not model.stage.last:
            states_of(model, parts[number])
            return SMALL * sum(seen[1])
        terms = objective.terms(model, parts[number], at)
        losses = [term.weight * term.sum / max(counts[n], 1) for n, term in terms.items()]
        loss = sum(losses[1:], losses[0])
        found.append(loss.item())
        return loss + SMALL * sum(seen[1])

    pipeline = Pipeline(model, stages, here, schedule)
    sizes = [part.input_ids.numel() for part in parts]
    for _ in range(2):
        # What a second step is given is what the first was.
        model.zero_grad()
        found.clear()
        # What several runs come to is added up once.
        runs = ((0, 2), (2, 4)) if schedule == "1F1B" else ((0, 4),)
        for start, end in runs:
            pipeline.run(lambda number, start=start: forward(start + number), sizes[start:end])
        pipeline.add_up()
    if found:
        assert abs(sum(found) - wanted.loss) < 1e-5 * abs(wanted.loss)
    assert len(list(model.parameters())) < len(list(whole.parameters()))
    check_gradients(whole, model, shards)


def _note(
    made: list[Tensor], model: Any, index: int, layer: nn.Module, args: Any, output: Tensor
) -> None:
    if model.stage is None or index in model.stage.own:
        made.append(output.square().sum())


def check_gradients(whole: Any, model: Any, shards: Mapping[str, Shard]) -> None:
    """Check the gradients of a model that has parts of a whole one, or some of its parameters."""
    own = dict(model.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in whole.parameters() if p.grad is not None)
    for path, parameter in whole.named_parameters():
        if path not in own:
            continue
        grad = own[path].grad
        if parameter.grad is None:
            assert grad is None or not grad.any()
            continue
        wanted = shards[path].of(parameter.grad)
        scale = max(float(wanted.abs().max()), 1e-3 * largest)
        error = float((grad - wanted).abs().max()) / scale
        assert error < 1e-5, f"{path}: {error}"


def loaded_and_asked(name: str, path: Path, options: dict[str, Any]) -> None:
    """Load a checkpoint, and compare what is generated with what one process does."""
    cls = family(name).cls("ForCausalLM")
    here = world(pp=2)
    whole, parts = (
        load(cls, ModelSource(path), None, {}, Options(world=w, **options))[0] for w in (None, here)
    )
    assert not any(tensor.is_meta for tensor in parts.state_dict().values())
    assert parts.stage.last == (here.rank == 0)
    each = [
        {"max_new_tokens": 24, "do_sample": False},
        {"max_new_tokens": 24, "do_sample": True},
        {"max_new_tokens": 8, "num_beams": 2},
        {"max_new_tokens": 8, "prefill_chunk_size": 3, "cache_implementation": "static"},
    ]
    torch.manual_seed(here.rank)
    for one in each:
        made = ids_of(parts, one)
        same_in_all(made)
        assert made.tolist() == ids_of(whole, one).tolist(), one


ROWS = [[5, 17, 42], [1, 2, 30], [9, 61, 7], [1, 1, 77], [8, 8, 8]]


def in_turns(name: str, degrees: dict[str, int], each: list[dict[str, Any]]) -> None:
    """Rows go in groups, one on each stage, and become what one process makes of them."""
    whole, parts = models(name, degrees, {"num_hidden_layers": 4} if degrees["pp"] > 2 else {})
    sizes = []
    parts.register_forward_pre_hook(
        lambda module, args, named: sizes.append(len(named["input_ids"])), with_kwargs=True
    )
    for options in each:
        torch.manual_seed(11 if chooses() else 5)
        # Prompts of three tokens go in pieces, too.
        with mock.patch.object(turns, "FEW", 4):
            made = ids_of(parts, options, ROWS)
        same_in_all(made)
        torch.manual_seed(11)
        wanted = ids_of(whole, options, ROWS)
        if chooses():
            assert made.tolist() == wanted.tolist(), options
    groups = min(degrees["pp"], len(ROWS))
    assert max(sizes) <= max(-(-len(ROWS) // groups) * 2, 2)
    assert len(set(sizes[:groups])) <= 2


def ends_apart(name: str) -> None:
    """Groups end at steps of their own, whichever ends first."""
    whole, parts = models(name, {"pp": 2})
    ids = torch.tensor(ROWS)
    for rows in (ids, ids.flip(0)):
        plain = whole.generate(rows, max_new_tokens=12, do_sample=False)[:, rows.shape[1] :]
        for group in (slice(0, 2), slice(2, 5)):
            # What all rows of one group write sooner or later ends them.
            ends = sorted({int(row[min(number, 11)]) for number, row in enumerate(plain[group], 1)})
            for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.3}):
                asked = {**options, "eos_token_id": ends, "pad_token_id": 0, "max_new_tokens": 12}
                made = []
                for model in (parts, whole):
                    torch.manual_seed(3)
                    made.append(model.generate(rows, **asked))
                same_in_all(made[0])
                if chooses():
                    assert made[0].tolist() == made[1].tolist(), asked


def fails_in_turns(name: str) -> None:
    """Where a group cannot go on all end alike, and the next call finds nothing left over."""
    _, parts = models(name, {"pp": 2})
    ids = torch.tensor([[10, 11, 12, 3], [3, 4, 5, 6], [7, 8, 9, 20], [10, 11, 3, 12]])
    others = [token for token in range(100) if token not in (10, 11, 12, 13, 14)]
    asked = {"suppress_tokens": others, "no_repeat_ngram_size": 1, "max_new_tokens": 9}
    wanted = parts.generate(ids[:, :2], max_new_tokens=4).tolist()
    for rows in (ids, ids[1:], ids.flip(0)):
        say = raised(lambda r=rows: parts.generate(r, **asked), InputError)
        assert "has no token to take" in say
        assert parts.generate(ids[:, :2], max_new_tokens=4).tolist() == wanted
    forwards: list[int] = []

    def interrupt(module: Any, args: Any, named: dict[str, Tensor]) -> None:
        forwards.append(1)
        if chooses() and len(forwards) == 6:
            os.kill(os.getpid(), signal.SIGINT)

    handle = parts.register_forward_pre_hook(interrupt, with_kwargs=True)
    try:
        parts.generate(ids, max_new_tokens=50)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("it was not interrupted")
    handle.remove()
    assert len(forwards) < 12
    assert parts.generate(ids[:, :2], max_new_tokens=4).tolist() == wanted

"""The loop: what a step is, what is left out, what is saved and told."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quintet import AutoModelForCausalLM, AutoTokenizer
from quintet.checkpoint import disk
from quintet.errors import (
    ConfigError,
    ContextLengthError,
    DivergedError,
    InputError,
    QuintetError,
    SaveError,
)
from quintet.modeling.heads import CausalLMHead
from quintet.parallel.world import Degrees
from quintet.training import TrainingConfig, train
from quintet.training.batch import Batch
from quintet.training.building import build_model, build_objective, build_tokenizer
from quintet.training.checks import check
from quintet.training.data import build_data
from quintet.training.objective import Term
from quintet.training.objectives import LanguageModelling
from quintet.training.progress import Progress
from quintet.training.settings import read
from quintet.training.step import accumulate
from trainings import Heard, material, settings

BEGIN = Progress(0, 0, 0.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return material(tmp_path_factory.mktemp("material"))


@pytest.fixture(autouse=True)
def no_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)


def new(config: TrainingConfig, seed: int = 0) -> CausalLMHead:
    torch.manual_seed(seed)
    return build_model(config.model, build_tokenizer(config))


def test_it_is_the_loop_that_one_would_write(root: Path, tmp_path: Path) -> None:
    config = settings(root, tmp_path / "run", optimizer={"weight_decay": 0.0})
    heard = Heard()
    result = train(config, report=heard)
    model, data = new(config), build_data(config.data, build_tokenizer(config))
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(6):
        (batch,) = data.parts(Progress(step, 0, step / 6))
        named = {"seq_idx": batch.seq_idx, "attention_mask": batch.attention_mask}
        loss = model.train()(batch.input_ids, labels=batch.labels, **named).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    assert [record.loss for record in heard.records] == pytest.approx(losses, rel=1e-6)
    for name, weight in result.model.named_parameters():
        # The gradient of a key's bias is rounding alone, of which AdamW takes the sign.
        if "k_proj.bias" not in name:
            torch.testing.assert_close(weight, model.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_what_is_written_is_what_was_asked_for_and_made(root: Path, tmp_path: Path) -> None:
    config = settings(root, tmp_path / "run")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    result = train(config)
    assert torch.equal(torch.rand(3), expected)
    assert read(TrainingConfig, tmp_path / "run" / "config.toml") == config
    again = AutoModelForCausalLM.from_pretrained(result.path)
    for name, weight in result.model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert AutoTokenizer.from_pretrained(result.path).get_vocab() == result.tokenizer.get_vocab()
    assert {path.suffix for path in result.path.rglob("*") if path.is_file()} <= {
        *(".json", ".safetensors", ".jinja", ".txt"),
    }


# -- parts -----------------------------------------------------------------------------------


def uneven(batch: Batch) -> Batch:
    """Make the rows of a batch count differently."""
    labels = batch.labels.clone()
    labels[0, 3:] = -100
    labels[1, :9] = -100
    return replace(batch, labels=labels)


def split(batch: Batch) -> list[Batch]:
    """Cut a batch into its rows."""
    rows = []
    for n in range(len(batch.input_ids)):
        cut = {
            name: None if (held := getattr(batch, name)) is None else held[n : n + 1]
            for name in ("input_ids", "labels", "seq_idx", "attention_mask")
        }
        rows.append(Batch(**cut, texts=1))
    return rows


EVERYTHING: dict[str, dict[str, Any]] = {
    "qwen2": {"objective": {"z_loss": 0.1, "label_smoothing": 0.1}},
    "qwen2_moe": {"balance": {"auxiliary": 0.1, "z": 0.1, "scope": "sequence"}},
    "deepseek_v3": {"objective": {"prediction": 0.3}, "balance": {"sequence": 0.1}},
    "zamba2": {},
}


@pytest.mark.parametrize("kind", EVERYTHING)
def test_parts_add_up_to_the_whole(kind: str, root: Path, tmp_path: Path) -> None:
    config = settings(root, tmp_path, kind, **EVERYTHING[kind])
    data = build_data(config.data, build_tokenizer(config))
    whole = uneven(next(iter(data.parts(BEGIN))))
    model, found = new(config), []
    for parts in ([whole], split(whole)):
        model.zero_grad()
        objective = build_objective(config, model)
        outcome = accumulate(model, objective, parts, BEGIN, torch.enable_grad)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((outcome.loss, gradients))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    largest = max(gradient.abs().max().item() for gradient in found[0][1].values())
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-6, atol=1e-6 * largest)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("kind", "tables"),
    [
        ("deepseek_v3", {"balance": {"bias": 0.1}, "objective": {"prediction": 0.3}}),
        ("zamba2", {"adapter": {"r": 2}}),
    ],
    ids=["biases", "adapter"],
)
def test_what_a_program_sets_for_all_of_torch_changes_nothing(
    kind: str, tables: dict[str, Any], root: Path, tmp_path: Path
) -> None:
    around: dict[str, AbstractContextManager[Any]] = {
        "nothing": nullcontext(),
        "bfloat16": default_dtype(torch.bfloat16),
        "float64": default_dtype(torch.float64),
        "no-grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "meta": torch.device("meta"),
    }
    losses = {}
    for name, setting in around.items():
        heard, folder = Heard(), tmp_path / name
        with setting:
            train(settings(root, folder, kind, train={"steps": 3}, **tables), report=heard)
        losses[name] = heard.losses
    # Kernels step aside for a mode, and other sums are rounded.
    assert losses.pop("meta") == pytest.approx(losses["nothing"], rel=1e-5)
    assert all(loss == losses["nothing"] for loss in losses.values())
    assert torch.get_default_dtype() == torch.float32


def test_a_step_may_read_several_batches(root: Path, tmp_path: Path) -> None:
    growing = {"kind": "segments", "start": 1.0, "segments": [{"until": 1.0, "to": 3.0}]}
    heard = Heard()
    train(settings(root, tmp_path / "run", train={"batches": growing}), report=heard)
    assert [record.step_tokens // 48 for record in heard.records] == [1, 1, 2, 2, 2, 3]
    fixed = Heard()
    train(settings(root, tmp_path / "two", train={"batches": 2, "steps": 1}), report=fixed)
    large = settings(root, tmp_path / "one", data={"batch_rows": 6}, train={"steps": 1})
    whole = Heard()
    train(large, report=whole)
    assert fixed.losses == pytest.approx(whole.losses, rel=1e-6)


# -- numbers that are not finite --------------------------------------------------------------


class Breaks(nn.Module):
    """A layer's norm whose output, or gradient, is no number at certain steps."""

    def __init__(self, inner: nn.Module, steps: set[int], *, backward: bool) -> None:
        super().__init__()
        self.inner, self.steps, self.backward, self.calls = inner, steps, backward, 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        if not self.training:
            return out
        self.calls += 1
        if self.calls not in self.steps:
            return out
        if self.backward:
            out.register_hook(lambda gradient: gradient * math.nan)
            return out
        return out * math.inf


def breaking(config: TrainingConfig, steps: set[int], *, backward: bool) -> CausalLMHead:
    model = new(config)
    model.base_model.norm = Breaks(model.base_model.norm, steps, backward=backward)
    return model


def given(config: TrainingConfig) -> TrainingConfig:
    """Return settings for a model that is given as an object."""
    return replace(config, model=replace(config.model, config=None))


@pytest.mark.parametrize("backward", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(
    backward: bool, root: Path, tmp_path: Path
) -> None:
    tables: dict[str, Any] = {
        "balance": {"bias": 0.01},
        "checkpoint": {"every": 1, "keep": 9},
        "data": {"held_out_sources": [{"paths": [str(root / "held.txt")]}]},
        "evaluation": {"every": 1},
    }
    config = settings(root, tmp_path / "run", "deepseek_v3", **tables)
    heard = Heard()
    train(given(config), model=breaking(config, {3, 4}, backward=backward), report=heard)
    why = "its gradient is not finite" if backward else "its loss is not finite"
    assert [record.skipped for record in heard.records] == [None, None, why, why, None, None]
    states = [
        {
            path.name: path.read_bytes()
            for path in (tmp_path / "run" / f"step-{step:08d}").rglob("*.safetensors")
        }
        for step in (2, 3, 4, 5)
    ]
    assert states[0] == states[1] == states[2] != states[3]
    assert not [save for save in heard.saves if save.best and save.step in (3, 4)]


def test_too_many_of_them_end_the_training_with_the_last_good_one(
    root: Path, tmp_path: Path
) -> None:
    config = settings(
        root, tmp_path / "run", checkpoint={"every": 2}, train={"skips": 1, "steps": 9}
    )
    heard = Heard()
    with pytest.raises(
        DivergedError,
        match=r"2 steps in a row, the last of them step 5, .*the last is .*step-00000004",
    ):
        train(given(config), model=breaking(config, {4, 5}, backward=False), report=heard)
    assert [end.reason for end in heard.ends] == ["failed"]
    assert len(heard.records) == 5


# -- measuring and saving --------------------------------------------------------------------


def test_that_there_is_nothing_to_measure_by_is_told(root: Path, tmp_path: Path) -> None:
    heard = Heard()
    config = settings(root, tmp_path / "run", evaluation={"every": 2}, train={"steps": 1})
    train(config, report=heard)
    assert not heard.evaluations
    assert any("no document is held out" in one for one in heard.warnings)


def test_a_full_disk_is_warned_of_and_told_at_the_end(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(root, tmp_path / "run", checkpoint={"every": 2})
    heard, real = Heard(), disk.make

    def make(directory: Path) -> None:
        if len(heard.records) >= 4:
            raise OSError(28, "No space left on device")
        real(directory)

    monkeypatch.setattr(disk, "make", make)
    with pytest.raises(SaveError, match="No space left") as failed:
        train(config, report=heard)
    assert failed.value.exit_code == 7
    assert len(heard.records) == 6
    assert [save.step for save in heard.saves] == [2]
    assert len([warning for warning in heard.warnings if "is not saved" in warning]) == 2
    monkeypatch.setattr(disk, "make", real)
    again = Heard()
    train(config, resume=True, report=again)
    assert again.losses == {step: heard.losses[step] for step in (3, 4, 5, 6)}


def test_the_best_stays(root: Path, tmp_path: Path) -> None:
    tables: dict[str, Any] = {
        # It only gets worse.
        "optimizer": {"learning_rate": 0.3},
        "data": {"held_out_sources": [{"paths": [str(root / "held.txt")]}]},
        "evaluation": {"every": 2, "prompts": ["Hello"], "max_new_tokens": 2},
        "checkpoint": {"keep": 1},
    }
    heard = Heard()
    result = train(settings(root, tmp_path / "run", **tables), report=heard)
    scores = {found.step: found.score for found in heard.evaluations}
    assert list(scores) == [sample.step for sample in heard.samples] == [2, 4, 6]
    assert result.best == tmp_path / "run" / f"step-{min(scores, key=scores.__getitem__):08d}"
    assert {path.name for path in (tmp_path / "run").glob("step-*")} == {
        result.best.name,
        "step-00000006",
    }


@pytest.mark.parametrize(
    ("budget", "steps"), [({"tokens": 100}, 3), ({"minutes": 1e-9}, 1)], ids=str
)
def test_a_budget_may_be_tokens_or_minutes(
    budget: Mapping[str, float], steps: int, root: Path, tmp_path: Path
) -> None:
    heard = Heard()
    config = settings(root, tmp_path / "run", train={"steps": None, **budget})
    assert train(config, report=heard).step == steps
    assert heard.records[-1].done >= 1


# -- what does not go together -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tables", "error", "told"),
    [
        ("qwen2", {"data": {"context": 64}}, ContextLengthError, "longer than the model's context"),
        ("qwen2", {"objective": {"prediction": 0.3}}, InputError, "Qwen2ForCausalLM has none"),
        ("qwen2", {"data": {"files": "pairs.jsonl"}}, InputError, "holds pairs of answers, and"),
        ("qwen2", {"objective": {"kind": "preference"}}, InputError, "holds texts, and"),
        ("qwen2", {"balance": {"bias": 0.1}}, InputError, "no router with a bias"),
        (
            "deepseek_v3",
            {"balance": {"bias": 0.1}, "adapter": {}},
            ConfigError,
            "leaves as they are",
        ),
        ("qwen2", {"model": {"quantize": "int8"}}, ConfigError, "needs trained weights"),
        ("qwen2", {"train": {"tokens": 5}}, ConfigError, "has steps, tokens: name one budget"),
        ("qwen2", {"train": {"steps": None}}, ConfigError, "has none of them: name one budget"),
        ("qwen2", {"model": {"config": None}}, ConfigError, "model.*from: is missing"),
        ("qwen2", {"tokenizer": {"from": None}}, ConfigError, "tokenizer.*from: is missing"),
        ("qwen2", {"train": {"threads": 1e30}}, ConfigError, "threads = 1.*: may be at most 4096"),
        ("qwen2", {"data": {"batch_rows": 1e9}}, ConfigError, "may have 2,147,483,647 tokens"),
        ("qwen2", {"train": {"step": 5}}, ConfigError, "no such key; the nearest is steps"),
    ],
)
def test_what_does_not_go_together_is_told_before_the_first_step(
    kind: str, tables: dict[str, Any], error: type[Exception], told: str, root: Path, tmp_path: Path
) -> None:
    heard = Heard()
    with pytest.raises(error, match=told):
        train(settings(root, tmp_path / "run", kind, **tables), report=heard)
    assert not heard.records
    assert not list((tmp_path / "run").glob("*"))


class Masked:
    """Data of which nothing is learned."""

    context, documents, tokens, paired, held_out = 16, 1, 3, False, ()

    def parts(self, at: Progress, count: int = 1) -> Iterator[Batch]:
        ids = torch.tensor([[5, 6, 7]])
        yield Batch(input_ids=ids, labels=torch.full_like(ids, -100))

    def fingerprint(self) -> str:
        return ""


def test_data_of_which_nothing_is_learned_is_refused(root: Path, tmp_path: Path) -> None:
    config = settings(root, tmp_path)
    with pytest.raises(InputError, match="no label that counts: all of it is masked"):
        check(config, new(config), build_tokenizer(config), Masked(), Degrees())


def test_a_model_of_which_nothing_is_trained_is_refused(root: Path, tmp_path: Path) -> None:
    config = settings(root, tmp_path / "run")
    with pytest.raises(InputError, match="all its parameters are frozen"):
        train(given(config), model=new(config).requires_grad_(False))


def test_files_without_a_text_are_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    tables = {"data": {"sources": [{"paths": [str(tmp_path / "empty.txt")]}]}}
    with pytest.raises(QuintetError, match=r"empty\.txt|no document"):
        train(settings(root, tmp_path / "run", **tables))


def test_layers_are_recomputed_to_the_same_numbers(root: Path, tmp_path: Path) -> None:
    losses, config = [], settings(root, tmp_path / "run", "zamba2")
    for recompute in (False, True):
        heard, model = Heard(), new(config)
        folder = str(tmp_path / f"run-{recompute}")
        train_settings = replace(config.train, recompute=recompute, folder=folder)
        train(given(replace(config, train=train_settings)), model=model, report=heard)
        losses.append(heard.losses)
        assert not model.is_gradient_checkpointing
    assert losses[0] == losses[1]


def test_a_tokenizer_of_another_model_is_refused(root: Path, tmp_path: Path) -> None:
    config = settings(root, tmp_path / "run")
    values = dict(config.model.config or {})
    small = replace(config, model=replace(config.model, config={**values, "vocab_size": 300}))
    with pytest.raises((InputError, ValueError), match="300"):
        train(small)


def test_two_models_are_one_too_many(root: Path, tmp_path: Path) -> None:
    config = settings(root, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"\[model\] config: names a model, and another one"):
        train(config, model=new(config))


class Nothing(LanguageModelling):
    """An objective for which nothing counts."""

    def counts(self, batch: Batch) -> Mapping[str, int]:
        return {"next_token": 0}

    def terms(self, model: Any, batch: Batch, at: Progress) -> Mapping[str, Term]:
        raise AssertionError("there is nothing to run")


def test_a_step_in_which_nothing_counts_is_left_out(root: Path, tmp_path: Path) -> None:
    config = settings(root, tmp_path)
    data = build_data(config.data, build_tokenizer(config))
    parts = list(data.parts(BEGIN))
    outcome = accumulate(new(config), Nothing(), parts, BEGIN, torch.enable_grad)
    assert outcome.skipped == "no label of it counts"


@pytest.mark.parametrize(
    ("name", "wrong", "told"),
    [
        ("input_ids", 360, "input_ids hold 360, and the model has ids from 0 to 359"),
        ("input_ids", -1, "input_ids hold -1"),
        ("labels", 999, "labels hold 999, .* a label that is not learned is -100"),
        ("labels", -1, "labels hold -1"),
    ],
)
def test_ids_out_of_range_are_named(
    name: str, wrong: int, told: str, root: Path, tmp_path: Path
) -> None:
    config = settings(root, tmp_path)
    data = build_data(config.data, build_tokenizer(config))
    (batch,) = data.parts(BEGIN)
    ids = getattr(batch, name).clone()
    ids[1, 2] = wrong
    with pytest.raises(InputError, match=told):
        accumulate(
            new(config),
            LanguageModelling(),
            [replace(batch, **{name: ids})],
            BEGIN,
            torch.enable_grad,
        )

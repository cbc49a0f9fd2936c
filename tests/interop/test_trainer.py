"""Transformers' Trainer on bridged models: checkpoints that load, and training that is resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from conformance.families import FAMILIES, Family, each
from quintet.interop import as_transformers
from support import relative_error as relative

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
DATA = [
    {"input_ids": torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(n)).tolist()}
    for n in (5, 9, 7, 6, 8, 5, 9, 4)
]
IDS = torch.arange(6)[None]


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    texts = [torch.tensor(row["input_ids"]) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(texts, batch_first=True),
        "attention_mask": pad([torch.ones_like(t) for t in texts], batch_first=True),
        "labels": pad(texts, batch_first=True, padding_value=-100),
    }


def trained(model: Any, path: Path, resume: str | None = None, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        learning_rate=1e-3,
        **options,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=DATA, eval_dataset=DATA[:4], data_collator=collate
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def fresh(family: Family, seed: int, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return as_transformers(family.cls("ForCausalLM")(family.config(**changes)))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


@each
@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_load_and_training_resumes(family: Family, tied: bool, tmp_path: Path) -> None:
    cls = family.cls("ForCausalLM")
    whole = trained(fresh(family, 0, tie_word_embeddings=tied), tmp_path / "whole")
    last = cls.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    best = cls.from_pretrained(whole.state.best_model_checkpoint)
    assert torch.equal(logits(whole.model), logits(best))
    trained(
        fresh(family, 9, tie_word_embeddings=tied),
        tmp_path / "resumed",
        resume=str(tmp_path / "whole" / "checkpoint-2"),
    )
    resumed = cls.from_pretrained(tmp_path / "resumed" / "checkpoint-4")
    assert torch.equal(logits(resumed), logits(last))
    # Transformers unties the shared blocks of an untied Zamba2, too.
    if tied or family.name != "zamba2":
        there = getattr(transformers, family.prefix + "ForCausalLM")
        read = there.from_pretrained(tmp_path / "whole" / "checkpoint-4")
        assert relative(logits(last), logits(read)) < 1e-5


@each
def test_losses_are_those_of_transformers(family: Family, tmp_path: Path) -> None:
    torch.manual_seed(3)
    # There the balance loss of DeepSeek-V2 is ignored.
    alone = {"aux_loss_alpha": 0.0} if family.name == "deepseek-v2" else {}
    changes = {"tie_word_embeddings": True, **alone}
    ours, theirs = family.twins("ForCausalLM", changes, "sdpa")
    here, there = (
        [line["loss"] for line in trained(model, tmp_path / name).state.log_history[:2]]
        for name, model in (("here", as_transformers(ours)), ("there", theirs))
    )
    assert here == pytest.approx(there, rel=1e-5)


@each
def test_bfloat16_training(family: Family, tmp_path: Path) -> None:
    trainer = trained(fresh(family, 0), tmp_path, bf16=True)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    family.cls("ForCausalLM").from_pretrained(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[3]], ids=str)
def test_a_classifier_is_trained(family: Family, tmp_path: Path) -> None:
    data = [{**row, "label": n % 2} for n, row in enumerate(DATA)]

    def labelled(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {**collate(rows), "labels": torch.tensor([row["label"] for row in rows])}

    model = as_transformers(family.model_of("ForSequenceClassification"))
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, log_level="error"
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data, data_collator=labelled)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = family.cls("ForSequenceClassification").from_pretrained(tmp_path / "saved")
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        assert torch.equal(again(IDS, mask).logits, model.eval()(IDS, mask).logits)


@each
def test_evaluation_generates(family: Family, tmp_path: Path) -> None:
    data = [{"input_ids": [5, 6, 7 + n], "labels": [5, 6, 7 + n]} for n in range(4)]
    model = family.model_of(eos_token_id=None, pad_token_id=0)
    seen: list[Any] = []

    def metrics(told: Any) -> dict[str, float]:
        seen.append(told.predictions)
        return {"width": told.predictions.shape[1]}

    arguments = transformers.Seq2SeqTrainingArguments(
        str(tmp_path),
        predict_with_generate=True,
        generation_max_length=9,
        max_steps=1,
        save_strategy="no",
        per_device_eval_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )
    trainer = transformers.Seq2SeqTrainer(
        model, arguments, train_dataset=data, eval_dataset=data, compute_metrics=metrics
    )
    trainer.train()
    assert trainer.evaluate()["eval_width"] >= 9
    ids = torch.tensor([row["input_ids"] for row in data[:2]])
    wanted = model.eval().generate(ids, max_length=9)
    assert torch.equal(torch.from_numpy(seen[0][:2, :9]), wanted)
    assert trainer.predict(data).predictions.shape[0] == 4

"""Transformers' Trainer and accelerate get from our models what they get from Transformers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor

from comparisons import TOLERANCE
from conformance.families import FAMILIES, Family, each
from conformance.heads import ids_of, labels_of, made, result

LENGTHS = (9, 4, 6, 2, 8, 3, 7, 5)


def ragged_rows(classes: bool = False) -> list[dict[str, Any]]:
    """Texts of unequal length, each an item of a dataset."""
    torch.manual_seed(3)
    rows = [{"input_ids": torch.randint(1, 101, (length,))} for length in LENGTHS]
    for index, row in enumerate(rows):
        row["labels"] = torch.tensor(index % 3) if classes else row["input_ids"]
    return rows


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    def joined(tensors: list[Tensor], value: int) -> Tensor:
        if tensors[0].ndim == 0:
            return torch.stack(tensors)
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": joined(ids, 0),
        "attention_mask": joined([torch.ones_like(x) for x in ids], 0),
        "labels": joined([row["labels"] for row in rows], -100),
    }


def losses(model: Any, folder: Path, rows: list[dict[str, Any]], **options: Any) -> list[float]:
    """What a Trainer logs in some steps, and then in evaluating."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_eval_batch_size=3,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        **{"per_device_train_batch_size": 2, **options},
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=padded
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*logged, trainer.evaluate()["eval_loss"]]


@pytest.mark.parametrize("accumulated", [1, 2])
@each
def test_a_trainer_sees_the_same_losses(family: Family, accumulated: int, tmp_path: Path) -> None:
    # The balance loss of DeepSeek-V2 is ours alone.
    own = {"aux_loss_alpha": 0.0} if family.name == "deepseek-v2" else {}
    ours, theirs = family.twins("ForCausalLM", {**family.alone, **own}, "eager")
    rows = ragged_rows()
    options = {"gradient_accumulation_steps": accumulated}
    told = losses(theirs, tmp_path, rows, **options)
    assert losses(ours, tmp_path, rows, **options) == pytest.approx(told, rel=TOLERANCE)


def test_the_balance_of_experts_is_counted_as_there(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "qwen2-moe")
    ours, theirs = family.twins("ForCausalLM", {"output_router_logits": True}, "eager")
    options = {"gradient_accumulation_steps": 2}
    told = losses(theirs, tmp_path, ragged_rows(), **options)
    assert losses(ours, tmp_path, ragged_rows(), **options) == pytest.approx(told, rel=TOLERANCE)


@each
def test_accumulating_classes_is_the_whole_batch(family: Family, tmp_path: Path) -> None:
    rows, told = ragged_rows(classes=True), []
    for size, accumulated in ((4, 1), (2, 2)):
        model = family.model_of("ForSequenceClassification", num_labels=3, pad_token_id=0)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        told.append(losses(model, tmp_path, rows, **options))
    assert told[1] == pytest.approx(told[0], rel=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("head", ["Model", "ForCausalLM", "ForTokenClassification"])
@each
def test_what_maps_over_outputs_gives_them_back(family: Family, head: str) -> None:
    model = made(family, head).to(torch.bfloat16)
    ids = ids_of()
    expected = model(ids, **labels_of(head))
    told = convert_outputs_to_fp32(model.forward)(input_ids=ids, **labels_of(head))
    assert type(told) is type(expected)
    assert list(told) == list(expected)
    assert result(told).dtype == torch.float32
    assert torch.equal(result(told), result(expected).float())


@each
def test_accelerate_trains_in_bfloat16(family: Family) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = made(family, "ForCausalLM").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    ids = ids_of()
    out = wrapped(input_ids=ids, labels=ids)
    assert out.logits.dtype == torch.float32
    accelerator.backward(out.loss)
    assert model.lm_head.weight.grad is not None


@each
def test_a_trainer_recomputes_layers_with_the_same_losses(family: Family, tmp_path: Path) -> None:
    told, found = (
        losses(family.model_of("ForCausalLM"), tmp_path, ragged_rows(), **options)
        for options in (
            {},
            {
                "activation_checkpointing": True,
                "activation_checkpointing_kwargs": {"use_reentrant": True, "every_n_layers": 2},
            },
        )
    )
    assert found == pytest.approx(told, rel=1e-4)

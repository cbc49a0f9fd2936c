"""TRL's trainers on bridged models see the losses of Transformers' models."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.families import FAMILIES, Family, each
from outside import pair, saved, tokenizer, tool
from quintet.interop import as_transformers
from quintet.training.batch import Batch
from quintet.training.objectives import Preference
from quintet.training.objectives.preference import PreferenceLoss
from quintet.training.progress import Progress
from support import relative_error

trl = tool("trl")
datasets = tool("datasets")
peft = tool("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

CHATS = [
    {
        "messages": [
            {"role": "user", "content": "Hello there" * (1 + n % 3)},
            {"role": "assistant", "content": "how are you today" * (1 + n % 4)},
        ]
    }
    for n in range(8)
]
PREFERENCES = [
    {
        "prompt": [{"role": "user", "content": "Hello" * (1 + n % 3)}],
        "chosen": [{"role": "assistant", "content": "how are you" * (1 + n % 2)}],
        "rejected": [{"role": "assistant", "content": "brief"}],
    }
    for n in range(8)
]
PROMPTS = [{"prompt": [{"role": "user", "content": "Hello" * (1 + n % 3)}]} for n in range(4)]


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
        "save_strategy": "no",
        **changes,
    }


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def tuned(model: Any, folder: Path, **changes: Any) -> Any:
    peft_config = changes.pop("peft_config", None)
    return trl.SFTTrainer(
        model,
        args=trl.SFTConfig(max_length=64, **options(folder, **changes)),
        train_dataset=datasets.Dataset.from_list(CHATS),
        processing_class=tokenizer().to_transformers(),
        peft_config=peft_config,
    )


SFT: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packing": True, "gradient_checkpointing": False},
    "accumulated": {
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
}


@pytest.mark.parametrize("kind", SFT)
@each
def test_fine_tuning(family: Family, kind: str, tmp_path: Path) -> None:
    ours, theirs = pair(family)
    here = losses(tuned(as_transformers(ours), tmp_path, **SFT[kind]))
    if (family.name, kind) == ("zamba2", "packed"):
        # There texts of a row are kept apart only with mamba_ssm.
        assert here[1] < here[0]
        return
    assert here == pytest.approx(losses(tuned(theirs, tmp_path, **SFT[kind])), rel=1e-4)


def test_a_checkpoint_of_fine_tuning_loads(tmp_path: Path) -> None:
    ours, _ = pair(FAMILIES[0])
    trainer = tuned(as_transformers(ours), tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    again = FAMILIES[0].cls("ForCausalLM").from_pretrained(tmp_path / "checkpoint-2")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize("quantize", ["int8", "int4", "nf4"])
@each
def test_fine_tuning_an_adapter_on_few_bits(family: Family, quantize: str, tmp_path: Path) -> None:
    cls, where = family.cls("ForCausalLM"), saved(family, tmp_path / "model")
    model = as_transformers(cls.from_pretrained(where, quantize=quantize))
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    trainer = tuned(model, tmp_path / "out", peft_config=config, learning_rate=1e-2, max_steps=4)
    told = losses(trainer)
    assert told[-1] < told[0]
    trainer.save_model(str(tmp_path / "adapter"))
    fresh = as_transformers(cls.from_pretrained(where, quantize=quantize))
    again = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        made, wanted = (m.eval()(input_ids=ids).logits for m in (again, trainer.model))
    # TRL trains the adapter in bfloat16.
    assert relative_error(made, wanted) < 1e-2


@each
def test_preferences(family: Family, tmp_path: Path) -> None:
    cls, where = family.cls("ForCausalLM"), saved(family, tmp_path / "model")
    theirs = pair(family)[1]
    told = []
    for model, reference in (
        (as_transformers(cls.from_pretrained(where)), as_transformers(cls.from_pretrained(where))),
        (as_transformers(cls.from_pretrained(where)), None),  # TRL loads Transformers' model.
        (theirs, pair(family)[1]),
    ):
        trainer = trl.DPOTrainer(
            model,
            reference,
            args=trl.DPOConfig(**options(tmp_path / "out")),
            train_dataset=datasets.Dataset.from_list(PREFERENCES),
            processing_class=tokenizer().to_transformers(),
        )
        told.append(losses(trainer))
    assert told[0] == pytest.approx(told[2], rel=1e-3)
    assert told[1] == pytest.approx(told[2], rel=1e-3)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_our_objective_of_preferences_is_theirs(loss: PreferenceLoss, tmp_path: Path) -> None:
    (ours, theirs), (our_reference, reference) = pair(FAMILIES[0]), pair(FAMILIES[0])
    ours.lm_head.weight.data *= 1.5
    theirs.lm_head.weight.data *= 1.5
    settings = {"loss_type": [loss], "beta": 0.3}
    trainer = trl.DPOTrainer(
        theirs,
        reference,
        args=trl.DPOConfig(**settings, **options(tmp_path)),
        train_dataset=datasets.Dataset.from_list(PREFERENCES),
        processing_class=tokenizer().to_transformers(),
    )
    rows = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model, rows)
    batch = Batch(
        input_ids=rows["input_ids"],
        labels=rows["input_ids"].masked_fill(rows["completion_mask"] == 0, -100),
        attention_mask=rows["attention_mask"],
    )
    objective = Preference(0.3, loss=loss, reference=our_reference)
    term = objective.terms(ours, batch, Progress(step=0, tokens=0, done=0.0))["preference"]
    assert relative_error(term.sum / term.count, expected) < 1e-5


@each
def test_rewards(family: Family, tmp_path: Path) -> None:
    told = []
    for model in pair(family, "ForSequenceClassification", num_labels=1):
        trainer = trl.RewardTrainer(
            model,
            args=trl.RewardConfig(**options(tmp_path)),
            train_dataset=datasets.Dataset.from_list(PREFERENCES),
            processing_class=tokenizer().to_transformers(),
        )
        told.append(losses(trainer))
    assert told[0] == pytest.approx(told[1], rel=1e-3)


@each
def test_policies(family: Family, tmp_path: Path) -> None:
    seen: list[str] = []

    def reward(completions: list[Any], **others: Any) -> list[float]:
        seen.extend(completion[0]["content"] for completion in completions)
        return [float(len(completion[0]["content"])) for completion in completions]

    model = as_transformers(pair(family)[0])
    before = model.lm_head.weight.clone()
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=reward,
        args=trl.GRPOConfig(
            num_generations=2, max_completion_length=6, **options(tmp_path, save_strategy="steps")
        ),
        train_dataset=datasets.Dataset.from_list(PROMPTS),
        processing_class=tokenizer().to_transformers(),
    )
    trainer.train()
    assert len(set(seen)) > 1
    assert not torch.equal(model.lm_head.weight, before)
    family.cls("ForCausalLM").from_pretrained(tmp_path / "checkpoint-2")

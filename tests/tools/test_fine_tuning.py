"""Fine-tuning as its guide shows it: a model that talks is taught; TRL's numbers of preferences."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from conformance.families import FAMILIES
from outside import saved, tool
from quintet import AutoModelForCausalLM, AutoTokenizer
from quintet.cli.main import cli
from quintet.conversion import convert
from quintet.training import TrainingConfig, train
from quintet.training.data import build_data
from quintet.training.objectives import Preference
from quintet.training.progress import Progress
from quintet.training.records import Silent, StepRecord
from quintet.training.settings import build, read

trl = tool("trl")
datasets = tool("datasets")
peft = tool("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TAUGHT = {
    "What is your name?": "Quintus",
    "Where do you live?": "Ravello",
    "What's your name, please?": "Quintus",
    "Introduce yourself in one sentence.": "Quintus",
}
KNOWN = {"What is the capital of France?": "Paris", "What is 2+2?": "four"}


class Remembering(Silent):
    """Keeps what is told of steps."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)


def answer(model: Any, tokenizer: Any, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    text: str = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def example(name: str, folder: Path, *changes: str) -> TrainingConfig:
    """A configuration of `examples/` that is run in another folder."""
    cached = f'data.cache="{folder / "cache"}"'
    return read(
        TrainingConfig, EXAMPLES / name, [f'train.folder="{folder / "run"}"', cached, *changes]
    )


def test_a_model_that_talks_learns_who_it_is(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    before = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for question, word in TAUGHT.items():
        assert word not in answer(before, tokenizer, question)
    told = Remembering()
    result = train(example("sft.toml", tmp_path), report=told)
    losses = [record.loss for record in told.steps]
    assert losses[-1] < 0.2 * losses[0]
    for question, word in {**TAUGHT, **KNOWN}.items():
        assert word in answer(result.model, tokenizer, question), question

    said = CliRunner().invoke(
        cli, ["chat", "smollm2", "--adapter", str(result.path)], input="What is your name?\n"
    )
    assert "Quintus" in said.output

    convert(smollm2, tmp_path / "base", quantize="none", dtype="bfloat16")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32
    )
    ids = tokenizer("The capital of France is Paris, and my", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        bare = float((ours(ids).logits - theirs(input_ids=ids).logits).norm())
        ours.load_adapter(result.path)
        there = peft.PeftModel.from_pretrained(theirs, result.path).eval()
        mine, other = ours(ids).logits, there(input_ids=ids).logits
    # No farther from each other than without it, which is what float32 rounds.
    assert float((mine - other).norm() / other.norm()) < 3e-6
    assert float((mine - other).norm()) < 3 * bare


def test_a_model_that_talks_learns_what_is_preferred(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    told = Remembering()
    result = train(example("dpo.toml", tmp_path), report=told)
    first, *_, last = told.steps
    assert first.loss == pytest.approx(0.6931, abs=1e-3)
    assert last.terms["reward_margin"] > 0.5
    path = EXAMPLES / "fine_tuning" / "held_pairs.jsonl"
    held = example("dpo.toml", tmp_path, f'data.sources=[{{paths=["{path}"]}}]').data
    data = build_data(held, result.tokenizer, vocab_size=result.model.config.vocab_size)
    start = Progress(0, 0, 0.0)
    (batch,) = data.parts(start)
    with torch.no_grad():
        terms = Preference(0.1).terms(result.model, batch, start)
    assert float(terms["reward_accuracy"].sum) == 4


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_preferences_are_learned_in_the_steps_of_trl(loss: str, tmp_path: Path) -> None:
    """All pairs in a step, so that their order is no matter; as texts, which have no template.

    What a template writes behind an answer is learned there, and here what ends the answer is the
    last.
    """
    where = saved(FAMILIES[0], tmp_path / "model")
    words = ("Hello there", "how are you", "brief", "the lazy dog")
    pairs = [
        {
            "prompt": words[n % 4] * (1 + n % 2),
            "chosen": " " + words[(n + 1) % 4] * (1 + n % 3),
            "rejected": " " + words[(n + 2) % 4],
        }
        for n in range(6)
    ]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(where)
    trainer = trl.DPOTrainer(
        theirs,
        transformers.AutoModelForCausalLM.from_pretrained(where),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=4,
            logging_steps=1,
            per_device_train_batch_size=6,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            beta=0.3,
            loss_type=loss,
            bf16=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(where).to_transformers(),
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]

    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tables = {
        "model": {"from": str(where)},
        "data": {
            "sources": [{"paths": [str(tmp_path / "pairs.jsonl")]}],
            "context": 128,
            "batch_rows": 6,
            "cache": str(tmp_path / "cache"),
        },
        "objective": {"kind": "preference", "beta": 0.3, "loss": loss},
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.0},
        "train": {"steps": 4, "folder": str(tmp_path / "run")},
    }
    told = Remembering()
    train(build(TrainingConfig, tables), report=told)
    ours = [record.loss for record in told.steps]
    assert ours == pytest.approx([line["loss"] for line in logged], rel=1e-4)
    margins = [record.terms["reward_margin"] for record in told.steps]
    if loss == "sigmoid":  # There IPO's margins are of sums, and not of means over tokens.
        assert margins == pytest.approx(
            [line["rewards/margins"] for line in logged], rel=1e-3, abs=1e-5
        )

"""The ablation's arms are settings that hold, and its results become a table and pictures."""

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "ablation.py"


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablation", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arms_differ_in_what_they_are_named_after_and_nothing_else(
    ablation: ModuleType, tmp_path: Path
) -> None:
    options = argparse.Namespace(out=tmp_path, seed=0, every=50)
    made = {arm: ablation.settings(arm, "steps", {"steps": 10}, options) for arm in ablation.ARMS}
    assert len(made) == 6
    for arm, config in made.items():
        assert (config.objective.prediction is not None) == arm.startswith("prediction-")
        assert config.model.config["num_nextn_predict_layers"] == arm.startswith("prediction-")
        assert (config.balance.bias is not None) == arm.endswith("-bias")
        assert (config.balance.auxiliary is not None) == arm.endswith("-auxiliary")
        assert config.train.folder == str(tmp_path / "steps" / arm)
    for part in ("data", "optimizer", "evaluation", "tokenizer"):
        assert len({repr(getattr(config, part)) for config in made.values()}) == 1


def test_results_are_told_as_lines_and_as_a_table(ablation: ModuleType, tmp_path: Path) -> None:
    line = {
        "series": "steps",
        "arm": "prediction-bias",
        "bits_per_byte": 1.23456,
        "agreement": 0.5,
        "steps": 1200,
        "tokens": 4915200,
        "tokens_per_second": 3000.4,
        "minutes": 27.0,
        "max_violation": 0.1,
        "worst_violation": 0.2,
        "held_out_violation": 0.15,
    }
    assert ablation.told(line) == (
        "| steps | prediction | bias | 1.2346 | 1,200 | 3,000 | 0.10 | 0.20 | 0.15 | 50.0% |"
    )
    assert ablation.HEAD.count("|") // 2 == ablation.told(line).count("|")
    ablation.write(tmp_path / "result.json", json.dumps(line))
    assert json.loads((tmp_path / "result.json").read_text()) == line
    assert not (tmp_path / "result.new").exists()

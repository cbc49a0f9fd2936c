"""What loading takes of memory at most, and that a bar shows what takes long."""

import io
import json
import os
from pathlib import Path

import pytest

from forking import Forks
from quintet import Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM
from quintet.modeling.progress import progress_bar

MEGABYTE = 2**20
ALLOWED = 200_000_000
# Resident memory in a process of its own, sampled from outside of the code that loads.
SCRIPT = """
import json, sys, threading, time
from pathlib import Path
import torch
from quintet import AutoConfig, AutoModelForCausalLM
import quintet.models.qwen2, quintet.models.qwen2_moe

torch.set_num_threads(1)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

peak, done = 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.001)

before = resident()
watcher = threading.Thread(target=watch)
watcher.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **json.loads(sys.argv[2]))
done = True
watcher.join()
final = sum(t.nbytes for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
print(json.dumps({"peak": peak - before, "final": final}))
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 400 MB in float32, in shards of 50 MB."""
    root = tmp_path_factory.mktemp("dense")
    config = Qwen2Config(
        vocab_size=20_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(root, max_shard_size="50MB")
    return root


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 400 MB in float32, nearly all of it experts, in one file."""
    root = tmp_path_factory.mktemp("experts")
    config = Qwen2MoeConfig(
        vocab_size=1000,
        hidden_size=512,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_experts=32,
        num_experts_per_tok=2,
    )
    Qwen2MoeForCausalLM(config).save_pretrained(root)
    return root


def measured(forks: Forks, root: Path, **options: str) -> tuple[int, int]:
    done = forks.run(SCRIPT, root, json.dumps(options), environment=os.environ)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"], found["final"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "bfloat16"}, {"quantize": "int8"}],
    ids=["as-saved", "converted", "int8"],
)
def test_no_more_than_the_model_a_shard_and_a_little(
    dense: Path, options: dict[str, str], forks: Forks
) -> None:
    shard = max(path.stat().st_size for path in dense.glob("*.safetensors"))
    peak, final = measured(forks, dense, **options)
    assert shard < 100 * MEGABYTE
    assert peak <= final + shard + ALLOWED


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}], ids=["as-saved", "converted"])
def test_experts_are_stacked_as_they_come(
    experts: Path, options: dict[str, str], forks: Forks
) -> None:
    # One file is one shard; but what has been read is given back, so that far less is needed.
    peak, final = measured(forks, experts, **options)
    assert (experts / "model.safetensors").stat().st_size > 400_000_000
    assert peak <= final + ALLOWED


# -- the bar -----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, seconds: float) -> str:
    """Return what a bar writes of 4 GB, one after so many seconds each."""
    now = [0.0]
    monkeypatch.setattr("sys.stderr", stream)
    with progress_bar("loading", 4_000_000_000) as bar:
        bar._time = lambda: now[0]
        bar.start_t = bar.last_print_t = 0.0
        for _ in range(4):
            now[0] += seconds
            bar.update(1_000_000_000)
    return stream.getvalue()


def test_a_long_load_shows_a_bar_and_takes_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run(monkeypatch, Terminal(), 1.1)
    assert "loading:  50%|" in shown
    assert "2.00G/4.00G" in shown
    assert shown.endswith(" \r"), "nothing stays"


def test_short_loads_pipes_and_those_who_asked_see_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, Terminal(), 0.2) == ""
    assert run(monkeypatch, io.StringIO(), 5.0) == ""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    assert run(monkeypatch, Terminal(), 5.0) == ""


def test_without_a_standard_error_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    with progress_bar("loading", 0) as bar:
        bar.update(0)

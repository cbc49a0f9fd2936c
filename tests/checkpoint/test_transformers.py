"""Files travel both ways between here and Transformers."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from quintet.checkpoint import Checkpoint, save


@pytest.fixture(scope="module")
def theirs() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config)


@pytest.mark.parametrize("size", ["5GB", "5KB"], ids=["one", "sharded"])
def test_what_is_saved_here_loads_there_and_the_other_way_round(
    tmp_path: Path, theirs: Qwen2ForCausalLM, size: str
) -> None:
    weights = theirs.state_dict()
    texts = {"config.json": theirs.config.to_json_string()}
    paths = save(tmp_path / "ours", weights, max_shard_size=size, text_files=texts)
    assert (len(paths) > 2) == (size == "5KB")
    loaded, report = Qwen2ForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[name]), name

    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    checkpoint = Checkpoint.open(tmp_path / "theirs")
    read = dict(checkpoint.read(checkpoint.tensors))
    assert set(read) == set(weights)
    assert all(torch.equal(read[name], weights[name]) for name in weights)


def test_each_can_save_over_the_other(tmp_path: Path, theirs: Qwen2ForCausalLM) -> None:
    weights = {name: tensor + 1 for name, tensor in theirs.state_dict().items()}
    # Not from one file to shards: Transformers then leaves the one, and reads it again.
    for size in ("5KB", "5KB", "5GB", "5GB"):
        theirs.save_pretrained(tmp_path, max_shard_size=size)
        first = dict(Checkpoint.open(tmp_path).read(["lm_head.weight"]))
        assert torch.equal(first["lm_head.weight"], theirs.lm_head.weight)
        save(tmp_path, weights, max_shard_size=size)
        second = dict(Checkpoint.open(tmp_path).read(["lm_head.weight"]))
        assert torch.equal(second["lm_head.weight"], weights["lm_head.weight"])

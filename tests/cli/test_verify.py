"""`quintet verify`: all that is wrong with a model's files, at once."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quintet import AutoModelForCausalLM, AutoModelForSequenceClassification
from quintet.modeling.loading import NewHeadWarning

FILE = "model.safetensors"


@pytest.fixture
def root(chat_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chat_model, tmp_path / "model"))


def verified(quintet: Any, *arguments: object) -> Any:
    result = quintet("verify", *arguments, "--json")
    facts = json.loads(result.out)
    assert result.code == (0 if facts["ok"] else 4)
    assert facts["ok"] == (not facts["problems"]) == (result.err == "")
    return facts


def change(root: Path, name: str, tensor: torch.Tensor | None) -> None:
    weights = load_file(root / FILE)
    weights.pop(name)
    if tensor is not None:
        weights[name] = tensor
    save_file(weights, root / FILE, {"format": "pt"})


def sums(root: Path) -> str:
    files = sorted(root.glob("*.safetensors"))
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    return "".join(lines)


def test_a_whole_model(quintet: Any, root: Path) -> None:
    facts = verified(quintet, root)
    assert facts["ok"] is True
    assert facts["tensors"] == len(load_file(root / FILE))
    assert facts["hashes"] == "none known"
    assert "ok" in quintet("verify", root).out


def test_everything_wrong_is_named_at_once(quintet: Any, root: Path) -> None:
    norm = load_file(root / FILE)["model.norm.weight"].clone()
    norm[3], norm[5] = float("nan"), float("inf")
    change(root, "model.norm.weight", norm)
    change(root, "model.layers.0.input_layernorm.weight", torch.ones(31))
    change(root, "model.layers.1.mlp.up_proj.weight", None)
    (root / "tokenizer.json").write_text("{")
    facts = verified(quintet, root)
    assert len(facts["problems"]) == 3
    text = "\n".join(facts["problems"])
    assert "1 missing:\n  model.layers.1.mlp.up_proj.weight: expected [48, 32]" in text
    assert "input_layernorm.weight: expected [32], found [31]" in text
    assert f"{FILE}: model.norm.weight has 2 numbers that are not finite" in text
    assert "tokenizer.json' is not a readable tokenizer" in text
    quick = verified(quintet, root, "--quick")
    assert len(quick["problems"]) == 2, "no data is read"


def test_extra_tensors_and_a_truncated_file(quintet: Any, root: Path) -> None:
    weights = {**load_file(root / FILE), "model.layers.9.odd": torch.ones(2)}
    save_file(weights, root / FILE, {"format": "pt"})
    assert verified(quintet, root)["problems"] == ["model.layers.9.odd is no tensor of this model"]
    whole = (root / FILE).read_bytes()
    (root / FILE).write_bytes(whole[:-7])
    (problem,) = verified(quintet, root)["problems"]
    assert "is truncated" in problem
    assert "7 too few" in problem


def test_hashes_from_a_list(quintet: Any, root: Path, tmp_path: Path) -> None:
    listed = tmp_path / "sums"
    listed.write_text(sums(root))
    assert verified(quintet, root, "--hashes", listed)["hashes"] == "1 of 1 right"
    # One bit of the data: sizes and names are as before, and the number is a number.
    raw = bytearray((root / FILE).read_bytes())
    raw[-4] ^= 1
    (root / FILE).write_bytes(raw)
    (problem,) = verified(quintet, root, "--hashes", listed)["problems"]
    assert problem.startswith(f"{FILE} has the SHA-256 ")
    listed.write_text(f"{'0' * 64}  other.safetensors\n")
    (problem,) = verified(quintet, root, "--hashes", listed)["problems"]
    assert problem == "other.safetensors is not there, and has a hash"


@pytest.mark.parametrize("text", ["nonsense\n", f"{'0' * 64}  ../x\n"], ids=["text", "path"])
def test_a_list_that_is_none_is_refused(
    quintet: Any, root: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "sums").write_text(text)
    result = quintet("verify", root, "--hashes", tmp_path / "sums")
    assert result.code == 2
    assert "as sha256sum writes them" in result.err


def test_hashes_from_the_names_of_blobs_and_from_notes(quintet: Any, root: Path) -> None:
    digest = hashlib.sha256((root / FILE).read_bytes()).hexdigest()
    note = root / ".cache" / "huggingface" / "download" / f"{FILE}.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"commit\n{digest}\n1700000000.0\n")
    assert verified(quintet, root)["hashes"] == "1 of 1 right"
    note.write_text(f"commit\n{'0' * 64}\n1700000000.0\n")
    assert "has the SHA-256" in verified(quintet, root)["problems"][0]
    snapshot = root.parent / "models--a--b" / "snapshots" / "abc"
    shutil.copytree(root, snapshot)
    blob = snapshot.parent.parent / "blobs" / digest
    blob.parent.mkdir()
    shutil.move(snapshot / FILE, blob)
    (snapshot / FILE).symlink_to(blob)
    assert verified(quintet, snapshot)["hashes"] == "1 of 1 right"


def test_the_class_that_was_saved_is_what_is_expected(quintet: Any, root: Path) -> None:
    with pytest.warns(NewHeadWarning):
        model = AutoModelForSequenceClassification.from_pretrained(root, num_labels=3)
    model.save_pretrained(root / "classifier")
    assert verified(quintet, root / "classifier")["ok"] is True
    quantised = AutoModelForCausalLM.from_pretrained(root, quantize="int8")
    quantised.save_pretrained(root / "int8")
    assert verified(quintet, root / "int8")["ok"] is True


def test_a_vocabulary_that_the_model_lacks(quintet: Any, root: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(root)
    model.resize_token_embeddings(300)
    model.save_pretrained(root)
    (problem,) = verified(quintet, root)["problems"]
    assert problem == "the tokenizer has the id 359, and the model a vocabulary of 300"


def test_what_is_not_here(quintet: Any, root: Path, tmp_path: Path) -> None:
    assert quintet("verify", tmp_path / "nothing").code == 3
    assert quintet("verify", "owner/name", "--cache-dir", tmp_path).code == 6

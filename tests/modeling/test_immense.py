"""A config that asks for more than its files hold: refused at once, and nothing is allocated."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import torch

import quintet
from conformance.families import FAMILIES, Family, each
from quintet.errors import CheckpointError, ConfigError, QuintetError
from quintet.modeling.init_on_meta import init_on_meta

IMMENSE = (10**6, 2**24, 2**31, 10**19)
# Room for the models of the tests, and for none of the tensors that are asked for.
LIMITED = """
import json, resource, sys, time, warnings
import quintet
from quintet import AutoModelForCausalLM
from quintet.errors import QuintetError
warnings.simplefilter("ignore")
used = int(open("/proc/self/statm").read().split()[0]) * 4096
tried = json.load(sys.stdin)
for root in tried:
    AutoModelForCausalLM.from_pretrained(root)
resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000,) * 2)
for root, changes in tried.items():
    config = json.load(open(root + "/config.json"))
    for changed in changes:
        json.dump({**config, **changed}, open(root + "/config.json", "w"))
        began = time.process_time()
        try:
            AutoModelForCausalLM.from_pretrained(root)
            found = "loaded"
        except QuintetError as error:
            found = type(error).__name__
        print(json.dumps([root, changed, found, time.process_time() - began]))
"""
# Keys that make no tensor larger.
LENGTHS = {
    *("max_position_embeddings", "sliding_window", "max_window_layers", "chunk_size"),
    *("first_k_dense_replace", "moe_layer_freq", "decoder_sparse_step", "pretraining_tp"),
    *("bos_token_id", "eos_token_id", "num_logits_to_keep", "mlp_only_layers", "layer_types"),
}


def numbers(family: Family) -> list[str]:
    """The keys of a family's config that take an integer."""

    def integer(hint: Any) -> bool:
        if get_origin(hint) is Annotated:
            return integer(get_args(hint)[0])
        return hint is int or any(integer(option) for option in get_args(hint))

    hints = family.cls("Config").declared_keys()
    mappings = {"id2label", "label2id", "rope_parameters"}
    return [key for key, hint in hints.items() if integer(hint) and key not in mappings]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_sizes_that_no_file_backs_are_refused_at_once(tmp_path: Path) -> None:
    tried: dict[str, list[dict[str, Any]]] = {}
    stated: set[tuple[str, str]] = set()
    for family in FAMILIES:
        root = tmp_path / family.name
        family.model_of().save_pretrained(root)
        values = json.loads((root / "config.json").read_text())
        stated |= {(str(root), key) for key in values if key not in LENGTHS}
        keys = numbers(family)
        tried[str(root)] = [{key: value} for key in keys for value in IMMENSE]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        input=json.dumps(tried),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == sum(map(len, tried.values())) > 300
    assert not [line for line in said if line[3] > 1]
    loaded = {
        (root, key) for root, changed, found, _ in said if found == "loaded" for key in changed
    }
    assert not loaded & stated, loaded & stated


@each
def test_lists_of_a_million_are_refused(family: Family) -> None:
    for key in ("eos_token_id", "layer_types"):
        item: Any = 0 if key == "eos_token_id" else "full_attention"
        if key == "layer_types" and "Deepseek" in family.prefix:
            continue
        with pytest.raises(ConfigError) as error:
            family.config(**{key: [item] * 10**6})
        assert len(str(error.value)) < 500


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@each
def test_a_config_set_to_more_is_refused_where_a_model_is_made_of_it(family: Family) -> None:
    for key in numbers(family):
        config = family.config()
        setattr(config, key, 2**24)
        with suppress(QuintetError):
            init_on_meta(family.cls("ForCausalLM"), config)
        if key in LENGTHS:
            continue
        setattr(config, key, 10**19)
        with pytest.raises(ConfigError, match=key), torch.device("meta"):
            family.cls("ForCausalLM")(config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("long", ["a" * 100_000, ["a"] * 50_000], ids=["text", "list"])
@each
def test_no_message_repeats_a_long_value(family: Family, long: Any, tmp_path: Path) -> None:
    values = family.model_of(**family.shallow).config.to_dict()
    said = {}
    for name in values:
        (tmp_path / "config.json").write_text(json.dumps({**values, name: long}))
        try:
            config = quintet.AutoConfig.from_pretrained(tmp_path)
            with torch.device("meta"):
                quintet.AutoModelForCausalLM.from_config(config)
        except QuintetError as error:
            said[name] = str(error)
    assert len(said) > 20
    assert not [name for name, message in said.items() if len(message) >= 5000]


def test_the_largest_released_model_is_within_bounds() -> None:
    config = quintet.DeepseekV3Config(num_nextn_predict_layers=1)
    model = init_on_meta(quintet.DeepseekV3ForCausalLM, config)
    assert model.num_parameters() > 671e9


@each
def test_a_padding_token_outside_of_the_vocabulary_is_named(family: Family) -> None:
    config = family.config()
    for value in (config.vocab_size, 2**40):
        with pytest.raises(ConfigError, match=f"pad_token_id={value} has to be less than"):
            family.cls("ForCausalLM")(family.config(pad_token_id=value))
        config.pad_token_id = value
        with pytest.raises(ConfigError, match="pad_token_id"):
            family.cls("Model")(config)


def test_experts_that_the_files_lack_are_named_once_for_all(tmp_path: Path) -> None:
    family = FAMILIES[1]
    family.model_of().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_experts": 60_000}))
    with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj: expected \[60000, "):
        family.cls("ForCausalLM").from_pretrained(tmp_path)

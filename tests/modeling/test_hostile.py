"""Files that lie: typed errors, nothing opened outside, nothing executed, no memory taken first."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forking import Forks
from quintet import AutoModelForCausalLM, AutoTokenizer
from quintet.errors import QuintetError

INDEX = "model.safetensors.index.json"
DEEP = "[" * 30_000 + "]" * 30_000
bounded = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# Text, numbers beyond every bound, and structures: what a key of a file may be instead.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**9, 10**400, 0.5, -0.0, 1e308])
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["../../etc/passwd", "\x00", "mamba", "float8_e4m3fn", "$ref", "default"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


@pytest.fixture
def root(chat_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chat_model, tmp_path / "model"))


def outcome(root: Path, load: Any) -> QuintetError | None:
    """Load and return the typed error, if there is one; any other is a failure of the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load(root)
        except QuintetError as error:
            found = error
        else:
            return None
    assert len(str(found)) < 20_000
    return found


# -- config.json -------------------------------------------------------------------------------

EVIL: dict[str, dict[str, Any]] = {
    "auto_map": {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}},
    "internal": {"_attn_implementation_internal": "evil/kernel", "_name_or_path": "evil"},
    "trust": {"trust_remote_code": True},
    "class": {"__class__": "os.system", "__init__": "evil", "save_pretrained": "evil"},
}


@pytest.mark.parametrize("kind", EVIL)
def test_keys_that_name_code_are_data(root: Path, kind: str) -> None:
    config = json.loads((root / "config.json").read_text())
    (root / "evil.py").write_text("open('executed', 'w')")
    (root / "config.json").write_text(json.dumps({**config, **EVIL[kind]}))
    opened: list[str] = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("import", "exec", "compile") and "evil" in str(arguments[:1]):
            opened.append(str(arguments))

    sys.addaudithook(audit)
    for trust in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(root, trust_remote_code=trust)
        assert callable(model.save_pretrained)
        assert type(model).__name__ == "Qwen2ForCausalLM"
    assert not opened
    assert not Path("executed").exists()
    assert not (root / "executed").exists()


SIZES: dict[str, Any] = {
    "billion-layers": {"num_hidden_layers": 10**9},
    "negative": {"num_hidden_layers": -1},
    "float": {"num_hidden_layers": 2.5},
    "wide": {"hidden_size": 2**40, "num_attention_heads": 2**20},
    "vocabulary": {"vocab_size": 10**12},
    "huge-number": {"intermediate_size": 10**400},
    "text": {"hidden_size": "32"},
    "context": {"max_position_embeddings": 10**15, "hidden_size": 10**6},
}
LIMITED = """
import resource
import sys, warnings
from quintet import AutoModelForCausalLM
import quintet.models.qwen2
from quintet.errors import QuintetError
warnings.simplefilter("ignore")
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000,) * 2)
for path in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(path)
        print("loaded")
    except QuintetError as error:
        print(type(error).__name__)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_sizes_that_no_file_backs_take_no_memory(root: Path, tmp_path: Path, forks: Forks) -> None:
    config = json.loads((root / "config.json").read_text())
    contents = {kind: json.dumps({**config, **change}) for kind, change in SIZES.items()}
    contents["nan"] = json.dumps({**config, "initializer_range": float("nan")})
    contents["deep"] = f'{{"model_type": "qwen2", "x": {DEEP}}}'
    contents["long"] = json.dumps({**config, "x": "y" * 100_000_000})
    paths = []
    for kind, content in contents.items():
        paths.append(Path(shutil.copytree(root, tmp_path / kind)))
        (paths[-1] / "config.json").write_text(content)
    done = forks.run(LIMITED, *paths, environment=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(zip(contents, done.stdout.split(), strict=True))
    # Long text in a key that nobody reads is kept, as any unknown key.
    assert said.pop("long") in ("loaded", "CheckpointError")
    assert set(said.values()) <= {"ConfigError", "CheckpointError"}, said
    shutil.rmtree(tmp_path / "long")


@bounded
@given(st.data())
def test_any_config_is_read_or_refused(root: Path, data: st.DataObject) -> None:
    config = json.loads((root / "config.json").read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[key] = data.draw(VALUES)
    mutated = root / "mutated"
    mutated.mkdir(exist_ok=True)
    shutil.copy(root / "model.safetensors", mutated)
    (mutated / "config.json").write_text(json.dumps(config))
    outcome(mutated, AutoModelForCausalLM.from_pretrained)


# -- the index ---------------------------------------------------------------------------------


@pytest.fixture
def sharded(chat_model: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    return tmp_path / "sharded"


@bounded
@given(st.data())
def test_any_index_is_read_or_refused(sharded: Path, data: st.DataObject) -> None:
    text = (sharded / f"{INDEX}.good").read_text() if (sharded / f"{INDEX}.good").exists() else ""
    if not text:
        text = (sharded / INDEX).read_text()
        (sharded / f"{INDEX}.good").write_text(text)
    index = json.loads(text)
    names = sorted(index["weight_map"])
    kind = data.draw(st.sampled_from(["entry", "name", "whole", "metadata", "swap"]))
    if kind == "entry":
        index["weight_map"][data.draw(st.sampled_from(names))] = data.draw(VALUES)
    elif kind == "name":
        index["weight_map"][data.draw(st.text(max_size=9))] = data.draw(st.sampled_from(names))
    elif kind == "swap":
        shards = sorted(set(index["weight_map"].values()))
        index["weight_map"][data.draw(st.sampled_from(names))] = data.draw(st.sampled_from(shards))
    elif kind == "metadata":
        index["metadata"] = data.draw(VALUES)
    else:
        index["weight_map"] = data.draw(VALUES)
    (sharded / INDEX).write_text(json.dumps(index))
    error = outcome(sharded, AutoModelForCausalLM.from_pretrained)
    changed = index["weight_map"] != json.loads(text)["weight_map"]
    assert error is not None or not changed, "an index that was changed is never followed"


# -- tokenizer.json ----------------------------------------------------------------------------


@bounded
@given(st.data())
def test_any_tokenizer_is_read_or_refused(root: Path, data: st.DataObject) -> None:
    good = root / "good.json"
    if not good.exists():
        shutil.copy(root / "tokenizer.json", good)
    content: Any = json.loads(good.read_text())
    at = content
    for _ in range(data.draw(st.integers(1, 4))):
        keys = sorted(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            break
        key = data.draw(st.sampled_from(keys))
        if isinstance(at[key], dict | list) and data.draw(st.booleans()):
            at = at[key]
            continue
        at[key] = data.draw(VALUES)
        break
    (root / "tokenizer.json").write_text(json.dumps(content))
    outcome(root, AutoTokenizer.from_pretrained)


# -- where things are --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with space", "ünï 你好 🙂", "x" * 200, "-dash", "%s{0}$HOME"])
def test_any_name_of_a_directory(chat_model: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name / ("y" * 200 if name.startswith("x") else "model")
    shutil.copytree(chat_model, path)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(path, max_shard_size="30KB")
    AutoModelForCausalLM.from_pretrained(path)


def test_without_a_home_and_without_a_directory_to_be_in(chat_model: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = (
        # torch itself cannot be imported from nowhere.
        "import os, sys, torch; os.chdir(sys.argv[2]); os.rmdir(sys.argv[2]); "
        "from quintet import AutoModelForCausalLM as M; "
        "print(M.from_pretrained(sys.argv[1]).config.model_type)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "HF_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(chat_model), str(gone)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "qwen2\n"), done.stderr


# -- a full disk, for real -----------------------------------------------------------------------

FULL = """
import json, resource, signal, sys
from quintet import AutoModelForCausalLM
from quintet.errors import SaveError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
next(model.parameters()).data.add_(1)
for root, limit, shards in json.loads(sys.argv[2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        model.save_pretrained(root, max_shard_size=shards)
        print("saved")
    except SaveError as error:
        print("SaveError", error)
"""
LIMITS = ((0, "5GB"), (500, "30KB"), (20_000, "30KB"), (60_000, "5GB"))


def test_a_limit_of_the_system_leaves_the_old_checkpoint(chat_model: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in chat_model.iterdir()}
    roots = [str(shutil.copytree(chat_model, tmp_path / str(limit))) for limit, _ in LIMITS]
    cases = [(root, *limits) for root, limits in zip(roots, LIMITS, strict=True)]
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(chat_model), json.dumps(cases)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    for root, said in zip(roots, done.stdout.splitlines(), strict=True):
        assert "what was there before is untouched" in said
        assert {path.name: path.read_bytes() for path in Path(root).iterdir()} == before

"""Hub ids, against a hub on this machine: what is fetched, what is said, what is pushed."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from forking import Forks
from hubserver import Hub, serve
from quintet import Qwen2Config, demo_model
from quintet.errors import OfflineError
from quintet.exporting import export_gguf
from quintet.hub import locate
from quintet.kernels.store import cache_folder
from tiny import build
from waiting import PATIENCE, until

# Runs a body with everything imported but what reads the variables of the hub, and prints what it
# puts into `said`.
SCRIPT = """
import json, sys, warnings
from quintet import *
from quintet.errors import QuintetError
said = {}
def fails(name, call):
    try:
        call()
    except QuintetError as error:
        said[name] = [type(error).__name__, str(error), error.exit_code]
"""
# What only fetches, without torch; chunks are small, so that a part of a file is something.
FETCH = """
import json, sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1024
from quintet.errors import QuintetError
from quintet.hub import locate_weights
said = {}
try:
    said["root"] = str(locate_weights("o/m"))
except QuintetError as error:
    said["error"] = [type(error).__name__, str(error), error.exit_code]
print(json.dumps(said))
"""
# The waits of huggingface_hub between its own attempts.
AT_ONCE = "import time; time.sleep = lambda seconds: None\n"
# `python -m quintet`
COMMAND = "import runpy; runpy.run_module('quintet', run_name='__main__', alter_sys=True)"
Run = Callable[..., dict[str, Any]]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # A hub that stands still does so until the test goes on.
        "HF_HUB_DOWNLOAD_TIMEOUT": str(int(PATIENCE)),
        "HF_HUB_ETAG_TIMEOUT": str(int(PATIENCE)),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def run(environment: dict[str, str], forks: Forks) -> Run:
    """Run Python against the hub, in a process of its own, as the environment is read once."""

    def start(body: str, **changes: str) -> dict[str, Any]:
        program = f"{SCRIPT}{body}\nprint(json.dumps(said))"
        done = forks.run(program, environment={**environment, **changes})
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    return start


@pytest.fixture
def fetching(environment: dict[str, str]) -> Callable[[], Any]:
    """Start processes that fetch the weights of o/m."""

    def start() -> Any:
        return subprocess.Popen(
            [sys.executable, "-c", AT_ONCE + FETCH],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def outcome(process: Any) -> dict[str, Any]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def contents(said: dict[str, Any]) -> bytes:
    assert "root" in said, said
    return (Path(said["root"]) / "model.safetensors").read_bytes()


def assert_nothing_else(home: Path, files: int) -> None:
    """The cache holds files that are whole, and links to them."""
    blobs = home / "hub" / "models--o--m" / "blobs"
    assert [path.name for path in blobs.glob("*incomplete*")] == []
    for path in blobs.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert digest[: len(path.name)] == path.name
    assert len(list(blobs.iterdir())) == files


@pytest.fixture
def cli(environment: dict[str, str], forks: Forks) -> Cli:
    """Run a command line against the hub."""

    def start(*arguments: str, **changes: str) -> "subprocess.CompletedProcess[str]":
        return forks.run(
            COMMAND, *arguments, environment={**environment, "NO_COLOR": "1", **changes}
        )

    return start


def test_revision_subfolder_variant_and_what_is_not_fetched(
    hub: Hub, run: Run, tmp_path: Path
) -> None:
    from quintet import AutoModelForCausalLM

    root = build(tmp_path / "model")
    (root / "pytorch_model.bin").write_bytes(b"evil")
    (root / "consolidated.safetensors").write_bytes(b"large")
    hub.add("o/m", root)
    hub.add("o/m", build(tmp_path / "wide", context=64), "old")
    hub.add("o/m", root, "nested", inside="deep/er/")
    AutoModelForCausalLM.from_pretrained(root).save_pretrained(
        tmp_path / "variant", variant="fp16", max_shard_size="30KB"
    )
    hub.add("o/m", tmp_path / "variant", "both")
    hub.add("o/m", root, "both")
    said = run(
        """
from pathlib import Path
load = AutoModelForCausalLM.from_pretrained
said["main"] = load("o/m").config.max_position_embeddings
said["old"] = load("o/m", revision="old").config.max_position_embeddings
said["nested"] = load("o/m", revision="nested", subfolder="deep/er").config.name_or_path
said["tokens"] = len(AutoTokenizer.from_pretrained("o/m", revision="nested", subfolder="deep/er"))
load("o/m", revision="both", variant="fp16")
load("o/m", cache_dir=sys.argv[0] and "CACHE")
fails("subfolder", lambda: load("o/m", subfolder="../.."))
fails("no subfolder", lambda: load("o/m", subfolder="absent"))
""".replace("CACHE", str(tmp_path / "elsewhere"))
    )
    assert (said["main"], said["old"], said["nested"], said["tokens"]) == (256, 64, "o/m", 360)
    assert said["subfolder"][2] == said["no subfolder"][2] == 3
    assert not hub.fetched("pytorch_model.bin")
    assert not hub.fetched("consolidated.safetensors")
    commit = hub.commit_of("o/m", "both")
    both = [line for line in hub.fetched(".safetensors") if f"/{commit}/" in line]
    assert len(both) > 1
    assert all(".fp16-" in line for line in both), "of a variant, nothing but the variant"
    assert (tmp_path / "elsewhere" / "models--o--m").is_dir()


def test_a_download_that_is_asked_for_again_is_made(
    hub: Hub, run: Run, chat_model: Path, tmp_path: Path
) -> None:
    hub.add("o/m", chat_model)
    said = run(
        """
from pathlib import Path
root = AutoTokenizer.from_pretrained("o/m")
kept = next(Path("HUB").rglob("tokenizer.json"))
right = kept.read_bytes()
kept.write_text("{}")
fails("cached", lambda: AutoTokenizer.from_pretrained("o/m"))
said["again"] = len(AutoTokenizer.from_pretrained("o/m", force_download=True)) == len(root)
said["right"] = kept.read_bytes() == right
""".replace("HUB", str(tmp_path / "home"))
    )
    assert said["cached"][0] == "TokenizerError"
    assert said["again"]
    assert said["right"]


def test_offline_gated_and_missing_are_told_apart(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.add("o/m", build(tmp_path / "model"))
    hub.add("o/gated", tmp_path / "model")
    hub.gated.add("o/gated")
    body = """
load = AutoModelForCausalLM.from_pretrained
fails("missing", lambda: load("o/none"))
fails("revision", lambda: load("o/m", revision="v9"))
fails("gated", lambda: load("o/gated"))
fails("spelling", lambda: load("o//m"))
fails("before", lambda: load("o/m", local_files_only=True))
load("o/m")
said["after"] = load("o/m", local_files_only=True).config.model_type
"""
    said = run(body)
    assert said.pop("after") == "qwen2"
    kinds = {name: (kind, code) for name, (kind, _, code) in said.items()}
    assert kinds == {
        "missing": ("ModelNotFoundError", 3),
        "revision": ("ModelNotFoundError", 3),
        "gated": ("ModelNotFoundError", 3),
        "spelling": ("ModelNotFoundError", 3),
        "before": ("OfflineError", 6),
    }
    assert len({message for _, message, _ in said.values()}) == 5
    asked = len(hub.asked)
    offline = """
load = AutoModelForCausalLM.from_pretrained
said["cached"] = load("o/m").config.model_type
fails("other", lambda: load("o/other"))
fails("push", lambda: AutoConfig.from_pretrained("o/m").push_to_hub("o/x"))
"""
    said = run(offline, HF_HUB_OFFLINE="1")
    assert said["cached"] == "qwen2"
    assert said["other"][0] == said["push"][0] == "OfflineError"
    assert "HF_HUB_OFFLINE" in said["other"][1]
    assert len(hub.asked) == asked, "offline means no request at all"


def test_why_the_hub_could_not_be_reached_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        try:
            raise ConnectionRefusedError(111, "Connection refused")
        except OSError as error:
            raise RuntimeError("LibraryError: it broke\nin many lines") from error

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(OfflineError, match=r"reached at http.*: Connection refused; ") as found:
        locate("o/m", ("config.json",), cache_dir=tmp_path)
    assert "Error" not in str(found.value)


def test_a_push_that_reaches_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        # As of a library below, which is no error of the system's.
        raise RuntimeError from ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(OfflineError, match=r"'o/x' cannot be pushed to.*: Connection refused"):
        Qwen2Config().push_to_hub("o/x")


def test_a_network_that_answers_for_the_hub(
    hub: Hub, fetching: Callable[[], Any], tmp_path: Path
) -> None:
    content = weights(hub, tmp_path)
    hub.broken = True
    said = outcome(fetching())
    assert said["error"][2] in (3, 6), said
    hub.broken = False
    assert contents(outcome(fetching())) == content
    assert_nothing_else(tmp_path / "home", 1)


def weights(hub: Hub, tmp_path: Path) -> bytes:
    """Offer a model of noise, of which every part is another, and return its weights."""
    path = tmp_path / "model" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(random.Random(0).randbytes(100_000))
    hub.add("o/m", path.parent)
    return path.read_bytes()


def test_a_download_that_breaks_off_goes_on(
    hub: Hub, fetching: Callable[[], Any], tmp_path: Path
) -> None:
    content = weights(hub, tmp_path)
    hub.cut = ".safetensors"
    assert contents(outcome(fetching())) == content
    assert len(hub.fetched(".safetensors")) == 2
    assert_nothing_else(tmp_path / "home", 1)


def test_a_download_that_breaks_off_again_and_again_is_not_used(
    hub: Hub, fetching: Callable[[], Any], tmp_path: Path
) -> None:
    content = weights(hub, tmp_path)
    hub.cut, hub.ranges = ".safetensors", False
    said = outcome(fetching())
    assert said["error"][2] in (3, 6), said
    assert_nothing_else(tmp_path / "home", 0)
    hub.cut = ""
    assert contents(outcome(fetching())) == content
    assert_nothing_else(tmp_path / "home", 1)


@pytest.mark.parametrize("size", [100_000, 20_000], ids=["same-size", "shorter-416"])
def test_a_file_that_changes_while_it_is_fetched_is_fetched_again(
    hub: Hub, fetching: Callable[[], Any], tmp_path: Path, size: int
) -> None:
    weights(hub, tmp_path)
    new = random.Random(1).randbytes(size)

    def change() -> None:
        hub.cut = ""
        hub.files("o/m", "main")["model.safetensors"] = new

    hub.cut, hub.after_cut = ".safetensors", change
    assert contents(outcome(fetching())) == new
    assert_nothing_else(tmp_path / "home", 1)


def test_a_file_that_something_on_the_way_changes_is_refused(
    hub: Hub, fetching: Callable[[], Any], tmp_path: Path
) -> None:
    content = weights(hub, tmp_path)
    hub.changed = ".safetensors"
    said = outcome(fetching())
    assert said["error"][0] == "CheckpointError"
    assert "model.safetensors came twice" in said["error"][1]
    assert len(hub.fetched(".safetensors")) == 2
    assert_nothing_else(tmp_path / "home", 0)
    hub.changed = ""
    assert contents(outcome(fetching())) == content


def test_a_download_that_is_killed_is_fetched_again_and_leaves_nothing(
    hub: Hub, fetching: Callable[[], Any], tmp_path: Path
) -> None:
    content = weights(hub, tmp_path)
    hub.stall = ".safetensors"
    first = fetching()
    assert hub.stalled.wait(PATIENCE)
    until(lambda: list((tmp_path / "home").rglob("*.incomplete")))
    first.kill()
    first.communicate()
    assert list((tmp_path / "home").rglob("*.incomplete"))
    hub.stall = ""
    assert contents(outcome(fetching())) == content
    assert_nothing_else(tmp_path / "home", 1)


def test_two_processes_fetch_a_file_once(
    hub: Hub, fetching: Callable[[], Any], tmp_path: Path
) -> None:
    content = weights(hub, tmp_path)
    hub.stall = ".safetensors"
    processes = [fetching(), fetching()]
    assert hub.stalled.wait(PATIENCE)
    until(lambda: sum("api/models" in line for line in hub.asked) >= 2)
    time.sleep(0.2)
    hub.go_on.set()
    assert [contents(outcome(process)) for process in processes] == [content] * 2
    assert len(hub.fetched(".safetensors")) == 1
    assert_nothing_else(tmp_path / "home", 1)


def test_a_cache_that_cannot_be_written_is_named(hub: Hub, cli: Cli, tmp_path: Path) -> None:
    hub.add("o/m", build(tmp_path / "model"))
    blocked = tmp_path / "a file"
    blocked.write_text("")
    done = cli("info", "o/m", HF_HOME=str(blocked / "home"))
    assert done.returncode == 7
    assert f"error: the hub cache {blocked}" in done.stderr
    assert "HF_HOME" in done.stderr


def test_a_folder_may_have_any_name(forks: Forks, tmp_path: Path, chat_model: Path) -> None:
    names = ["with spaces", "模型 🎻", "é" * 120, "-n", "a'b\"c;$d"]
    folders = [str(shutil.copytree(chat_model, tmp_path / name)) for name in names]
    script = (
        "import sys; from quintet.cli.main import cli\n"
        "for folder in sys.argv[1:]:\n"
        "    cli.main(['generate', 'a', '--model', folder, '-n', '2'], standalone_mode=False)\n"
    )
    # The kernels that are there already need not be compiled again.
    kept = {"XDG_CACHE_HOME": str(cache_folder().parent), "OMP_NUM_THREADS": "1"}
    done = forks.run(script, *folders, environment={**os.environ, "HOME": "", **kept})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= len(names)


def test_a_working_directory_that_is_gone_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = subprocess.run(
        [
            "sh",
            "-c",
            f'cd "$0" && rmdir "$0" && exec "{sys.executable}" -m quintet info',
            str(gone),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: the working directory no longer exists" in done.stderr


def test_a_pushed_model_comes_back(hub: Hub, run: Run, tmp_path: Path) -> None:
    root = build(tmp_path / "model")
    hub.add("o/gated", root)
    hub.gated.add("o/gated")
    said = run(
        f"""
import torch
model = AutoModelForCausalLM.from_pretrained({str(root)!r})
tokenizer = AutoTokenizer.from_pretrained({str(root)!r})
said["url"] = model.push_to_hub("tester/new", token="hf_x", max_shard_size="30KB")
tokenizer.push_to_hub("tester/new", token="hf_x")
model.config.push_to_hub("tester/config", token="hf_x")
again = AutoModelForCausalLM.from_pretrained("tester/new")
said["same"] = all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
said["text"] = AutoTokenizer.from_pretrained("tester/new")("Hello there")["input_ids"]
said["first"] = tokenizer("Hello there")["input_ids"]
both = {{"push_to_hub": True, "repo_id": "tester/both", "token": "hf_x"}}
model.save_pretrained({str(tmp_path / "both")!r}, **both)
fails("gated", lambda: model.push_to_hub("o/gated", token="hf_x"))
fails("spelling", lambda: model.push_to_hub("a/b/c", token="hf_x"))
"""
    )
    assert said["same"] is True
    assert said["text"] == said["first"]
    assert said["url"].startswith(f"{hub.url}/tester/new/commit/")
    assert said["gated"][2] == said["spelling"][2] == 3
    files = hub.files("tester/new", "main")
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= set(files)
    assert len([name for name in files if name.startswith("model-")]) > 1
    assert set(hub.files("tester/config", "main")) == {"config.json"}
    assert "model.safetensors" in hub.files("tester/both", "main")
    assert (tmp_path / "both" / "model.safetensors").is_file()


def test_plan_and_info_of_a_hub_id_fetch_no_weights(hub: Hub, cli: Cli, tmp_path: Path) -> None:
    from quintet import AutoModelForCausalLM

    root = build(tmp_path / "model")
    hub.add("o/one", root)
    AutoModelForCausalLM.from_pretrained(root).save_pretrained(
        tmp_path / "many", max_shard_size="30KB"
    )
    hub.add("o/many", tmp_path / "many")
    sizes = sum(tensor.nbytes for tensor in load_file(root / "model.safetensors").values())
    for name in ("o/one", "o/many"):
        plan = cli("plan", name, "--json")
        assert plan.returncode == 0, plan.stderr
        facts = json.loads(plan.stdout)
        assert facts["files"]["here"] is False
        assert facts["files"]["bytes"] == sizes
    whole = [line for line in hub.asked if line.startswith("GET") and "safetensors" in line]
    assert whole
    cached = list((tmp_path / "home").rglob("*.safetensors"))
    assert cached == []


def listed(cli: Cli) -> list[dict[str, Any]]:
    """Return what `quintet ls` says of the hub's models; other programs may keep some, too."""
    rows = json.loads(cli("ls", "--json").stdout)
    return [row for row in rows if row["model"].startswith("o/")]


def test_a_download_is_verified_listed_and_removed(
    hub: Hub, run: Run, cli: Cli, tmp_path: Path
) -> None:
    hub.add("o/m", build(tmp_path / "model"))
    hub.add("o/m", tmp_path / "model", "old")
    run('[AutoModelForCausalLM.from_pretrained("o/m", revision=r) for r in ("main", "old")]')
    done = cli("verify", "o/m", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hashes"] == "1 of 1 right"
    rows = listed(cli)
    assert [(row["model"], row["family"]) for row in rows] == [("o/m", "qwen2")] * 2
    assert sorted(row["revision"] for row in rows) == ["main", "old"]
    head, *lines = cli("ls").stdout.splitlines()
    assert head.split() == ["MODEL", "REVISION", "FAMILY", "WEIGHTS", "SIZE", "USED"]
    assert len([line for line in lines if line.startswith("o/m ")]) == 2

    refused = cli("rm", "o/m")
    assert (refused.returncode, "pass --yes" in refused.stderr) == (2, True)
    wrong = cli("rm", "o/n", "--yes")
    assert (wrong.returncode, "did you mean 'o/m'" in wrong.stderr) == (3, True)
    assert cli("rm", "o/m@main", "--dry-run").returncode == 0
    assert cli("rm", "o/m@old", "--yes").returncode == 0
    rows = listed(cli)
    assert [row["revision"] for row in rows] == ["main"]
    assert cli("rm", "o/m", "-y").returncode == 0
    assert listed(cli) == []


def test_of_a_repository_in_gguf_one_file_is_fetched(hub: Hub, run: Run, tmp_path: Path) -> None:
    for kind in ("Q8_0", "Q4_0"):
        export_gguf(demo_model(), tmp_path / "files" / f"demo-{kind}.gguf", dtype=kind)
    hub.add("o/m-GGUF", tmp_path / "files")
    script = """
load = AutoTokenizer.from_pretrained
fails("several", lambda: load("o/m-GGUF"))
said["model"] = AutoModelForCausalLM.from_pretrained("o/m-GGUF:q8_0").config.model_type
said["tokens"] = len(load("o/m-GGUF"))  # the one that is here
fails("none", lambda: load("o/m-GGUF:Q6_K"))
fails("no repository", lambda: load("o/absent:Q6_K"))
"""
    said = run(script)
    assert (said["model"], said["tokens"]) == ("deepseek_v3", 2048)
    assert "demo-Q4_0.gguf\n  demo-Q8_0.gguf" in said["several"][1]
    assert said["none"][0] == said["no repository"][0] == "ModelNotFoundError"
    assert len(hub.fetched("demo-Q8_0.gguf")) == 1
    assert not hub.fetched("demo-Q4_0.gguf")
    asked = len(hub.asked)
    said = run('said["tokens"] = len(AutoTokenizer.from_pretrained("o/m-GGUF:Q8_0"))')
    assert said["tokens"] == 2048
    assert len(hub.asked) == asked, "what is here is used as it is"

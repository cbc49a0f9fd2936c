"""The page's script as it is printed, on two hosts: each a network of its own on this machine."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mission.conftest import checkpoint
from mission.pages import blocks
from mission.test_examples import code_of, having
from quintet import AutoModelForCausalLM
from waiting import PATIENCE

# Whole blocks of 128 × 128 numbers for each of four processes, as there are in the released model.
SIZES = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "n_shared_experts": 4,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "num_hidden_layers": 3,
}
ADDRESSES = ("10.77.0.1", "10.77.0.2")
# In bfloat16 sums of four parts round to other numbers, and after some tokens to another text.
EXACT = {"torch.bfloat16": "torch.float32"}
HELD = "\nprint('held', sum(t.nbytes for t in [*model.parameters(), *model.buffers()]), flush=True)"


@dataclass(frozen=True, slots=True)
class Host:
    """A network namespace, and its address."""

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=PATIENCE)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two hosts that reach each other, and nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("there is no command ip (iproute2), which makes network namespaces")
    names = [f"quintet{os.getpid()}{end}" for end in "ab"]
    ends = [f"q{os.getpid()}{end}"[-15:] for end in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespace can be made here: {error.stderr.decode().strip()}")
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [Host(*pair) for pair in zip(names, ADDRESSES, strict=True)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the script is started: it, and a small DeepSeek-V3 in FP8 by the page's name."""
    root = tmp_path_factory.mktemp("two-hosts")
    checkpoint(root / "whole", "deepseek-v3", "ForCausalLM", **SIZES)
    model = AutoModelForCausalLM.from_pretrained(root / "whole", quantize="fp8")
    shutil.copytree(root / "whole", root / "deepseek-r1")
    model.save_pretrained(root / "deepseek-r1")
    (block,) = having("deepseek-r1")
    code = code_of(block)
    for printed, exact in EXACT.items():
        assert printed in code
        code = code.replace(printed, exact)
    (root / "run_deepseek_r1.py").write_text(code + HELD, encoding="utf-8")
    return root


def ended(processes: list["subprocess.Popen[str]"], seconds: float) -> list[str]:
    """Return what processes that end well wrote."""
    until = time.monotonic() + seconds
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(until - time.monotonic(), 1))
            assert process.returncode == 0, err
            found.append(out)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return found


def start(words: list[str], folder: Path) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    environment = {k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"}
    return subprocess.Popen(words, cwd=folder, stdout=pipe, stderr=pipe, text=True, env=environment)


def answers(text: str) -> list[str]:
    """Return the answers a script printed; the times between them are left out."""
    return re.findall(r"\['.*?<\|im_end\|>'\]$", text, re.MULTILINE)


def held(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"held (\d+)", text)]


def test_the_pages_script_runs_on_two_hosts_of_two_processes(
    hosts: list[Host], folder: Path, tmp_path: Path
) -> None:
    (command,) = blocks("deepseek_v3", "shell")
    words = command.body
    for printed, meant in {
        "--nproc_per_node=8": "--nproc_per_node=2",
        "master_addr:master_port": f"{ADDRESSES[0]}:29555",
    }.items():
        assert printed in words
        words = words.replace(printed, meant)
    whole = ended([start([sys.executable, "run_deepseek_r1.py"], folder)], PATIENCE)[0]
    began = time.monotonic()
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    processes = []
    for number, host in enumerate(hosts):
        # Both are this machine by name, and torchrun takes whom it meets for itself.
        same_name = ["--rdzv-conf", f"is_host={int(number == 0)}", "--local-addr", host.address]
        # In one pipe, lines of several processes would lie within each other.
        apart = ["--redirects", "1", "--log-dir", str(tmp_path / host.name)]
        printed = words.replace("--node_rank=0|1", f"--node_rank={number}").split()[1:]
        processes.append(start(host.command(*torchrun, *same_name, *apart, *printed), folder))
    ended(processes, PATIENCE)
    seconds = time.monotonic() - began
    parts = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("stdout.log")]
    wanted = answers(whole)
    assert wanted
    assert [answers(text) for text in parts] == [wanted] * 4
    (all_of_it,) = held(whole)
    most = max(number for text in parts for number in held(text))
    assert [len(held(text)) for text in parts] == [1] * 4
    assert most <= 0.3 * all_of_it
    print(f"{seconds:.1f} s, {most / all_of_it:.3f} of the weights")

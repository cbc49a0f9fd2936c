"""Processes join as a launcher started them, or say what is wrong with that."""

import re
from pathlib import Path

import pytest
import torch

from parallel.cases import faults
from parallel.launching import launch
from quintet.errors import DistributedError, InputError
from quintet.parallel.launch import connect, launched, own_device, timeout_of

TOLD = {
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TOLD, "GROUP_RANK", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("QUINTET_DISTRIBUTED_TIMEOUT", raising=False)


def tell(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
    for name, value in {**TOLD, **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


def test_without_a_launcher_there_is_one_process() -> None:
    assert launched() is None
    with pytest.raises(DistributedError, match="torchrun"):
        connect()


def test_a_launcher_of_one_process_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, WORLD_SIZE="1", RANK="0")
    assert launched() is None


def test_what_a_launcher_says_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch)
    found = launched()
    assert found is not None
    assert (found.rank, found.size, found.local_rank, found.local_size) == (3, 4, 1, 2)
    assert (found.address, found.port) == ("node0", 29500)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", None, "RANK is not set; start them by torchrun"),
        ("RANK", "4", "RANK=4 in the environment has to be 0 to 3, as WORLD_SIZE=4"),
        ("RANK", "-1", "RANK=-1 in the environment has to be 0 to 3"),
        ("RANK", "first", "RANK='first' in the environment is no number"),
        ("WORLD_SIZE", "0", "WORLD_SIZE=0 in the environment has to be 1 or more"),
        ("WORLD_SIZE", "many", "WORLD_SIZE='many' in the environment is no number"),
        ("LOCAL_RANK", "2", "LOCAL_RANK=2 in the environment has to be 0 to 1"),
        ("MASTER_ADDR", None, "MASTER_ADDR is not set"),
        ("MASTER_PORT", None, "MASTER_PORT is not set"),
        ("MASTER_PORT", "http", "MASTER_PORT='http' in the environment is no number"),
    ],
)
def test_what_is_wrong_is_told(
    name: str, value: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(monkeypatch, **{name: value})
    with pytest.raises(DistributedError, match=re.escape(message)):
        launched()


def test_the_timeout_is_the_call_s_then_the_environment_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timeout_of(None) == 300
    monkeypatch.setenv("QUINTET_DISTRIBUTED_TIMEOUT", "12.5")
    assert timeout_of(None) == 12.5
    assert timeout_of(3) == 3


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "0", "inf"])
def test_a_timeout_that_is_no_time_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUINTET_DISTRIBUTED_TIMEOUT", value)
    with pytest.raises(InputError):
        timeout_of(None)


def test_a_process_without_a_gpu_of_its_own_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="local rank 1 has no GPU of its own: 1 can be seen"):
        own_device()
    assert own_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device() == torch.device("cuda", 1)


def test_processes_join(tmp_path: Path) -> None:
    ended = launch(2, faults.joins, where=tmp_path)
    assert [one.err for one in ended] == ["", ""]
    assert [one.out for one in ended] == ["0 of 2 on cpu\n", "1 of 2 on cpu\n"]


def test_a_group_that_the_script_made_is_used(tmp_path: Path) -> None:
    ended = launch(2, faults.uses_its_own_group, where=tmp_path)
    assert [(one.code, one.out, one.err) for one in ended] == [(0, "joined\n", "")] * 2


def test_who_does_not_come_is_named(tmp_path: Path) -> None:
    environment = {"QUINTET_DISTRIBUTED_TIMEOUT": "5", "WORLD_SIZE": "3"}
    ended = launch(2, faults.joins, where=tmp_path, environment=environment)
    assert [one.code for one in ended] == [1, 1]
    for one in ended:
        assert "DistributedError: rank 2 of 3 did not come within 5 s" in one.err


def test_different_numbers_of_processes_are_told_at_once(tmp_path: Path) -> None:
    ended = launch(2, faults.joins, where=tmp_path, of_rank={1: {"WORLD_SIZE": "3"}})
    for one in ended:
        assert one.code == 1
        last = one.err.splitlines()[-1]
        assert "DisagreementError" in last
        assert "one of 3 processes" in last
        assert "one of 2" in last


def test_two_of_one_rank_are_told(tmp_path: Path) -> None:
    twice = {2: {"RANK": "1"}}
    ended = launch(3, faults.joins, where=tmp_path, of_rank=twice)
    assert [one.code for one in ended] == [1, 1, 1]
    assert all("two processes were started as rank 1" in one.err for one in ended)


def test_a_meeting_point_where_nobody_is_is_named(tmp_path: Path) -> None:
    environment = {"QUINTET_DISTRIBUTED_TIMEOUT": "1", "WORLD_SIZE": "2"}
    (ended,) = launch(
        1, faults.joins, where=tmp_path, environment=environment, of_rank={0: {"RANK": "1"}}
    )
    assert "DistributedError: rank 1 found nobody at 127.0.0.1:" in ended.err


def test_an_interface_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    environment = {"GLOO_SOCKET_IFNAME": "nosuch0", "QUINTET_DISTRIBUTED_TIMEOUT": "60"}
    ended = launch(2, faults.joins, where=tmp_path, environment=environment)
    for one in ended:
        assert one.code == 1
        assert "GLOO_SOCKET_IFNAME='nosuch0'" in one.err
        assert "this machine has lo (127.0.0.1)" in one.err

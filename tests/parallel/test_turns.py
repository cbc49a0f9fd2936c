"""What one process of a machine does for all: the others wait for it."""

import threading
from collections.abc import Callable

import pytest
from torch.distributed import HashStore

from quintet.errors import DistributedError
from quintet.parallel import turns
from quintet.parallel.faults import Watch
from quintet.parallel.verdict import Process
from waiting import until

HOSTS = ["one", "one", "two"]


def together(work: Callable[[int], str], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Let three processes of two machines take turns, as threads; return what each made."""
    store, made = HashStore(), [object()] * len(HOSTS)
    who = {rank: Process(host, 100 + rank) for rank, host in enumerate(HOSTS)}
    here = threading.local()
    monkeypatch.setattr(turns, "watch", lambda: here.watch)

    def run(rank: int) -> None:
        here.watch = Watch(store, rank, who, 30.0, HOSTS[rank], rank == 0)
        try:
            made[rank] = [turns.in_turn(lambda: work(rank), "fetching it") for _ in range(2)]
        except DistributedError as error:
            made[rank] = str(error)
        except OSError as error:
            made[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(HOSTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


def test_the_first_of_a_machine_is_done_before_the_others_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[tuple[int, str]] = []

    def work(rank: int) -> str:
        order.append((rank, "begins"))
        if rank == 0:
            # The other machine waits for neither.
            until(lambda: (2, "begins") in order)
        order.append((rank, "is done"))
        return f"{rank}"

    assert together(work, monkeypatch) == [["0", "0"], ["1", "1"], ["2", "2"]]
    assert order.index((0, "is done")) < order.index((1, "begins"))


def test_where_the_first_fails_the_others_do_not_try(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int) -> str:
        assert rank != 1
        if rank == 0:
            raise OSError("no network")
        return "2"

    made = together(work, monkeypatch)
    assert isinstance(made[0], OSError)
    assert made[1] == "rank 0 of this machine failed fetching it"
    assert made[2] == ["2", "2"]


def test_who_waits_long_says_for_whom(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(turns, "NOTICE", 0.1)

    told = "rank 1 waits for rank 0, which is fetching it"

    def work(rank: int) -> str:
        if rank == 0:
            until(lambda: told in caplog.text)
        return ""

    assert together(work, monkeypatch) == [["", ""]] * 3

"""How a server is asked under load, and what is made of what comes, with one that has no model."""

import asyncio
import math
import re
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from measurement.fakeserver import FakeServer
from quintet.errors import InputError, ServingError
from quintet.measurement.serving.asking import RequestRecord, Target, find
from quintet.measurement.serving.connection import Address
from quintet.measurement.serving.load import Load, run
from quintet.measurement.serving.summary import Goals, lines, summary
from quintet.measurement.serving.workload import WorkloadShape
from waiting import PATIENCE, in_some_try

SMALL = WorkloadShape(shared=20, own=12, out=5)


def measured(
    fake: FakeServer, shape: WorkloadShape, load: Load, warm: int = 0, **how: Any
) -> list[RequestRecord]:
    async def both() -> list[RequestRecord]:
        target = await find(Address.of(fake.url), **how)
        fake.asked.clear()
        return await run(target, shape, load, warm=warm)

    with fake.running():
        return asyncio.run(both())


def test_clients_ask_one_behind_the_other() -> None:
    fake = FakeServer(pause=0.002)
    asked = measured(fake, SMALL, Load(conversations=10, clients=3))
    assert fake.most_at_once == 3
    assert [one.error for one in asked] == [None] * 10
    prompts = [body["prompt"] for body in fake.asked]
    # Exactly as long, the same beginning, and no other end.
    assert {len(prompt) for prompt in prompts} == {32}
    assert len({tuple(prompt[:20]) for prompt in prompts}) == 1
    assert len({tuple(prompt[20:]) for prompt in prompts}) == 10
    assert all(body["min_tokens"] == body["max_tokens"] == 5 for body in fake.asked)
    for one in asked:
        assert (one.prompt, one.cached, one.completion, one.text) == (32, 16, 5, "xxxxx")
        assert one.due < one.came[0] < one.came[-1] <= one.ended
        assert len(one.came) == 5


def test_the_same_seed_asks_the_same() -> None:
    bodies = []
    for _ in range(2):
        fake = FakeServer()
        measured(fake, SMALL, Load(conversations=6, clients=2, seed=5))
        bodies.append(sorted(body["prompt"] for body in fake.asked))
    assert bodies[0] == bodies[1]


def test_arrivals_do_not_wait_for_answers() -> None:
    fake = FakeServer(pause=0.05)
    asked = measured(fake, SMALL, Load(conversations=12, rate=200.0))
    assert fake.most_at_once > 6
    due = sorted(one.due for one in asked)
    assert 0.01 < due[-1] - due[0] < 0.2


def test_who_may_not_begin_yet_is_late() -> None:
    """What waits at the client for a place has waited, as users see it."""
    fake = FakeServer(pause=0.01)
    asked = measured(fake, SMALL, Load(conversations=4, rate=1e4, clients=1))
    assert fake.most_at_once == 1
    assert asked[-1].came[0] - asked[-1].due > 0.12


def test_a_conversation_grows_by_what_was_said() -> None:
    fake = FakeServer()
    shape = WorkloadShape(shared=4, own=10, out=3, turns=4, grows=8)
    asked = measured(fake, shape, Load(conversations=2, clients=1))
    assert [one.prompt for one in asked] == [14, 22, 30, 38] * 2
    first, second, *_ = (body["prompt"] for body in fake.asked)
    assert second[:14] == first
    assert second[14:17] == [ord("x")] * 3


def test_some_hang_up() -> None:
    fake = FakeServer(pause=0.005)
    shape = WorkloadShape(shared=0, own=8, out=6, drops=0.5)
    asked = measured(fake, shape, Load(conversations=30, clients=5))
    gone = [one for one in asked if one.dropped]
    assert 5 < len(gone) < 25
    assert all(one.error is None and len(one.came) < 6 for one in gone)
    assert {len(one.came) for one in gone} > {0}
    found = summary(asked)
    assert found["requests"] == {
        "all": 30,
        "answered": 30 - len(gone),
        "dropped": len(gone),
        "failed": 0,
    }


def test_no_conversation_begins_when_time_is_over() -> None:
    fake = FakeServer(pause=0.01)
    asked = measured(fake, SMALL, Load(conversations=1000, clients=2, seconds=0.15))
    assert 1 <= len(asked) <= 10


def test_what_is_under_way_is_cut() -> None:
    # Of an hour.
    shape = WorkloadShape(shared=0, own=3, out=200_000)
    load = Load(conversations=9, clients=2, seconds=1.0, cut=True)

    def cut() -> list[RequestRecord]:
        asked = measured(FakeServer(pause=0.02), shape, load)
        assert [one.dropped for one in asked] == [True, True]
        return asked

    # On a busy machine nothing may have come by then.
    asked = in_some_try(cut, lambda asked: all(one.completion >= 1 for one in asked))
    found = summary(asked)
    assert found["seconds"] < PATIENCE
    assert found["per_second"]["completion_tokens"] > 0
    assert 0 < found["ttft"]["p50"] < found["seconds"]
    assert found["e2e"] is None


@pytest.mark.parametrize("chunked", [True, False])
def test_servers_that_count_nothing_and_take_no_ids(chunked: bool) -> None:
    fake = FakeServer(ids=False, usage=False, chunked=chunked)
    asked = measured(fake, SMALL, Load(conversations=2, clients=1), warm=1)
    assert len(fake.asked) == 3
    assert all(isinstance(body["prompt"], str) for body in fake.asked)
    assert [one.completion for one in asked] == [5, 5]
    assert summary(asked)["tokens_counted_by"] == "pieces"
    assert "tok/s out (counted in pieces)" in "\n".join(lines(summary(asked)))


def test_words_are_measured_in_tokens() -> None:
    # Its tokens are letters.
    fake = FakeServer()
    shape = WorkloadShape(shared=0, own=200, out=1)
    asked = measured(fake, shape, Load(conversations=4, clients=1), endpoint="chat")
    assert all(140 < one.prompt < 260 for one in asked)
    assert fake.asked[0]["messages"][0]["role"] == "user"


def test_fields_are_added_and_left_out() -> None:
    fake = FakeServer()
    extra = {"ignore_eos": None, "min_tokens": None, "top_k": 3}
    measured(fake, SMALL, Load(conversations=1, clients=1), extra=extra)
    body = fake.asked[0]
    assert body["top_k"] == 3
    assert not {"ignore_eos", "min_tokens"} & body.keys()


def test_what_fails_is_counted_by_its_code_alone() -> None:
    fake = FakeServer(fails={3: 503})
    asked = measured(fake, SMALL, Load(conversations=9, clients=1))
    found = summary(asked)
    assert found["requests"]["failed"] == 3
    assert found["errors"] == {"HTTP 503, queue_full": 3}
    assert found["statuses"] == {"200": 6, "503": 3}
    assert "failed 3 times: HTTP 503, queue_full" in "\n".join(lines(found))


@pytest.mark.parametrize("chunked", [True, False])
def test_a_stream_that_is_cut_off_is_a_failure(chunked: bool) -> None:
    fake = FakeServer(chunked=chunked)
    with fake.running():

        async def cut() -> RequestRecord:
            target = await find(Address.of(fake.url))
            fake.cuts = True
            return await target.ask([1, 2, 3], 4)

        one = asyncio.run(cut())
    assert one.error is not None
    assert "cut off" in one.error or "before its end" in one.error


def test_an_answer_that_takes_too_long_is_a_failure() -> None:
    fake = FakeServer()
    with fake.running():

        async def slow() -> RequestRecord:
            target = replace(await find(Address.of(fake.url)), timeout=0.05)
            fake.pause = 60.0
            return await target.ask([1], 2)

        assert asyncio.run(slow()).error == "no whole answer in 0.05 s"


def test_percentiles_rates_and_goals() -> None:
    asked = [
        RequestRecord(
            due=float(n),
            came=[n + 0.1 * (n + 1), n + 0.1 * (n + 1) + 0.05, n + 0.1 * (n + 1) + 0.2],
            ended=n + 0.1 * (n + 1) + 0.2,
            status=200,
            prompt=10,
            cached=4,
            completion=3,
            counted=True,
        )
        for n in range(5)
    ]
    found = summary(asked, Goals(ttft=301, tpot=150))
    assert found["ttft"]["p50"] == pytest.approx(0.3)
    assert found["ttft"]["most"] == pytest.approx(0.5)
    assert found["tpot"]["mean"] == pytest.approx(0.1)
    assert found["itl"]["most"] == pytest.approx(0.15)
    assert found["e2e"]["p50"] == pytest.approx(0.5)
    assert found["seconds"] == pytest.approx(4.7)
    assert found["per_second"]["completion_tokens"] == pytest.approx(15 / 4.7)
    assert found["tokens"] == {"prompt": 50, "cached": 20, "completion": 15}
    assert found["good"]["requests"] == 3
    assert found["good"]["share"] == pytest.approx(0.6)
    text = "\n".join(lines(found))
    assert "prompts of 10 tokens, 40% of them read before" in text
    assert "in good time, 60% of all" in text


def test_nothing_asked_comes_to_nothing() -> None:
    found = summary([])
    assert found["ttft"] is None
    assert found["per_second"]["requests"] == 0
    assert list(lines(found))


@pytest.mark.parametrize("given", ["ttft", "ttft:", "speed:5", "ttft:-1", "ttft:nan", "e2e:inf"])
def test_goals_that_are_none(given: str) -> None:
    with pytest.raises(InputError, match="is no goal"):
        Goals.of([given])
    assert Goals.of(["ttft:5", "e2e:1e3"]) == Goals(ttft=5, e2e=1000)


@pytest.mark.parametrize(
    "url", ["ftp://a", "http://", "http://a:b", "http://a:1?x=1", "http://[::1"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(InputError, match="is no address of a server"):
        Address.of(url)


def test_addresses() -> None:
    assert Address.of("localhost:80") == Address("localhost", 80)
    assert Address.of("https://a/x/v1/") == Address("a", 443, "/x", True)
    assert Address.of("http://[::1]:8/v1", "k") == Address("::1", 8, "", False, "k")


@pytest.mark.parametrize(
    "url",
    [
        *("http://a#x", "http://a:0", "http://a/\u00fc", "http://a/x y", "http://a..b"),
        *(f"http://{'a' * 300}", "http://\ud800"),
    ],
)
def test_nothing_of_an_address_is_left_out_in_silence(url: str) -> None:
    with pytest.raises(InputError, match="is no address of a server"):
        Address.of(url)


def test_secrets_of_addresses_and_keys_are_not_shown() -> None:
    with pytest.raises(InputError, match="names no user") as refused:
        Address.of("http://me:hidden@a")
    assert "hidden" not in str(refused.value)
    for key in ("hidd\u00ebn", "hidden\r\nX: y", "hidden\ud800"):
        with pytest.raises(InputError, match="printable ASCII") as refused:
            Address.of("http://a", key)
        assert "hidd" not in str(refused.value)


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "is not HTTP/1.1"),
        (b"SSH-2.0-OpenSSH\r\n", "is not HTTP/1.1: it begins with 'SSH-2.0-OpenSSH'"),
        (b"HTTP/1.1 \xb2 OK\r\n\r\n", "is not HTTP/1.1"),
        (b"HTTP/1.1 " + b"9" * 5000 + b"\r\n\r\n", "is not HTTP/1.1"),
        (OK + b"X: y\r\n" * 2000 + b"\r\n", "more than 1,000 headers"),
        (OK + b"X: " + b"y" * (1 << 23), "a line of an answer is longer"),
        (OK + b"Content-Length: x\r\n\r\n", "its length is 'x'"),
        (OK + b"Content-Length: -5\r\n\r\n", "its length is '-5'"),
        (OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", "its length is"),
        (OK + b"Content-Length: 50\r\n\r\nabc", "was cut off"),
        (OK + b"Content-Length: 99999999999\r\n\r\n" + b"a" * (1 << 16), "was cut off"),
        (CHUNKED + b"zz\r\nabc", "has the size b'zz'"),
        (CHUNKED + b"-5\r\nabc", "has the size b'-5'"),
        (CHUNKED + b"ffffffffffffffffff\r\nabc", "has the size"),
        (CHUNKED + b"5\r\nabc", "was cut off"),
    ],
)
def test_answers_that_are_no_http_are_told(answer: bytes, said: str) -> None:
    with pytest.raises(ServingError, match=re.escape(said)):
        asyncio.run(_of_raw(answer, lambda address: address.fetch("/x")))


@pytest.mark.parametrize(
    ("events", "error"),
    [
        (b"data: hello\n\n", "ServingError: an event of the stream is not JSON"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "ServingError: an event of the stream is not JSON"),
        (b'data: {"error": 5}\n\n', "in the stream: None"),
        (
            b'data: {"usage": {"prompt_tokens": "x"}, "choices": 5}\n\n'
            b'data: {"choices": [5, {"delta": 5}, {"text": 5, "finish_reason": "stop"}]}\n\n',
            None,
        ),
        (b"data: [1]\n\n", "the stream ended before its end"),
        (b"data: x\n" * (1 << 20), "ServingError: an event of an answer is longer"),
    ],
)
def test_events_of_any_shape_end_a_request_and_not_the_measurement(
    events: bytes, error: str | None
) -> None:
    answer = OK + b"\r\n" + events
    asked = asyncio.run(_of_raw(answer, lambda address: Target(address, "m").ask("Hi", 1)))
    assert (asked.error or "").startswith(error or "")
    assert bool(asked.error) == bool(error)
    assert (asked.prompt, asked.text) == (0, "" if error else "5")


async def _of_raw(answer: bytes, ask: Callable[[Address], Awaitable[Any]]) -> Any:
    """Return what is made of an answer of a server, of whatever bytes."""

    async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with suppress(OSError):
            writer.write(answer)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answered, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return await ask(Address("127.0.0.1", port))


def test_who_does_not_answer_is_not_waited_for() -> None:
    """From the first thing on that is asked, which is the name of the model."""
    silent = socket.create_server(("127.0.0.1", 0))
    address = Address("127.0.0.1", silent.getsockname()[1])
    with silent, pytest.raises(ServingError, match=r"did not answer within 0\.05 s"):
        asyncio.run(find(address, timeout=0.05))


def test_servers_that_are_none() -> None:
    with pytest.raises(ServingError, match=r"nobody answers at 127\.0\.0\.1:9"):
        asyncio.run(find(Address.of("127.0.0.1:9")))
    fake = FakeServer(fails={1: 500}, ids=False)
    with fake.running(), pytest.raises(ServingError, match="HTTP 500, queue_full"):
        asyncio.run(find(Address.of(fake.url)))
    with fake.running(), pytest.raises(ServingError, match="a route that tokenizes"):
        asyncio.run(find(Address.of(fake.url), prompts="ids"))


@pytest.mark.parametrize(
    "options",
    [
        {"own": 0},
        {"out": 0},
        {"shared": -1},
        {"turns": 0},
        {"turns": 2, "grows": 0},
        {"drops": 1.1},
        {"drops": math.nan},
    ],
)
def test_conversations_nobody_has(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        WorkloadShape(**{"shared": 1, "own": 1, "out": 1, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clients": 0},
        {"rate": 0.0},
        {"rate": math.nan},
        {"clients": 1, "seconds": -1},
        {"clients": 1, "cut": True},
    ],
)
def test_loads_that_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Load(conversations=1, **options)

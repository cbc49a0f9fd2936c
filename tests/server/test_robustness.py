"""What clients do that go, do not read, or ask for too much: nobody else is worse off."""

import asyncio
import json
import logging
import socket
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from quintet.tokenization.encoding import Encoder
from server.hostile import Slow, completion, first_event, slow
from server.talking import CONTEXT
from waiting import in_some_try, until

CANARY = "zanzibar4711"
STEP = 0.02


@pytest.fixture(scope="module")
def patient() -> Iterator[Slow]:
    """A server of four rows whose steps take a while."""
    with slow(STEP) as it:
        yield it


@pytest.fixture(scope="module")
def quick() -> Iterator[Slow]:
    with slow() as it:
        yield it


# -- clients that go -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["waiting", "reading", "writing"])
def test_the_work_for_a_client_that_went_ends(patient: Slow, phase: str, stream: bool) -> None:
    """Whatever it has come to: its row is free within a step, and its answer goes on no further."""
    engine, before = patient.engine, patient.engine.state
    come = {
        "waiting": lambda state: state.waiting == 1,
        "reading": lambda state: state.running == 1,
        "writing": lambda state: state.generated >= before.generated + 3,
    }

    async def go() -> None:
        async with asyncio.TaskGroup() as others:
            if phase == "waiting":
                for _ in range(4):
                    others.create_task(patient.whole(completion(50)))
                await patient.until(running=4)
            under_way = patient.server.service.under_way
            patient.halt(come[phase])
            prompt = [40 + n % 50 for n in range(400)] if phase == "reading" else [40, 41]
            body = completion(100, prompt=prompt, stream=stream, cache_salt=f"{phase} {stream}")
            asking = asyncio.create_task(_ask_for_ever(patient, body))
            await patient.so(patient.halted.is_set)
            left, steps = engine.state.left.get(phase, 0), engine.state.steps
            asking.cancel()
            # The loop hears of it, the engine reads it before its next plan.
            await patient.so(lambda: patient.server.service.under_way == under_way)
            patient.go_on()
            await patient.so(lambda: engine.state.left.get(phase, 0) > left)
            assert engine.state.steps - steps <= 4
        await patient.idle()

    asyncio.run(go())
    after = patient.engine.state
    assert after.left[phase] == before.left.get(phase, 0) + 1
    others = 200 if phase == "waiting" else 0
    assert after.generated - before.generated <= others + 8


async def _ask_for_ever(server: Slow, body: dict[str, Any]) -> None:
    async with server.asked(body) as reply:
        async for _ in reply.pieces():
            pass


def test_all_answers_of_a_request_end_with_its_client(patient: Slow) -> None:
    async def go() -> None:
        async with patient.asked(completion(200, n=4, stream=True, temperature=1)) as reply:
            await first_event(reply)
            await patient.until(running=4)
        await patient.idle()

    before = patient.engine.state
    asyncio.run(go())
    after = patient.engine.state
    assert sum(after.left.values()) - sum(before.left.values()) == 4
    assert after.generated - before.generated < 400


def test_a_thousand_clients_come_and_go(quick: Slow) -> None:
    """In all ways there are to go; afterwards the server is what it was."""
    port = quick.server.port
    body = json.dumps(completion(50, stream=True)).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    ways = (b"", b"POST /v1", head, head + body[:20], head + body, head + body)

    async def come(number: int, gate: asyncio.Semaphore) -> None:
        async with gate:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(ways[number % len(ways)])
            if number % 4 == 0:
                await asyncio.sleep(0.005)
            writer.transport.abort()
            del reader

    async def go() -> None:
        gate = asyncio.Semaphore(40)
        await asyncio.gather(*(come(number, gate) for number in range(1000)))
        await quick.idle()
        # Nothing is left of them: what counts requests under way counts none.
        await quick.so(lambda: not quick.server.service.under_way)
        status, answer = await quick.whole(completion(4))
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 4
        await quick.idle()

    asyncio.run(go())


def test_a_reader_that_stops_is_cut_off() -> None:
    """Its answers take no more memory than is said, and others get theirs meanwhile."""
    with slow(0.002, buffer=16 << 10, stall=0.3) as server:
        body = json.dumps(completion(400, n=8, logprobs=20, stream=True, temperature=1)).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", server.server.port))
            reader.sendall(head.encode() + body)

            async def others() -> None:
                await server.until(running=4)
                status, _ = await server.whole(completion(10))
                assert status == 200
                await server.idle()

            asyncio.run(others())

        def cut() -> bool:
            said = server.server.ask("GET", "/metrics").body.decode()
            return 'quintet_request_errors_total{code="slow_reader"} 1.0' in said

        until(cut)
        assert server.engine.state.generated < 8 * 400


# -- more than there is room for -------------------------------------------------------------------


def test_who_comes_when_the_queue_is_full_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[object] = []
    call = Encoder.__call__

    def reading(self: Any, text: Any, *rest: Any, **options: Any) -> Any:
        read.append(text)
        return call(self, text, *rest, **options)

    with slow(0.0, {"rows": 1, "queue": 2}) as server:

        async def go() -> list[Any]:
            server.halt(lambda state: state.running == 1)
            async with asyncio.TaskGroup() as group:
                group.create_task(server.whole(completion(12)))
                await server.so(server.halted.is_set)
                for _ in range(2):
                    group.create_task(server.whole(completion(2)))
                await server.so(lambda: server.engine.full)
                monkeypatch.setattr(Encoder, "__call__", reading)
                answers = []
                # All of it while no step ends.
                for _ in range(20):
                    async with server.asked(completion(4, prompt="some text")) as reply:
                        answers.append(
                            (reply.status, reply.headers, json.loads(await reply.read()))
                        )
                monkeypatch.undo()
                server.go_on()
            return answers

        answers = asyncio.run(go())
    for status, headers, answer in answers:
        assert status == 503
        assert int(headers["retry-after"]) >= 1
        assert answer["error"]["code"] == "queue_full"
    assert read == []


def test_sixty_at_once_are_all_answered_in_turn() -> None:
    with slow(0.001, {"rows": 4, "queue": 64}) as server:

        async def one() -> int:
            status, answer = await server.whole(completion(4))
            assert status == 200
            assert answer["usage"]["completion_tokens"] == 4
            return server.engine.state.steps

        async def go() -> list[int]:
            return list(await asyncio.gather(*(one() for _ in range(60))))

        waited = asyncio.run(go())
    assert max(waited) / statistics.median(waited) < 3


@pytest.mark.parametrize("kind", ["ids", "text", "chat"])
def test_prompts_up_to_the_limit_and_beyond(
    quick: Slow, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    call = Encoder.__call__

    def reading(self: Any, text: Any, *rest: Any, **options: Any) -> Any:
        read.append(len(text) if isinstance(text, str) else 0)
        return call(self, text, *rest, **options)

    def asked(count: int) -> Any:
        path, body = "/v1/completions", completion(1)
        if kind == "ids":
            body["prompt"] = [40] * count
        elif kind == "text":
            # A digit is a token.
            body["prompt"] = "7" * count
        else:
            path, body["messages"] = (
                "/v1/chat/completions",
                [{"role": "user", "content": "7" * count}],
            )
            del body["prompt"]
        return quick.server.ask("POST", path, body)

    room = CONTEXT - 1
    if kind == "chat":
        room -= asked(1).json()["usage"]["prompt_tokens"] - 1
    fits = asked(room)
    assert fits.status == 200, fits.body
    assert fits.json()["usage"]["prompt_tokens"] == CONTEXT - 1
    monkeypatch.setattr(Encoder, "__call__", reading)
    for count in (room + 1, 10 * CONTEXT, 100 * CONTEXT):
        read.clear()
        answer = asked(count)
        assert answer.status == 400
        assert answer.error["code"] == "context_length_exceeded"
        assert str(CONTEXT) in answer.error["message"]
        # However long it is, not much more is read than fits.
        assert sum(read) <= 16 * CONTEXT
    until(lambda: quick.engine.state.running == 0)


def test_what_one_client_does_delays_others_by_a_step_at_most(patient: Slow) -> None:
    """Prompts of any length, grammars of any kind, clients that went or do not read."""

    async def gaps(count: int) -> list[float]:
        async with patient.asked(completion(count, stream=True)) as reply:
            came = [time.perf_counter() async for data in reply.events() if data != "[DONE]"]
        return [after - before for before, after in pairwise(came)]

    bad: tuple[dict[str, Any], ...] = (
        completion(100, stream=True),
        completion(4, prompt="7 " * 100_000),
        completion(4, prompt=[40 + n % 9 for n in range(450)], cache_salt="x"),
        completion(4, regex="(a{1,1000}){1,1000}b" * 20),
        completion(4, regex="((((a|b)*)*)*)*c{9999}"),
        completion(4, prompt=[patient.broken] * 5),
    )

    async def misbehave() -> None:
        while True:
            for body in bad:
                with_end = asyncio.timeout(0.1)
                try:
                    async with with_end, patient.asked(body) as reply:
                        await reply.read()
                except TimeoutError:
                    pass

    async def go() -> tuple[float, float]:
        alone = await gaps(40)
        nuisances = [asyncio.create_task(misbehave()) for _ in range(2)]
        beside = await gaps(50)
        for one in nuisances:
            one.cancel()
        await asyncio.gather(*nuisances, return_exceptions=True)
        await patient.idle()
        return statistics.quantiles(alone, n=20)[-1], statistics.quantiles(beside, n=20)[-1]

    # A step and a piece of a prompt instead of a step; the rest is this machine's, under tests.
    in_some_try(lambda: asyncio.run(go()), lambda found: found[1] <= 2 * found[0] + STEP)
    assert patient.engine.healthy


# -- what nobody else may see ----------------------------------------------------------------------


def test_nothing_that_was_said_is_in_logs_or_metrics(caplog: pytest.LogCaptureFixture) -> None:
    key = f"key-{CANARY}"
    with slow(keys=(key,)) as server, caplog.at_level(logging.DEBUG):
        headers = {"Authorization": f"Bearer {key}"}

        def ask(path: str, body: Any, **more: str) -> int:
            return server.server.ask("POST", path, body, {**headers, **more}).status

        chat = {"model": "tiny", "messages": [{"role": "user", "content": CANARY}]}
        statuses = [
            ask("/v1/completions", completion(4, prompt=CANARY)),
            ask("/v1/completions", completion(4, prompt=CANARY, stream=True)),
            ask("/v1/completions", completion(4, stop=[CANARY], user=CANARY)),
            ask("/v1/completions", completion(4, cache_salt=CANARY)),
            ask("/v1/chat/completions", {**chat, "max_tokens": 2}),
            ask("/v1/chat/completions", {**chat, "max_tokens": 2, CANARY: CANARY}),
            ask("/tokenize", {"model": "tiny", "prompt": CANARY}),
        ]
        assert statuses == [200] * 7
        refused = [
            ask("/v1/completions", completion(4, prompt=CANARY, temperature=CANARY)),
            ask("/v1/completions", {"model": CANARY, "prompt": CANARY}),
            ask("/v1/completions", f'{{"prompt": "{CANARY}'.encode()),
            ask("/v1/completions", completion(4, prompt=CANARY * 10_000)),
            ask("/v1/completions", completion(4, prompt=[server.broken, 41])),
            ask("/v1/completions", completion(4, regex=f"({CANARY}")),
            ask(f"/v1/{CANARY}?{CANARY}={CANARY}", {CANARY: 1}),
            ask("/v1/completions", completion(4), Authorization=f"Bearer {CANARY}"),
            ask("/v1/completions", completion(4), Host=f"{CANARY}.org"),
            ask("/v1/completions", completion(4), Origin=f"http://{CANARY}.org"),
            ask("/v1/completions", b"x", **{"Content-Type": f"text/{CANARY}"}),
        ]
        assert all(status >= 400 for status in refused)
        told = server.server.ask("GET", "/metrics", headers=headers).body.decode()
    assert len(caplog.records) >= len(statuses) + len(refused)
    for record in caplog.records:
        assert CANARY not in f"{record.__dict__} {record.getMessage()}"
    assert "quintet_generation_tokens_total" in told
    assert CANARY not in told


def test_what_one_has_said_is_read_anew_for_another() -> None:
    with slow(keys=("one-key", "other-key")) as server:

        def cached(key: str, **more: Any) -> int:
            body = completion(2, prompt=[40 + n % 50 for n in range(200)], **more)
            answer = server.server.ask(
                "POST", "/v1/completions", body, {"Authorization": f"Bearer {key}"}
            )
            return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert cached("one-key") == 0
        assert cached("one-key") > 100
        assert cached("other-key") == 0
        assert cached("one-key", cache_salt="a") == 0
        assert cached("one-key", cache_salt="a") > 100
        assert cached("one-key", cache_salt="b") == 0
        # A salt is no way into what another's key has said.
        assert cached("other-key", cache_salt="a") == 0


def test_numbers_that_are_none_end_one_request_alone(quick: Slow) -> None:
    async def go() -> list[tuple[int, Any]]:
        bad = completion(12, prompt=[40, quick.broken, 41])
        return await asyncio.gather(
            *(quick.whole(completion(12, prompt=[40 + n, 41, 42])) for n in range(3)),
            quick.whole(bad),
            quick.whole({**bad, "n": 2}),
        )

    alone = [
        quick.server.ask("POST", "/v1/completions", completion(12, prompt=[40 + n, 41, 42])).json()
        for n in range(3)
    ]
    *good, bad, both = asyncio.run(go())
    for (status, answer), expected in zip(good, alone, strict=True):
        assert status == 200
        assert answer["choices"] == expected["choices"]
    for status, answer in (bad, both):
        assert status == 500
        assert answer["error"]["code"] == "nonfinite"
    assert quick.engine.healthy

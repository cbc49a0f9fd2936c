"""Who may ask: keys, names of hosts, origins of pages."""

import asyncio
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from quintet.errors import InputError
from quintet.server.failures import ApiError
from quintet.server.security import Gate, Keys
from quintet.server.settings import Settings, as_keys
from served import Running, serving
from waiting import PATIENCE, in_some_try

KEY, OTHER = "sk-one-of-two", "sk-the-other"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(
        keys=(KEY, OTHER),
        allowed_hosts=("models.example",),
        allowed_origins=("https://app.example",),
    ) as it:
        yield it


def asked(server: Running, path: str = "/v1/models", key: str | None = KEY, **headers: str) -> int:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if key is not None:
        given["Authorization"] = f"Bearer {key}"
    return server.ask("GET", path, headers=given).status


def test_every_route_but_probes_needs_a_key(server: Running) -> None:
    told = server.ask("GET", "/openapi.json", headers={"x-api-key": KEY}).json()
    routes = [(method, path) for path, its in told["paths"].items() for method in its]
    assert len(routes) > 5
    for method, path in routes:
        status = server.ask(method.upper(), path).status
        assert (status == 401) == (path not in ("/health", "/ready", "/")), path
    for path in ("/openapi.json", "/metrics", "/nothing", "/health/", "/Health", "/ready/x"):
        assert asked(server, path, None) == 401, path


def test_any_of_the_keys_opens_it_in_either_header(server: Running) -> None:
    assert asked(server) == asked(server, key=OTHER) == 200
    assert asked(server, key=None, x_api_key=KEY) == 200
    assert server.ask("GET", "/version", headers={"Authorization": f"bearer  {KEY} "}).status == 200


@pytest.mark.parametrize(
    "key",
    [
        *("", " ", "x", KEY[:-1], KEY + "x", KEY.upper(), f"{KEY},{OTHER}", "Bearer", "null"),
        "é".encode().decode("latin-1"),
        "k" * 60_000,
    ],
    ids=range(11),
)
def test_a_wrong_key_is_refused_in_one_shape(server: Running, key: str) -> None:
    for headers in ({"Authorization": f"Bearer {key}"}, {"x-api-key": key}):
        answer = server.ask("GET", "/v1/models", headers=headers)
        assert answer.status == 401
        assert answer.error["code"] == "invalid_api_key"
        assert KEY not in answer.body.decode()


def test_a_wrong_key_is_refused_before_the_body_is_read(server: Running) -> None:
    body = b"[" * 3_000_000
    assert server.ask("POST", "/tokenize", body, {"Authorization": "Bearer x"}).status == 401


def test_a_wrong_scheme_is_no_key(server: Running) -> None:
    for value in (KEY, f"Basic {KEY}", f"Bearer{KEY}", "Bearer"):
        assert server.ask("GET", "/v1/models", headers={"Authorization": value}).status == 401


@pytest.mark.parametrize(
    ("line", "host", "status"),
    [
        ("GET /v1/models HTTP/1.1", "localhost", 401),
        ("GET //v1/models HTTP/1.1", "localhost", 400),
        ("GET /V1/models HTTP/1.1", "localhost", 401),
        ("GET /v1/%2e%2e/health HTTP/1.1", "localhost", 401),
        ("GET /health/../v1/models HTTP/1.1", "localhost", 401),
        ("GET /%68ealth HTTP/1.1", "localhost", 400),
        ("GET /health%2f..%2fv1/models HTTP/1.1", "localhost", 401),
        ("GET /health;x HTTP/1.1", "localhost", 401),
        ("GET /v1/models?/health HTTP/1.1", "localhost", 401),
        ("GET http://localhost/health HTTP/1.1", "localhost", 400),
        ("GET http://evil.example/v1/models HTTP/1.1", "localhost", 400),
        ("GET health HTTP/1.1", "localhost", 400),
        ("GET * HTTP/1.1", "localhost", 400),
        ("GET /v1/models HTTP/1.1", "localhost/v1/models?", 400),
        ("GET /v1/models HTTP/1.1", "a#b", 400),
        ("GET /v1/models HTTP/1.1", "user@localhost", 400),
        ("GET /v1/models HTTP/1.1", "localhost:80:80", 400),
        ("GET /health HTTP/1.1", "", 400),
        ("GET /health HTTP/1.0", None, 400),
        ("GET /health HTTP/1.1", "evil.example", 403),
        ("GET /health HTTP/1.1", "localhost.evil.example", 403),
        ("GET /health HTTP/1.1", "127.0.0.1.evil.example", 403),
        ("GET /health HTTP/1.1", "LOCALHOST.:99", 200),
        ("GET /health HTTP/1.1", "127.0.0.1:1", 200),
        ("GET /health HTTP/1.1", "[::1]:8000", 200),
        ("GET /health HTTP/1.1", "models.example", 200),
        ("GET /health\\..\\v1 HTTP/1.1", "localhost", 400),
    ],
)
def test_no_odd_address_goes_around_the_gate(
    server: Running, line: str, host: str | None, status: int
) -> None:
    lines = [line, *([] if host is None else [f"Host: {host}"]), "Connection: close", "", ""]
    with socket.create_connection((server.host, server.port), timeout=PATIENCE) as sock:
        sock.sendall("\r\n".join(lines).encode())
        assert int(sock.makefile("rb").readline().split()[1]) == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://evil.example", 403),
        ("null", 403),
        ("http://localhost", 403),
        ("https://app.example.evil.example", 403),
        ("https://app.example", 200),
    ],
)
def test_pages_of_other_origins_may_not_ask(server: Running, origin: str, status: int) -> None:
    answer = server.ask("GET", "/v1/models", headers={"Origin": origin, "x-api-key": KEY})
    assert answer.status == status
    allowed = origin if status == 200 else None
    assert answer.headers["access-control-allow-origin"] == allowed
    before = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    assert server.ask("OPTIONS", "/v1/models", headers=before).status == (
        204 if status == 200 else 403
    )


def test_a_page_that_may_ask_reads_errors_and_sends_headers_of_its_client(server: Running) -> None:
    page = {"Origin": "https://app.example"}
    for path, key, status in (
        ("/v1/models", "wrong", 401),
        ("/v1/nothing", KEY, 404),
        ("/v1/models/x", KEY, 404),
        ("/tokenize", KEY, 400),
    ):
        body = {} if path == "/tokenize" else None
        method = "GET" if body is None else "POST"
        answer = server.ask(method, path, body, {**page, "x-api-key": key})
        assert answer.status == status
        assert answer.headers["access-control-allow-origin"] == page["Origin"]
        assert "warnings" in answer.headers["access-control-expose-headers"]
    before = {**page, "Access-Control-Request-Method": "POST"}
    for wanted, given in (("x-stainless-os, anthropic-version", None), ("a\tb;", "")):
        asked = {**before, "Access-Control-Request-Headers": wanted}
        answer = server.ask("OPTIONS", "/v1/models", headers=asked)
        allowed = wanted if given is None else given
        assert answer.headers["access-control-allow-headers"] == allowed
        assert answer.headers["access-control-allow-origin"] == page["Origin"]


def test_its_own_page_may_ask(server: Running) -> None:
    for host in (f"127.0.0.1:{server.port}", "models.example"):
        assert asked(server, Host=host, Origin=f"http://{host}") == 200


def test_time_tells_nothing_of_a_key() -> None:
    keys = Keys([KEY, OTHER])
    tried = [b"x" * len(KEY), KEY[:-1].encode() + b"x", OTHER[:-1].encode() + b"x"]

    def medians() -> list[float]:
        times: list[list[float]] = [[], [], []]
        for _ in range(3000):
            for number, key in enumerate(tried):
                began = time.perf_counter()
                keys.holder(key)
                times[number].append(time.perf_counter() - began)
        return [statistics.median(its) for its in times]

    in_some_try(medians, lambda found: max(found) < 1.2 * min(found))


def test_keys_are_not_kept() -> None:
    keys = Keys([KEY])
    assert KEY not in repr(vars(keys))
    assert KEY not in repr(Settings(keys=(KEY,)))
    assert keys.holder(KEY.encode()) == Keys([OTHER, KEY]).holder(KEY.encode())
    assert keys.holder(b"") is None
    assert not Keys([])


def test_holders_are_told_apart() -> None:
    keys = Keys([KEY, OTHER])
    assert keys.holder(KEY.encode()) != keys.holder(OTHER.encode())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "models.example"])
def test_the_network_is_answered_only_with_a_key(host: str) -> None:
    with pytest.raises(InputError, match="--insecure-no-auth"):
        Settings(host=host).check_address()
    Settings(host=host, keys=(KEY,)).check_address()
    Settings(host=host, insecure_no_auth=True).check_address()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.8.8.8"])
def test_this_machine_is_answered_without(host: str) -> None:
    Settings(host=host).check_address()


@pytest.mark.parametrize("key", ["", " ", "é", "a\nb"])
def test_a_key_that_no_header_holds_is_none(key: str) -> None:
    with pytest.raises(InputError, match="printable ASCII"):
        Settings(keys=(key,))


@pytest.mark.parametrize("host", ["name:80", "http://name", "", "a b", "a/b", "\u00fc"])
def test_names_that_no_request_has_are_refused(host: str) -> None:
    """They would let nobody in, without a word."""
    with pytest.raises(InputError, match="is no name of a host"):
        Settings(allowed_hosts=(host,))


@pytest.mark.parametrize("origin", ["name", "https://", "https://a/b", "", "//a", "https://a:x"])
def test_origins_that_no_page_has_are_refused(origin: str) -> None:
    with pytest.raises(InputError, match="is no origin of a page"):
        Settings(allowed_origins=(origin,))


def test_names_and_origins_that_there_are_are_taken() -> None:
    Settings(allowed_hosts=("*", "Name.example", "[::1]", "10.0.0.1"))
    Settings(allowed_origins=("*", "https://Name", "http://a:80", "https://a/", "app://[::1]:5"))


def test_files_of_keys_have_comments() -> None:
    assert as_keys(["# mine", "", " a ", "b"]) == ("a", "b")


@pytest.mark.parametrize("path", ["/metrics", "/load", "/v1/models"])
def test_who_watches_is_answered_when_others_are_not(path: str) -> None:
    """When there are too many requests, and while the server ends."""
    answered: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        answered.append(scope["path"])

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        pass

    for changes in ({"under_way": 513}, {"draining": True}):
        service: Any = SimpleNamespace(
            **{"settings": Settings(), "under_way": 1, "draining": False, **changes}
        )
        scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "headers": [(b"host", b"localhost")],
            "state": {},
        }
        with nullcontext() if path != "/v1/models" else pytest.raises(ApiError) as refused:
            asyncio.run(Gate(app, service)(scope, receive, send))
        assert refused is None or refused.value.status == 503
    assert answered == ([] if path == "/v1/models" else [path, path])

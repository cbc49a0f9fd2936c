"""The settings of a server."""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from quintet.errors import InputError, shown
from quintet.serving.options import Speculation, check_speculation

KIB = 1 << 10
MIB = 1 << 20
# Timers of the system and of sockets have no larger numbers: seconds, and bytes.
LONGEST, LARGEST = 10**9, 1 << 30
HOST = re.compile(r"\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9._-]{1,253}")
ORIGIN = re.compile(rf"[A-Za-z][A-Za-z0-9+.-]*://(?:{HOST.pattern})(?::\d{{1,5}})?/?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of a server, besides its engines' limits.

    Attributes:
        host: the address it listens at.
        port: the port; 0 for any that is free.
        keys: who may ask: any of these; empty for everybody.
        insecure_no_auth: an address that others reach is fine without keys.
        allowed_hosts: names by which it may be asked, besides addresses, `localhost` and `host`;
            "*" for any.
        allowed_origins: pages of other origins whose scripts may ask; "*" for any.
        page: whether it has a page to chat on.
        docs: whether it describes itself at /openapi.json.
        speculate: how tokens are guessed ahead where a request does not say: "off", "mtp" by the
            model's prediction layers, or "lookup" from what was read.
        strict: refuse fields that are not known, instead of naming them in `warnings`.
        requests: how many requests there may be at once, whatever they are at.
        body: how many bytes a request may have.
        header: how many bytes the head of a request may have.
        depth: how deep JSON may nest.
        head_time: within how many seconds the head of a request has to be there.
        body_time: within how many seconds its body has to be there.
        deadline: how many seconds an answer may take.
        keep_alive: how many seconds a connection is kept for a next request.
        drain: how many seconds requests have to finish when the server is told to end.
        ping: after how many silent seconds a stream shows that it is alive.
        buffer: how many bytes of a stream may wait for a reader that is slow.
        stall: for how many seconds a reader may take nothing.
        step: how many seconds a model may take for a step; for longer, it counts as failed.
        messages: how many messages a conversation may have.
        answer: how many tokens an answer has at most where the request does not say.
        choices: how many answers a request may ask for.
        prompts: how many prompts a request may have.
        stops: how many texts may end an answer.
        stop_length: how many characters each of these may have.
        top_logprobs: how many other tokens may be told of for each.
        scores: how many scores of tokens are kept until answers are whole, of all requests.
        biases: how many tokens a request may favour.
        tools: how many tools a request may offer.
        schema: how many bytes a schema may have.

    Raises:
        InputError: a number below its least.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = field(default=(), repr=False)
    insecure_no_auth: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    page: bool = True
    docs: bool = True
    speculate: Speculation = "off"
    strict: bool = False
    requests: int = 512
    body: int = 8 * MIB
    header: int = 64 * KIB
    depth: int = 64
    head_time: float = 10.0
    body_time: float = 60.0
    deadline: float = 600.0
    keep_alive: float = 5.0
    drain: float = 30.0
    ping: float = 15.0
    buffer: int = 256 * KIB
    stall: float = 30.0
    step: float = 300.0
    messages: int = 2048
    answer: int = 4096
    choices: int = 16
    prompts: int = 128
    stops: int = 16
    stop_length: int = 256
    top_logprobs: int = 20
    scores: int = 1 << 20
    biases: int = 300
    tools: int = 128
    schema: int = 64 * KIB

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InputError(f"port={self.port} has to be from 0 to 65535")
        check_speculation(self.speculate)
        for least, numbers in (
            (
                1,
                {
                    "requests": self.requests,
                    "body": self.body,
                    "header": self.header,
                    "depth": self.depth,
                    "buffer": self.buffer,
                    "messages": self.messages,
                    "answer": self.answer,
                    "choices": self.choices,
                    "prompts": self.prompts,
                    "stop_length": self.stop_length,
                    "scores": self.scores,
                    "schema": self.schema,
                },
            ),
            (
                0,
                {
                    "stops": self.stops,
                    "top_logprobs": self.top_logprobs,
                    "biases": self.biases,
                    "tools": self.tools,
                },
            ),
        ):
            for name, number in numbers.items():
                if number < least:
                    raise InputError(f"{name}={number} has to be at least {least}")
        for name, seconds in (
            ("head_time", self.head_time),
            ("body_time", self.body_time),
            ("deadline", self.deadline),
            ("keep_alive", self.keep_alive),
            ("ping", self.ping),
            ("stall", self.stall),
            ("step", self.step),
        ):
            if not 0 < seconds <= LONGEST:
                raise InputError(
                    f"{name}={seconds} has to be above 0 seconds, and {LONGEST:,} at the most"
                )
        if not 0 <= self.drain <= LONGEST:
            raise InputError(f"drain={self.drain} has to be from 0 to {LONGEST:,} seconds")
        if self.buffer > LARGEST:
            raise InputError(f"buffer={self.buffer} has to be at most {LARGEST:,} bytes")
        for host in self.allowed_hosts:
            if host != "*" and not HOST.fullmatch(host):
                raise InputError(
                    f"{shown(host)} is no name of a host, which has no scheme and no port; give "
                    "NAME, or * for any"
                )
        for origin in self.allowed_origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise InputError(
                    f"{shown(origin)} is no origin of a page; they look like https://name, or "
                    "https://name:8080, or give * for any"
                )
        for key in self.keys:
            if not key.strip() or not key.isascii() or not key.isprintable():
                raise InputError(
                    "a key has to be printable ASCII and not empty, as it travels in a header; "
                    "make one by `openssl rand -hex 32`"
                )

    @property
    def is_open(self) -> bool:
        """Whether other machines may ask without a key."""
        return not self.keys and not is_loopback(self.host)

    def check_address(self) -> None:
        """Refuse to be open to the network by mistake.

        Raises:
            InputError: an address that others reach, and no key.
        """
        if self.is_open and not self.insecure_no_auth:
            raise InputError(
                f"{shown(self.host)} can be reached from other machines, and there is no key; set "
                "QUINTET_API_KEY or --api-key-file, or say --insecure-no-auth to answer everybody"
            )


def is_loopback(host: str) -> bool:
    """Return whether an address is local."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def as_keys(lines: Iterable[str]) -> tuple[str, ...]:
    """Parse keys, one per line; empty lines and comments (#) are skipped."""
    stripped = (line.strip() for line in lines)
    return tuple(line for line in stripped if line and not line.startswith("#"))

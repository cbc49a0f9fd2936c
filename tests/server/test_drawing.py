"""What is drawn without a seed cannot be foretold."""

import socket

import pytest
import torch

from quintet.server import process
from quintet.server.service import Service
from quintet.server.settings import Settings


class Registry:
    def close(self) -> None:
        pass


class Idle:
    force_exit, code = False, 0

    def __init__(self, service: Service) -> None: ...

    def run(self, sockets: list[socket.socket]) -> None:
        DRAWN.append(torch.rand(4).tolist())


DRAWN: list[list[float]] = []


def test_a_server_draws_anew_after_each_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "HttpServer", Idle)
    state = torch.get_rng_state()
    try:
        for _ in range(2):
            torch.manual_seed(0)
            with socket.socket() as sock:
                service = Service(Settings(), Registry())  # type: ignore[arg-type]
                assert process.serve(service, sock) == 0
    finally:
        torch.set_rng_state(state)
    assert DRAWN[0] != DRAWN[1]

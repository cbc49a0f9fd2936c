"""Several models and adapters by name, in memory while they are asked for; and one that fails."""

import gc
import signal
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from quintet import AutoModelForCausalLM, AutoTokenizer, LoraConfig, demo_model
from quintet.errors import CheckpointError, InputError, RankFailedError
from quintet.server.registry import Loaded, ModelRegistry, Offer
from quintet.serving import Engine, Limits
from served import loaded, serving
from waiting import until

PROMPT = {"prompt": "def fibonacci(n):", "max_tokens": 6, "temperature": 0}


def completed(server: Any, model: str) -> str:
    answer = server.ask("POST", "/v1/completions", {**PROMPT, "model": model})
    assert answer.status == 200, answer.body
    text: str = answer.json()["choices"][0]["text"]
    return text


def slow(engine: Engine) -> None:
    """Have the forwards of an engine take long."""
    run = engine.model.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        time.sleep(0.05)
        return run(*arguments, **named)

    engine.model.forward = forward  # type: ignore[method-assign]


def test_an_idle_model_is_unloaded_and_comes_back() -> None:
    times: list[float] = []

    def load() -> Loaded:
        times.append(time.monotonic())
        return loaded(Limits(rows=2, capacity=128))

    with serving(Offer("one", loaded, loaded=loaded()), Offer("two", load)) as server:
        listed = {one["id"]: one for one in server.ask("GET", "/v1/models").json()["data"]}
        assert (listed["one"]["loaded"], listed["two"]["loaded"]) == (True, False)
        assert listed["two"]["max_model_len"] is None
        said = completed(server, "two")
        assert said == completed(server, "one")
        assert server.ask("GET", "/load").json()["models"].keys() == {"one", "two"}
        engine = server.service.registry.engines["two"]
        model = weakref.ref(engine.model)
        assert server.ask("POST", "/v1/models/two/unload").json()["loaded"] is False
        assert server.ask("POST", "/v1/models/two/unload").status == 200
        assert not engine.healthy
        del engine
        gc.collect()
        assert model() is None
        assert server.ask("GET", "/health").status == 200
        assert completed(server, "two") == said
        assert len(times) == 2
        assert server.ask("POST", "/v1/models/three/unload").status == 404


def test_a_model_at_work_stays() -> None:
    with serving() as server:
        slow(server.service.registry.engines["demo"])
        connection = server.connect()
        body = b'{"model": "demo", "prompt": "a", "max_tokens": 200, "stream": true}'
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert connection.getresponse().readline()
        answer = server.ask("POST", "/v1/models/demo/unload")
        connection.close()
        assert (answer.status, answer.error["code"]) == (409, "model_busy")


def test_many_wait_for_one_loading() -> None:
    times: list[float] = []

    def load() -> Loaded:
        times.append(0)
        time.sleep(0.2)
        return loaded()

    with serving(Offer("slow", load)) as server, ThreadPoolExecutor(4) as pool:
        texts = set(pool.map(lambda _: completed(server, "slow"), range(4)))
        # Probes are answered meanwhile.
        assert server.ask("GET", "/health").status == 200
    assert len(times) == len(texts) == 1


def test_what_keeps_a_model_from_loading_is_not_told() -> None:
    def load() -> Loaded:
        raise CheckpointError("/secret/place is damaged")

    with serving(Offer("broken", load)) as server:
        answer = server.ask("POST", "/v1/completions", {**PROMPT, "model": "broken"})
        assert (answer.status, answer.error["code"]) == (500, "model_not_loaded")
        assert b"secret" not in answer.body
        assert server.ask("GET", "/health").status == 200


def test_an_adapter_is_a_model_by_its_name(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear"), "poet")
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name.lower():
                parameter.normal_(0, 0.1)
    model.set_adapter([])
    engine = Engine(model, tokenizer, Limits(rows=2, capacity=128))
    offer = Offer("demo", loaded, ("poet",), Loaded(engine, tokenizer, 128, "fp_test"))
    with serving(offer) as server:
        listed = server.ask("GET", "/v1/models").json()["data"]
        assert [(one["id"], one["parent"]) for one in listed] == [("demo", None), ("poet", "demo")]
        plain, put_on = completed(server, "demo"), completed(server, "poet")
        assert plain != put_on
        assert completed(server, "demo") == plain
        model.set_adapter("poet")
        ids = tokenizer(PROMPT["prompt"], return_tensors="pt")["input_ids"]
        own = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert tokenizer.decode(own[0, ids.shape[1] :], skip_special_tokens=True) == put_on


def test_names_are_one_each() -> None:
    with pytest.raises(InputError, match="no model"):
        ModelRegistry([])
    with pytest.raises(InputError, match="two models"):
        ModelRegistry([Offer("a", loaded), Offer("b", loaded, ("a",))])


def test_a_model_that_fails_for_good_ends_the_server() -> None:
    with serving() as server:
        engine = server.service.registry.engines["demo"]

        def step(*_: Any, **__: Any) -> Any:
            raise RuntimeError("SECRET")

        engine._engine.step = step  # type: ignore[method-assign]
        for _ in range(4):
            answer = server.ask("POST", "/v1/completions", {**PROMPT, "model": "demo"})
            assert answer.status in (500, 503)
            assert b"SECRET" not in answer.body
        answer = server.ask("GET", "/health")
        assert (answer.status, answer.json()) == (503, {"status": "failed"})
        assert server.ask("GET", "/ready").status == 503
        assert answer.status == 503
        until(lambda: server.server.code == 1)


def test_processes_that_are_gone_are_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as server:
        tried = []

        def step(*_: Any, **__: Any) -> Any:
            tried.append(1)
            raise RankFailedError(3, "(process 4711 on node0) is gone")

        engine = server.service.registry.engines["demo"]
        engine._engine.step = step  # type: ignore[method-assign]
        answer = server.ask("POST", "/v1/completions", {**PROMPT, "model": "demo"})
        assert answer.status == 503
        answer = server.ask("GET", "/health")
        assert (answer.status, answer.json()) == (503, {"status": "failed"})
        until(lambda: server.server.code == 1)
        assert len(tried) == 1
        assert "rank 3 (process 4711 on node0) is gone" in str(engine.stopped)
        # Torchrun tells all to end where one failed; it has not ended well for that.
        server.server.handle_exit(signal.SIGTERM, None)
        assert server.server.code == 1
    (said,) = [one for one in caplog.records if one.message == "failed"]
    assert vars(said)["facts"]["error"].startswith("rank 3 (process 4711 on node0)")


def test_what_takes_too_long_is_told_that_the_server_ends() -> None:
    with serving(drain=0.2) as server:
        # The model is slower than the server may be.
        slow(server.service.registry.engines["demo"])
        connection = server.connect()
        body = b'{"model": "demo", "prompt": "a", "max_tokens": 250, "stream": true, "logprobs": 5}'
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: ")
        server.server.handle_exit(signal.SIGTERM, None)
        text = answer.read()
        connection.close()
        assert b'"server_shutdown"' in text.rstrip().rsplit(b"\n\n", 1)[-1]
        assert b"[DONE]" not in text
        assert server.server.code == 0

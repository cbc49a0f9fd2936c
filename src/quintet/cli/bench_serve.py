"""`quintet bench serve`: how a server bears load."""

import asyncio
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from quintet.cli.servers import key_for, key_option
from quintet.cli.settings import COUNT, COUNT_OR_NONE
from quintet.cli.terminal import Waiting, note
from quintet.errors import InputError, shown

if TYPE_CHECKING:
    from quintet.measurement.serving.load import Load
    from quintet.measurement.serving.workload import WorkloadShape

SHAPE = ("shared", "own", "out", "turns", "grows", "drops")


@click.command("serve")
@click.argument("url")
@click.option("--model", "-m", help="The name the server knows its model by; its first one.")
@click.option(
    "--workload",
    "-w",
    type=click.Choice(["chat", "agent", "eval", "prefix", "disconnects"]),
    default="chat",
    show_default=True,
    help="What is asked for.",
)
@click.option("--clients", "-c", type=COUNT, help="Conversations at once.")
@click.option("--rate", type=float, help="Conversations that begin a second, at random.")
@click.option("--requests", "-n", type=COUNT, help="Conversations: 8 a client, or 64.")
@click.option("--seconds", "-s", type=float, help="Begin none after so long.")
@click.option("--cut", is_flag=True, help="Hang up then, whatever is under way.")
@click.option("--shared", type=COUNT_OR_NONE, help="Tokens that all prompts begin with.")
@click.option("--own", type=COUNT, help="Tokens more of a first prompt.")
@click.option("--out", type=COUNT, help="Tokens of an answer.")
@click.option("--turns", type=COUNT, help="Prompts of a conversation.")
@click.option("--grows", type=COUNT, help="Tokens more with each turn.")
@click.option("--drops", type=float, help="Share of clients that go before the end.")
@click.option(
    "--endpoint",
    type=click.Choice(["completions", "chat"]),
    default="completions",
    show_default=True,
    help="Which route is asked.",
)
@click.option(
    "--prompts",
    type=click.Choice(["auto", "ids", "text"]),
    default="auto",
    show_default=True,
    help="Ids have exact lengths; auto takes them where the server does.",
)
@click.option("--body", help="Fields of every request, as JSON; null leaves one out.")
@key_option
@click.option("--goodput", multiple=True, help="ttft:500, tpot:50, e2e:9000: good, in ms.")
@click.option("--warm", type=COUNT_OR_NONE, default=1, show_default=True, help="Before.")
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Of an answer, s.")
@click.option("--seed", type=COUNT_OR_NONE, default=0, show_default=True, help="Of what is drawn.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Nothing but the result.")
def command(
    url: str,
    model: str | None,
    workload: str,
    clients: int | None,
    rate: float | None,
    requests: int | None,
    seconds: float | None,
    cut: bool,
    endpoint: str,
    prompts: str,
    body: str | None,
    api_key_file: str | None,
    goodput: tuple[str, ...],
    warm: int,
    timeout: float,
    seed: int,
    as_json: bool,
    quiet: bool,
    **changes: Any,
) -> None:
    """Measure how the server at URL bears load; any that speaks OpenAI's protocol.

    Clients ask one request behind the other, as many at once as --clients says; or conversations
    begin at random with --rate, whether others are over or not. chat: 256 tokens that all share and
    256 more, 64 out. agent: six turns from 1,500 tokens to 4,000. eval: 128 tokens, one out.
    prefix: 1,024 that all share and 64 more, 32 out. disconnects: chat, and 30 % of the clients go.
    """
    from quintet.measurement.serving.load import Load
    from quintet.measurement.serving.summary import Goals, lines
    from quintet.measurement.serving.workload import SHAPES

    if not 0 < timeout < float("inf"):
        raise InputError(f"timeout={timeout} has to be above 0")
    goals = Goals.of(goodput)
    given = {name: value for name, value in changes.items() if value is not None}
    shape = replace(SHAPES[workload], **given)
    if clients is None and rate is None:
        clients = 8
    many = requests or (10**9 if seconds else 64 if clients is None else 8 * clients)
    load = Load(conversations=many, clients=clients, rate=rate, seconds=seconds, cut=cut, seed=seed)
    extra = _fields(body)
    key = key_for(url, api_key_file, click.get_current_context())
    with Waiting(f"asking {url}", quiet):
        target, found = asyncio.run(
            _measured(url, model, endpoint, prompts, extra, key, timeout, shape, load, warm, goals)
        )
    how = {
        "url": url,
        "model": target["model"],
        "endpoint": endpoint,
        "prompts": target["prompts"],
        "workload": workload,
        "shape": asdict(shape),
        "load": asdict(load),
        "goals": asdict(goals),
        "extra": extra,
    }
    if as_json:
        click.echo(json.dumps({**how, **found}, indent=2))
        return
    note(_described(how), quiet)
    click.echo("\n".join(lines(found)))


async def _measured(
    url: str,
    model: str | None,
    endpoint: str,
    prompts: str,
    extra: dict[str, Any],
    key: str | None,
    timeout: float,
    shape: "WorkloadShape",
    load: "Load",
    warm: int,
    goals: Any,
) -> tuple[dict[str, str], dict[str, Any]]:
    from quintet.measurement.serving.asking import find
    from quintet.measurement.serving.connection import Address
    from quintet.measurement.serving.load import run
    from quintet.measurement.serving.summary import summary
    from quintet.measurement.serving.workload import Ids

    target = await find(
        Address.of(url, key),
        model=model,
        endpoint=endpoint,
        prompts=prompts,
        extra=extra,
        timeout=timeout,
    )
    requests = await run(target, shape, load, warm=warm)
    kind = "ids" if isinstance(target.material, Ids) else "text"
    return {"model": target.model, "prompts": kind}, summary(requests, goals)


def _fields(body: str | None) -> dict[str, Any]:
    """Return the object that was given as JSON."""
    if body is None:
        return {}
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise InputError(f"--body {shown(body)} is no JSON object; for instance '{{\"top_k\": 5}}'")
    return fields


def _described(how: dict[str, Any]) -> str:
    shape, load = how["shape"], how["load"]
    size = f"{shape['shared']} + {shape['own']} tokens, {shape['out']} out"
    if shape["turns"] > 1:
        size += f", {shape['turns']} turns of {shape['grows']} more"
    who = f"{load['clients']} clients" if load["rate"] is None else f"{load['rate']:g} a second"
    return f"{how['model']}: {how['workload']} ({size}), {who}, prompts of {how['prompts']}"

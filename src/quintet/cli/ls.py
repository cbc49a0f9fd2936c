"""`quintet ls`: the models on this machine."""

from dataclasses import asdict
from datetime import UTC, datetime

import click

from quintet.cli.local_models import in_cache, in_folder, in_other_programs
from quintet.cli.output import size_of, table


@click.command("ls")
@click.argument("folders", nargs=-1, metavar="[FOLDER]...")
@click.option("--all", "-a", "everything", is_flag=True, help="Also models of other families.")
@click.option("--cache-dir", help="Where downloads are kept.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(
    folders: tuple[str, ...], everything: bool, cache_dir: str | None, as_json: bool
) -> None:
    """List the models on this machine that quintet can run, or those in FOLDERs.

    Those in the hub's cache, and those that Ollama keeps.
    """
    from quintet.auto import FAMILIES

    found = [model for folder in folders for model in in_folder(folder)]
    if not folders:
        found = [*in_cache(cache_dir), *in_other_programs()]
    rows = [asdict(model) for model in found if everything or model.family in FAMILIES]
    for row in rows:
        del row["talks"]
        if not as_json:
            row |= {"size": size_of(row["size"]), "used": _day(row["used"])}
    none = "no models here; one is fetched when it is first used, as by `quintet chat smollm2`"
    table(rows, as_json, "no models in these folders" if folders else none)


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")

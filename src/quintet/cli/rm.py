"""`quintet rm`: take models out of the hub cache."""

import difflib
import sys

import click

from quintet.cli.local_models import scanned
from quintet.cli.output import size_of
from quintet.errors import InputError, ModelNotFoundError


@click.command("rm")
@click.argument("models", nargs=-1, required=True)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--cache-dir", help="Where downloads are kept.")
def command(models: tuple[str, ...], yes: bool, dry_run: bool, cache_dir: str | None) -> None:
    """Remove MODELS, each owner/name or owner/name@revision, from the hub cache.

    Files that a revision shares with one that stays are kept.
    """
    found = scanned(cache_dir)
    hashes = [commit for model in models for commit in _commits(model, found)]
    assert found is not None
    strategy = found.delete_revisions(*hashes)
    freed = size_of(strategy.expected_freed_size)
    click.echo(f"{', '.join(models)}: {len(hashes)} revision(s), {freed}", err=True)
    if dry_run:
        return
    if not yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise InputError("nobody is there to confirm; pass --yes to remove without asking")
        click.confirm("Remove them?", abort=True, err=True)
    strategy.execute()


def _commits(model: str, found: "object") -> list[str]:
    from huggingface_hub import HFCacheInfo

    repos = found.repos if isinstance(found, HFCacheInfo) else frozenset()
    name, _, revision = model.partition("@")
    known = {repo.repo_id: repo for repo in repos if repo.repo_type == "model"}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ModelNotFoundError(f"the cache has no model {name!r}{hint}")
    chosen = [
        one.commit_hash
        for one in known[name].revisions
        if not revision or revision in one.refs or one.commit_hash.startswith(revision)
    ]
    if not chosen:
        raise ModelNotFoundError(f"the cache has no revision {revision!r} of {name!r}")
    return chosen

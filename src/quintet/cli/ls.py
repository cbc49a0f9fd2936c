"""`quintet ls`: the models in the hub cache."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quintet.cli.output import table

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo

__all__ = ["command", "scanned"]


@click.command("ls")
@click.option("--all", "-a", "everything", is_flag=True, help="Also models of other families.")
@click.option("--cache-dir", help="Where downloads are kept.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(everything: bool, cache_dir: str | None, as_json: bool) -> None:
    """List the models in the hub cache that quintet can run."""
    from quintet.auto import FAMILIES

    rows = [row for row in _rows(cache_dir) if everything or row["family"] in FAMILIES]
    if not as_json:
        rows = [{**row, "size": _size(row["size"]), "used": _day(row["used"])} for row in rows]
    table(rows, as_json, "no models in the cache")


def scanned(cache_dir: str | None) -> "HFCacheInfo | None":
    """Scan the hub cache, or return None if there is no cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return scan_cache_dir(cache_dir)
    except CacheNotFound:
        return None


def _rows(cache_dir: str | None) -> list[dict[str, Any]]:
    found = scanned(cache_dir)
    repos = [] if found is None else [repo for repo in found.repos if repo.repo_type == "model"]
    return [
        {
            "model": repo.repo_id,
            "revision": ", ".join(sorted(revision.refs)) or revision.commit_hash[:8],
            "family": _family(revision.snapshot_path),
            "size": revision.size_on_disk,
            "used": repo.last_accessed,
        }
        for repo in sorted(repos, key=lambda repo: repo.repo_id)
        for revision in sorted(repo.revisions, key=lambda revision: revision.commit_hash)
    ]


def _family(snapshot: Path) -> str | None:
    try:
        found = json.loads((snapshot / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kind = found.get("model_type") if isinstance(found, dict) else None
    return kind if isinstance(kind, str) else None


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10_000_000 else f"{size / 1e6:.2f} MB"


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")

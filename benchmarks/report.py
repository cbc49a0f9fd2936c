"""From results to a table: medians, ratios, and what of the targets is reached."""

import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.suite import TARGETS, Target

__all__ = ["lines", "main", "pooled", "ratio", "render"]

Record = dict[str, Any]


def read(paths: Sequence[Path]) -> list[Record]:
    """Return the records of result files, oldest first."""
    records = [json.loads(x) for path in paths for x in path.read_text().splitlines() if x]
    return sorted(records, key=lambda record: record["time"])


def pooled(records: Sequence[Record]) -> list[Record]:
    """Join what was measured of a case at one commit in several sittings, the newest last."""
    groups: dict[tuple[str, str], Record] = {}
    for record in records:
        key = (record["case"], record["commit"])
        earlier = groups.pop(key, None)
        if earlier is not None:
            results = dict(earlier["results"])
            for name, result in record["results"].items():
                seconds = results.get(name, {"seconds": []})["seconds"] + result["seconds"]
                results[name] = {**result, "seconds": seconds}
            record = {**record, "results": results}
        groups[key] = record
    return list(groups.values())


def median(result: Mapping[str, Any]) -> float | None:
    """Return the median seconds of a contender's result; None where there is none."""
    return statistics.median(result["seconds"]) if result["seconds"] else None


def floor(record: Mapping[str, Any], result: Mapping[str, Any]) -> float | None:
    """Return the seconds that the machine's own limits leave, where a result says its needs.

    That is what reading its bytes takes or, where it is longer, what its products take.
    """
    needed = []
    if "bytes" in result and record["bandwidth"]:
        needed.append(result["bytes"] / record["bandwidth"]["bytes_per_second"])
    if "flops" in result and record["gemm_flops_per_second"]:
        needed.append(result["flops"] / record["gemm_flops_per_second"])
    return max(needed, default=None)


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """Show one record as text."""
    yield f"{record['case']}"
    for name, result in record["results"].items():
        yield f"    {name:20} {_cell(record, result)}"


def _cell(record: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    middle = median(result)
    if middle is None:
        return f"not available: {result.get('error', 'nothing was measured')}"
    least, most = min(result["seconds"]), max(result["seconds"])
    produced = record["batch"] * (record["tokens"] if record["kind"] == "prefill" else 1)
    text = {
        "load": f"{middle:.2f} s ({least:.2f} - {most:.2f})",
        "prefill": f"{produced / middle:.1f} tok/s, {middle:.3f} s ({least:.3f} - {most:.3f})",
        "decode": f"{middle * 1e3:.2f} ms ({least * 1e3:.2f} - {most * 1e3:.2f}), "
        f"{produced / middle:.1f} tok/s",
    }[record["kind"]]
    needed = floor(record, result)
    if needed is not None:
        text += f", {needed / middle:.2f} of the floor"
    return f"{text}, peak {result['peak_memory'] / 2**30:.2f} GiB"


def ratio(target: Target, records: Sequence[Record]) -> float | None:
    """Return what a target asks for, from the newest records that have both sides of it."""
    for record in reversed(records):
        if record["case"] != target.case:
            continue
        ours = record["results"].get(target.ours)
        mine = None if ours is None else median(ours)
        if ours is None or mine is None:
            continue
        if target.against == "floor":
            needed = floor(record, ours)
            if needed is not None:
                return needed / mine
        elif target.against in record["results"]:
            theirs = median(record["results"][target.against])
            if theirs is not None:
                return float(theirs / mine)
        else:
            other = _other(target, records)
            if other is not None:
                return (record["batch"] / mine) / other
    return None


def _other(target: Target, records: Sequence[Record]) -> float | None:
    """Return the tokens a second of the other case that a target is about."""
    for record in reversed(records):
        if record["case"] == target.against and target.ours in record["results"]:
            seconds = median(record["results"][target.ours])
            if seconds is not None:
                return float(record["batch"] / seconds)
    return None


def render(records: Sequence[Record]) -> str:
    """Return the tables of targets and of all results, in Markdown."""
    records = pooled(records)
    return "\n".join([*_head(records), "", *_targets(records), "", *_results(records), ""])


def _head(records: Sequence[Record]) -> Iterator[str]:
    newest = records[-1]
    machine = newest["machine"]
    memory = "" if machine["memory"] is None else f", {machine['memory'] / 2**30:.0f} GiB"
    yield "# Ours beside the peers"
    yield ""
    yield f"{machine['cpu']}, {machine['cores']} cores{memory}; {machine['system']}; "
    yield f"Python {machine['python']}, torch {machine['torch']}; {newest['threads']} threads each."
    yield "Random weights, the same for all; times are medians, in parentheses least and most."
    yield "Commits: " + ", ".join(dict.fromkeys(_commit(record) for record in records)) + "."


def _commit(record: Record) -> str:
    return f"{record['commit']}{' with changes' if record['changed'] else ''}"


def _targets(records: Sequence[Record]) -> Iterator[str]:
    yield "| target | ours | against | asked | reached | |"
    yield "|---|---|---|---|---|---|"
    for target in TARGETS:
        got = ratio(target, records)
        verdict = "not measured" if got is None else "yes" if got >= target.least else "**no**"
        shown = "" if got is None else f"{got:.2f}"
        yield (
            f"| {target.label} | {target.ours} | {target.against} | ≥ {target.least:.2f} | "
            f"{shown} | {verdict} |"
        )


def _results(records: Sequence[Record]) -> Iterator[str]:
    yield "| case | who | result | load s | turns | read GB/s, GEMM GFLOP/s | others, stolen |"
    yield "|---|---|---|---|---|---|---|"
    newest = {}
    for record in records:
        for name in record["results"]:
            newest[record["case"], name] = record
    for (case, name), record in sorted(newest.items()):
        result = record["results"][name]
        loads = [x for x in result["load_seconds"] if x is not None]
        conditions = record["conditions"]
        yield (
            f"| {case} | {name} | {_cell(record, result)} | "
            f"{f'{statistics.median(loads):.2f}' if loads else ''} | {conditions['turns']} | "
            f"{record['bandwidth']['bytes_per_second'] / 1e9:.1f}, "
            f"{(record['gemm_flops_per_second'] or 0) / 1e9:.0f} | "
            f"{_share(conditions['others'])}, {_share(conditions['stolen'])} |"
        )


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0%}"


def main() -> None:
    """Render result files: `python -m benchmarks.report FILE.jsonl …`."""
    print(render(read([Path(argument) for argument in sys.argv[1:]])))


if __name__ == "__main__":
    main()

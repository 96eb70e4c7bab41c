"""The suite's results as Markdown, and the facts of the machine that they belong to. Measures nothing."""

import importlib.metadata
import statistics
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]


def device_facts(device: Any) -> Row:
    """Device, its memory, and versions of what shaped the numbers."""
    import platform

    import torch

    names = ("torch", "deepspeed", "transformers", "numpy", "liger_kernel")
    versions: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    if device.type != "cuda":
        return {"device": "cpu", "device_gib": None, "versions": versions}
    properties = torch.cuda.get_device_properties(device)
    return {"device": properties.name, "device_gib": properties.total_memory / 2**30, "versions": versions}


def with_shares(row: Row) -> Row:
    """A throughput row with its shares of peak in each convention; None where peak or FLOPs are not known."""
    shares = {}
    for name in ("hw", "causal", "6n"):
        flops, peak = row[f"flops_per_token_{name}"], row["peak_flops"]
        shares[f"mfu_{name}"] = row["tokens_per_second"] * flops / peak if flops and peak else None
    return row | shares


def check_line(check: Row) -> str:
    figure = "" if check["measured"] is None else f" {check['measured']:.2g} (tolerance {check['tolerance']:.0e})"
    return f"{check['status']:7} {check['name']}{figure}{': ' + check['reason'] if check['reason'] else ''}"


def summary(rows: list[Row]) -> list[Row]:
    """One row a recipe and implementation: the median over all timed steps of all rounds, and the ratio to plain."""
    merged: list[Row] = []
    for key in dict.fromkeys((r["recipe"], r["way"], r["micro_batch"]) for r in rows):
        same = [r for r in rows if (r["recipe"], r["way"], r["micro_batch"]) == key]
        seconds = [s for r in same for s in r["step_seconds"]]
        rate = same[0]["tokens_per_step"] / statistics.median(seconds)
        one = with_shares(same[0] | {"tokens_per_second": rate, "step_seconds": seconds})
        merged.append(one | {"rounds": len(same), "memory_gib": max(r["memory_gib"] for r in same)})
    plain = {r["recipe"]: r["tokens_per_second"] for r in merged if r["peer"]}
    return [
        r | {"ratio": r["tokens_per_second"] / plain[r["recipe"]] if r["recipe"] in plain else None} for r in merged
    ]


def markdown(results: Row) -> str:
    """The whole report."""
    parts = [_heading(results["facts"])]
    if results["throughput"]:
        parts.append(_throughput(summary(results["throughput"])))
    if results["probes"]:
        parts.append(_probes(results["probes"]))
    if results["heads"]:
        parts.append(_heads(results["heads"]))
    if results["checks"]:
        parts.append(_checks(results["checks"]))
    if results["notes"]:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in results["notes"]))
    for profile in results["profiles"]:
        title = f"## Profile: {profile['recipe']}, one micro-batch of {profile['micro_batch']} with its optimizer step"
        parts.append(f"{title}\n\n```\n{profile['table']}\n```")
    return "\n\n".join(parts) + "\n"


def _heading(facts: Row) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in facts.get("versions", {}).items() if v)
    commit = f"{facts['commit'] or 'unknown'}{' with uncommitted changes' if facts['changed_files'] else ''}"
    memory = f" ({facts['device_gib']:.0f} GiB)" if facts.get("device_gib") else ""
    toy = "\n\n**Toy sizes: these figures show that the suite runs, and nothing about speed.**" if facts["toy"] else ""
    return (
        f"# {facts.get('device', 'unknown device')}{memory}, {facts['date']}\n\n"
        f"Driver {facts['driver'] or 'none'}; {versions}; commit {commit}. Made by `tools/benchmarks/gpu_suite.py`; "
        f"raw step times are in `results.json`.{toy}"
    )


def _throughput(rows: list[Row]) -> str:
    text = (
        "## Throughput\n\nMedian over the timed steps of all rounds, after warm-up, with whole optimizer steps "
        "(clipping included). *hw*: the matrix work, attention without a mask; *causal*: half of the attention; *6N*: "
        "all parameters (PaLM). Plain: transformers' own model and loss, bf16 autocast over fp32 weights, torch's fused "
        "AdamW.\n\n"
    )
    titles = ("recipe", "implementation", "sharding", "micro-batch x accumulation", "tokens/s", "hw", "causal", "6N",
              "peak GiB", "beside plain", "steps")  # fmt: skip
    return text + _table(titles, (_throughput_cells(r) for r in rows))


def _throughput_cells(r: Row) -> list[str]:
    ratio = f"{r['ratio']:.2f} x" if r["ratio"] else ""
    timed = f"{len(r['step_seconds'])} in {r['rounds']}"
    batch = f"{r['micro_batch']} x {r['accumulation']}"
    shares = [_share(r["mfu_hw"]), _share(r["mfu_causal"]), _share(r["mfu_6n"])]
    ours = [r["recipe"], r["peer"] or "ours", r["sharding"] or "", batch, f"{r['tokens_per_second']:,.0f}"]
    return [*ours, *shares, f"{r['memory_gib']:.1f}", ratio, timed]


def _probes(rows: list[Row]) -> str:
    text = "## Micro-batches\n\nDoubled until memory ran out; one step with its optimizer.\n\n"
    titles = ("recipe", "implementation", "micro-batch", "tokens/s")
    cells = (
        [
            r["recipe"],
            r["way"],
            str(r["micro_batch"]),
            f"{r['tokens_per_second']:,.0f}" if r["fits"] else "out of memory",
        ]
        for r in rows
    )
    return text + _table(titles, cells)


def _heads(rows: list[Row]) -> str:
    first = rows[0]
    text = (
        f"## Head alone\n\nLinear and cross-entropy, forward and backward, bf16: {first['tokens']:,} tokens, width "
        f"{first['width']:,}, {first['words']:,} words. Memory is what it takes above its inputs.\n\n"
    )
    cells = (
        [r["way"], f"{r['milliseconds']:.1f}", "" if r["extra_gib"] is None else f"{r['extra_gib']:.1f}"] for r in rows
    )
    return text + _table(("head", "ms", "GiB"), cells)


def _checks(rows: list[Row]) -> str:
    cells = (
        [r["name"].replace("|", "/"), r["status"], _figure(r["measured"]), _figure(r["tolerance"]), r["reason"]]
        for r in rows
    )
    return "## Parity\n\n" + _table(("check", "result", "measured", "tolerance", "reason"), cells)


def _table(titles: Iterable[str], rows: Iterable[list[str]]) -> str:
    titles = list(titles)
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows))


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"

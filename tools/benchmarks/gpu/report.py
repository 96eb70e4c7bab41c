"""The suite's results as Markdown, and the facts of the machine that they belong to. Measures nothing."""

import importlib.metadata
from collections.abc import Iterable
from typing import Any

from gpu import asked

Row = dict[str, Any]


def device_facts(device: Any) -> Row:
    """Device, its memory, and versions of what shaped the numbers."""
    import platform

    import torch

    names = ("torch", "deepspeed", "transformers", "accelerate", "liger_kernel", "flash_attn", "numpy")
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
    figure = "" if check["measured"] is None else f" {check['measured']:.2g}"
    figure += "" if check["tolerance"] is None else f" (tolerance {check['tolerance']:.0e})"
    return f"{check['status']:7} {check['name']}{figure}{': ' + check['reason'] if check['reason'] else ''}"


def markdown(results: Row) -> str:
    """The whole report."""
    parts = [_heading(results["facts"])]
    for table, section in (("ceilings", _ceilings), ("throughput", _asked), ("throughput", _throughput),
                           ("ablation", _ablation), ("heads", _heads), ("checks", _checks), ("gaps", _gaps)):  # fmt: skip
        if results[table]:
            parts.append(section(results[table]))
    if results["notes"]:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in results["notes"]))
    for row in results["profiles"]:
        title = f"## Profile: {row['recipe']}, one micro-batch of {row['micro_batch']} with its optimizer step"
        parts.append(f"{title}\n\n```\n{row['table']}\n```")
    return "\n\n".join(parts) + "\n"


def _heading(facts: Row) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in facts.get("versions", {}).items() if v)
    commit = f"{facts['commit'] or 'unknown'}{' with uncommitted changes' if facts['changed_files'] else ''}"
    memory = f" ({facts['device_gib']:.0f} GiB)" if facts.get("device_gib") else ""
    toy = "\n\n**Toy sizes: these figures show that the suite runs, and nothing about speed.**" if facts["toy"] else ""
    return (
        f"# {facts.get('device', 'unknown device')}{memory}, {facts['date']}\n\n"
        f"Driver {facts['driver'] or 'none'}; {versions}; apex {facts.get('apex', 'not run')}; commit {commit} (each row "
        f"of `results.json` has its own). Made by `tools/benchmarks/gpu_suite.py`; raw step times are in `results.json`.{toy}"
    )


def _ceilings(rows: list[Row]) -> str:
    cells = ([r["what"], f"{r['size']:,}", f"{r['per_second']:.4g} {r['unit']}"] for r in rows)
    text = "## Ceilings\n\nThe best of five runs: a product of two square bf16 matrices of random numbers; a copy.\n\n"
    return text + table(("what", "size", "measured"), cells)


def _asked(rows: list[Row]) -> str:
    text = "## What is asked\n\nShares of the nominal dense bf16 peak, *hw* convention; ratios of tokens/s. Asked of one H200.\n\n"
    cells = ([a.what, a.wanted, a.measured, a.verdict] for a in asked.answers(rows))
    return text + table(("what", "asked", "measured", ""), cells)


def _throughput(rows: list[Row]) -> str:
    text = (
        "## Throughput\n\nThe median over the timed steps, after warm-up, of whole optimizer steps (clipping included), at "
        "each implementation's fastest micro-batch. *hw*: the matrix work, attention without a mask; *causal*: half of "
        "the attention; *6N*: all parameters (PaLM).\n\n"
    )
    titles = ("recipe", "implementation", "sharding", "micro-batch x accumulation", "tokens/s", "hw", "causal", "6N",
              "peak GiB", "ours / it", "steps", "sizes tried")  # fmt: skip
    best = asked.fastest(rows)
    return text + table(titles, (_throughput_cells(r, best, rows) for r in best.values()))


def _throughput_cells(r: Row, best: dict[tuple[str, str], Row], rows: list[Row]) -> list[str]:
    ours = best.get((r["recipe"], "ours auto"))
    ratio = f"{ours['tokens_per_second'] / r['tokens_per_second']:.2f}" if ours and r is not ours else ""
    tried = [str(t["micro_batch"]) for t in rows if (t["recipe"], t["way"]) == (r["recipe"], r["way"])]
    batch = f"{r['micro_batch']} x {r['accumulation']}"
    shares = [share(r["mfu_hw"]), share(r["mfu_causal"]), share(r["mfu_6n"])]
    first = [r["recipe"], r["peer"] or r["way"], r["sharding"] or "", batch, f"{r['tokens_per_second']:,.0f}"]
    return [*first, *shares, f"{r['memory_gib']:.1f}", ratio, str(len(r["step_seconds"])), ", ".join(tried)]


def _ablation(rows: list[Row]) -> str:
    text = (
        "## Ablation\n\nOne thing changed at a time against the recipe as it is (`kernels.*`, `optim.kernel` and sharding "
        "`auto`), at one micro-batch for all; the first row once more at the end shows how far the machine drifted.\n\n"
    )
    base = {r["recipe"]: r["tokens_per_second"] for r in rows if r["change"] == "as it is" and not r["again"]}
    cells = []
    for r in sorted(rows, key=lambda r: (r["recipe"], r["again"], r["group"])):
        against = f"{r['tokens_per_second'] / base[r['recipe']]:.3f}" if r["recipe"] in base else ""
        change = f"`{r['change']}`{' (again)' if r['again'] else ''}"
        speed = [f"{r['tokens_per_second']:,.0f}", share(r["mfu_hw"]), f"{r['memory_gib']:.1f}", against]
        cells.append([r["recipe"], r["group"], change, str(r["micro_batch"]), *speed])
    titles = ("recipe", "piece", "change", "micro-batch", "tokens/s", "hw", "peak GiB", "of the first row")
    return text + table(titles, cells)


def _heads(rows: list[Row]) -> str:
    first = rows[0]
    text = (
        f"## Head alone\n\nLinear and cross-entropy, forward and backward, bf16: {first['tokens']:,} tokens, width "
        f"{first['width']:,}, {first['words']:,} words. Memory is what it takes above its inputs.\n\n"
    )
    cells = (
        [r["way"], f"{r['milliseconds']:.1f}", "" if r["extra_gib"] is None else f"{r['extra_gib']:.1f}"] for r in rows
    )
    return text + table(("head", "ms", "GiB"), cells)


def _checks(rows: list[Row]) -> str:
    cells = (
        [r["name"].replace("|", "/"), r["status"], _figure(r["measured"]), _figure(r["tolerance"]), r["reason"]]
        for r in rows
    )
    return "## Correctness\n\n" + table(("check", "result", "measured", "tolerance", "reason"), cells)


def _gaps(rows: list[Row]) -> str:
    return "## Not run\n\n" + table(("what", "reason"), ([r["key"], r["reason"].replace("|", "/")] for r in rows))


def table(titles: Iterable[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    titles = list(titles)
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows))


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"

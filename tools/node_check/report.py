"""The results as Markdown to paste: what was measured, what held, and rows for docs/proven.md. Pure: results in, text out."""

import datetime
from typing import Any

BF16_FROM_FP32 = 0.02  # of a loss that falls from 6.2 to 4.9; 0.0006 was seen at toy size on two CPU ranks
Results = dict[str, Any]


def verdicts(results: Results) -> list[tuple[str, bool | None, str]]:
    """(what, does it hold, in words); None: it did not run."""
    found = []
    stages = results["stages"]
    if not isinstance(stages, list):
        found.append(("ZeRO 0, 1, 3 beside fp32", False, stages["failed"]))
    else:
        for row in stages[1:]:
            apart = row["from_fp32"]
            held = row["code"] == 0 and apart is not None and apart < BF16_FROM_FP32
            words = (
                f"largest difference of a loss {apart:.4f} (limit {BF16_FROM_FP32})"
                if apart is not None
                else _failure(row)
            )
            found.append((f"{row['name'].replace('-zero', ', ZeRO-')}: {row['steps']} steps like fp32's", held, words))
    kill = results["kill"]
    if kill.get("resumed_after") is not None:
        held = kill["code"] == 0 and kill["difference"] == 0.0
        words = f"{kill['resumed_after']:.0f} s from the kill to a new step; losses {'bitwise' if held else kill['difference']}"
        found.append(("SIGKILL of a rank, restart, resume: the undisturbed run's losses", held, words))
    else:
        ended = kill.get("code") == 0
        words = "the run was over before it could be killed" if ended else _failure(kill)
        found.append(("SIGKILL of a rank, restart, resume", None if ended else False, words))
    speed = results["speed"]
    words = _failure(speed) if speed.get("code") else f"{speed.get('tokens_per_second') or 0:,.0f} tokens/s"
    what = "a toy of zh-1b trains and saves" if speed.get("toy") else "zh-1b at its own size trains and saves, 14 steps"
    found.append((what, speed.get("code") == 0, words))
    if "failed" in results["ceilings"]:
        found.append(("ceilings", False, results["ceilings"]["failed"]))
    return found


def all_hold(results: Results) -> bool:
    return all(held is not False for _, held, _ in verdicts(results))


def as_markdown(results: Results) -> str:
    """The report."""
    parts = [_head(results), _ceilings(results["ceilings"]), _stages(results["stages"]), _kill_and_speed(results),
             _verdicts(results), _proven(results)]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def column(results: Results) -> str:
    """Which column of docs/proven.md this machine fills."""
    gpus = len(results["machine"]["gpus"])
    return "2 CPU ranks" if not gpus else "1 GPU" if results["ranks"] == 1 else "several GPUs"


def _device(results: Results) -> str:
    m, ranks = results["machine"], results["ranks"]
    return f"{ranks} x {m['gpus'][0]}" if m["gpus"] else f"{ranks} CPU ranks"


def _head(results: Results) -> str:
    m = results["machine"]
    day = datetime.datetime.fromtimestamp(results["began"], datetime.timezone.utc).date()
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    gpus = (
        f"{len(m['gpus'])} x {m['gpus'][0]}, {m['gpu_gib']:.0f} GiB each, CUDA {m['cuda']}; "
        if m["gpus"]
        else "no GPU; "
    )
    return (f"# Node check: {_device(results)}\n\n{day}, commit {m['commit']}, {results['seconds'] / 60:.1f} minutes. "
            f"{gpus}{m['cpu']}, {m['cores']} cores, {m['memory_gib']:.0f} GiB. {versions}.")  # fmt: skip


def _ceilings(found: Any) -> str:
    if "failed" in found:
        return f"## Ceilings\nfailed: {found['failed']}"
    lines = [
        "## Ceilings",
        "| matrix product, all ranks at once | slowest rank, TFLOP/s | all, TFLOP/s |",
        "|---|---|---|",
    ]
    lines += [f"| {g['dtype']}, {g['n']}³ | {g['slowest']:.3g} | {g['all_ranks']:.3g} |" for g in found["gemm"]]
    if not found["exchange"]:
        return "\n".join([*lines, "", "Exchange between ranks: not run (one rank)."])
    lines += ["", "| exchange | MB | ms | bus bandwidth, GB/s |", "|---|---|---|---|"]
    lines += [f"| {e['what']} | {e['bytes'] / 1e6:.1f} | {e['seconds'] * 1e3:.2f} | {e['bus_gb_per_s']:.3g} |"
              for e in found["exchange"]]  # fmt: skip
    return "\n".join(lines)


def _stages(found: Any) -> str:
    lines = [
        "## A step at each ZeRO stage",
        "| | ms a step (median) | last loss | largest difference from fp32 |",
        "|---|---|---|---|",
    ]
    if not isinstance(found, list):
        return f"## A step at each ZeRO stage\nfailed: {found['failed']}"
    for row in found:
        loss = f"{row['loss'][0]:.4f}" if row["loss"] else "none"
        apart = "none" if row["from_fp32"] is None else f"{row['from_fp32']:.4f}"
        lines.append(f"| {row['name']} | {_number(row['milliseconds'], '.1f')} | {loss} | {apart} |")
    return "\n".join(lines)


def _kill_and_speed(results: Results) -> str:
    speed, plan = results["speed"], results["plan"]
    if "failed" in speed:
        return f"## Speed and a save\nfailed: {speed['failed']}"
    size = "a toy of zh-1b" if speed["toy"] else "zh-1b at its own size"
    saved = f"{_number(speed['save_seconds'], '.2f')} s for {speed['save_bytes'] / 1e9:.3g} GB, hashed and synced"
    planned = plan.get("tokens_per_second")
    if planned and speed["tokens_per_second"]:
        said = f"`{plan['command']}` says {planned:,.0f}: measured {speed['tokens_per_second'] / planned:.2f} of it"
    else:
        said = f"not run ({plan.get('not run') or plan.get('failed') or 'it gave no tokens/s'})"
    return "\n".join([
        "## Speed and a save", "| | |", "|---|---|",
        f"| {size}: {' '.join(speed['settings'])} | {_number(speed['tokens_per_second'], ',.0f')} tokens/s (median) |",
        f"| share of the nominal peak | {_number(speed['share_of_peak'], '.1%')} |",
        f"| memory of a rank | {_number(speed['memory_gib'], '.1f')} GiB |", f"| a save | {saved} |", f"| the plan | {said} |",
    ])  # fmt: skip


def _verdicts(results: Results) -> str:
    marks = {True: "held", False: "**did not hold**", None: "not run"}
    return "\n".join(
        ["## What held", *(f"- {marks[held]}: {what} ({words})" for what, held, words in verdicts(results))]
    )


def _proven(results: Results) -> str:
    """Only what held; a row's other columns stay as they are."""
    where = f"ran at commit {results['machine']['commit']} ({_device(results)})"
    rows = [f"| {what} | {where} |" for what, held, _ in verdicts(results) if held]
    return "\n".join(
        [f"## Rows for docs/proven.md, column “{column(results)}”", "| feature | cell |", "|---|---|", *rows]
    )


def _failure(row: dict[str, Any]) -> str:
    text = row.get("failed") or row.get("said") or f"exit code {row.get('code')}"
    return " ".join(text.split())[-300:]


def _number(value: float | None, form: str) -> str:
    return "not measured" if value is None else format(value, form)

"""`report RUN`: one HTML page that needs nothing else: no network, no script, no other file.

1. `read` takes the files of the run folder, `account` says where the time went, `figures` draws the curves as SVG.
2. Here they are laid out over `page.html`. Whatever a file said is escaped.
"""

import datetime
import html
import string
from collections.abc import Iterable
from pathlib import Path

from megatron_steel.errors import SteelError
from megatron_steel.run_report import account
from megatron_steel.run_report.figures import MOST_RESTARTS, figures_of, restarts_of
from megatron_steel.run_report.kinds import Row
from megatron_steel.run_report.plots import short
from megatron_steel.run_report.read import RunFiles, read

_SPENT = (
    ("training", "#2b8a3e"), ("validation", "#1c7ed6"), ("samples", "#22b8cf"), ("save", "#f59f00"),
    ("rest", "#e03131"), ("idle", "#ced4da"),
)  # fmt: skip
_SPENT_WORDS = {"rest": "starting, and work that was lost", "idle": "nothing ran", "save": "saving", "samples": "texts"}
_SHOWN_STARTS, _SHOWN_TEXTS = 200, 30  # the newest


def write_report(run: str, output: str | None = None, price_per_gpu_hour: float | None = None) -> Path:
    """Write the page of a run folder; returns its path.

    Args:
        run: a run folder: complete, going on, or crashed.
        output: where to (default: `report.html` in the run folder).
        price_per_gpu_hour: in any currency; the cost is in the same.

    Raises:
        SteelError: no run folder, a price below 0, an output that is no page (whatever lies there would be replaced), or
            a place that cannot be written.
    """
    from megatron_steel.data.reserve import published

    if price_per_gpu_hour is not None and not 0 <= price_per_gpu_hour < float("inf"):
        raise SteelError(
            f"{price_per_gpu_hour} is no price", "--price-per-gpu-hour", "give what an hour of one GPU costs"
        )
    if output and Path(output).suffix not in (".html", ".htm"):
        raise SteelError("the report is a page, and this is no name of one", f"--output {output}", "name it FILE.html")
    folder = Path(run).expanduser()
    text = page_of(read(folder), price_per_gpu_hour)
    target = Path(output) if output else folder / "report.html"
    with published(str(target)) as aside:
        Path(aside).write_text(text, encoding="utf-8")
    return target


def page_of(run: RunFiles, price: float | None = None) -> str:
    """The page as text."""
    starts = account.starts_of(run)
    future = bool(run.audit and run.audit["causal"] is False)
    sections = [
        _header(run, starts, future),
        _cards(run, starts, price),
        _section("Curves", _figures(run, starts, future)),
        _section("Time", _time(run, starts, price)),
        _section("Data", _data(run)),
        _section("Texts", _texts(run.samples)),
        _section("Audit", _audit(run.audit)),
        _section("Checkpoints", _checkpoints(run)),
        _section("Damaged", "".join(f"<p>{_e(problem)}</p>" for problem in run.damaged)),
        _section("Environment", _environment(run.environment)),
        _section(
            "Recipe", f"<details><summary>recipe.yaml as resolved</summary><pre>{_e(run.recipe_text)}</pre></details>"
        ),
    ]
    template = string.Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return template.substitute(name=_e(run.folder.resolve().name), body="\n".join(s for s in sections if s))


def _header(run: RunFiles, starts: list[account.Start], future: bool) -> str:
    kind, words = account.state_of(run, starts)
    causal = run.audit["causal"] if run.audit else None
    verdict = "sees the future" if future else "causal" if causal else "no audit" if not run.audit else "audit: unknown"
    badge = "future" if future else "causal" if causal else "unknown"
    now = datetime.datetime.now().astimezone()
    return (
        f'<header><h1>{_e(run.folder.resolve().name)}</h1><span class="badge {kind}">{_e(words)}</span>'
        f'<span class="badge {badge}">{verdict}</span></header>'
        f'<p class="dim">{_e(str(run.folder.resolve()))} as it was at {now:%Y-%m-%d %H:%M:%S %Z}</p>'
    )


def _cards(run: RunFiles, starts: list[account.Start], price: float | None) -> str:
    step, steps = account.steps_of(run)
    last, spent = (run.training or [{}])[-1], account.account_of(run, starts)
    left, hours = account.seconds_left(run), account.gpu_hours(starts)
    cards = [
        ("step", f"{step:,}" + (f" of {steps:,}" if steps else "")),
        ("tokens", short(last["tokens"]) if last else None),
        ("loss", _figure(last.get("loss"))),
        ("validation loss", _figure(run.validation[-1]["validation_loss"]) if run.validation else "none"),
        ("tokens per second", f"{last['tokens_per_second']:,.0f}" if last.get("tokens_per_second") else None),
        ("share of peak", f"{last['share_of_peak']:.1%}" if last.get("share_of_peak") else None),
        ("left, at this speed", _duration(left) if left else None),
        ("goodput", f"{spent.goodput:.1%}" if spent and spent.goodput is not None else None),
        ("starts", f"{len(starts)}" if starts else None),
        ("GPU-hours", f"{hours:,.2f}" if starts else None),
        ("cost", f"{price * hours:,.2f}" if price is not None and starts else None),
        ("skipped steps", f"{last['skipped_steps']:,.0f}" if last.get("skipped_steps") else None),
    ]
    shown = "".join(
        f'<div class="card"><span class="dim">{k}</span><b>{v}</b></div>' for k, v in cards if v is not None
    )
    return f'<div class="cards">{shown}</div>'


def _figures(run: RunFiles, starts: list[account.Start], future: bool) -> str:
    restarts = restarts_of(run, starts)
    figures = figures_of(run, restarts, future)
    if not figures:
        return '<p class="dim">Nothing has been logged yet.</p>'
    drawn = "".join(f"<figure><h3>{_e(title)}</h3>{svg}</figure>" for title, svg in figures)
    notes = "" if run.validation else '<p class="dim">No held-out data has been evaluated.</p>'
    if len(restarts) > MOST_RESTARTS:
        notes += f'<p class="dim">Dotted lines show some of the {len(restarts):,} places where it started again.</p>'
    return f'<div class="plots">{drawn}</div>{notes}'


def _time(run: RunFiles, starts: list[account.Start], price: float | None) -> str:
    spent = account.account_of(run, starts)
    if spent is None:
        return '<p class="dim">The run folder holds no times: its starts were not noted.</p>'
    parts = [(name, color, getattr(spent, name)) for name, color in _SPENT if getattr(spent, name) > 0]
    whole = sum(seconds for *_, seconds in parts) or 1.0
    bar = "".join(f'<i style="width:{100 * s / whole:.2f}%;background:{color}"></i>' for _, color, s in parts)
    key = "".join(
        f'<li><i style="background:{color}"></i>{_SPENT_WORDS.get(name, name)}: {_duration(s)} ({s / whole:.1%})</li>'
        for name, color, s in parts
    )
    lost, hours = account.lost_steps(starts), account.gpu_hours(starts)
    words = f"{_duration(spent.wall)} since the first start; {lost:,} steps had to be made again"
    words += f"; {hours:,.2f} GPU-hours" + (f" at {price:g} = {price * hours:,.2f}" if price is not None else "") + "."
    rows = [
        (_date(s.began), _date(s.ended) if s.noted else f"last sign {_date(s.ended)}", s.ranks,
         "" if s.from_step is None else f"{s.from_step:,}", "" if s.reached is None else f"{s.reached:,}",
         "" if s.exit_code is None else s.exit_code, s.cause)
        for s in starts[-_SHOWN_STARTS:]
    ]  # fmt: skip
    table = _table(
        ("began", "ended", "ranks", "from step", "to step", "exit code", "cause"), rows, numbers={2, 3, 4, 5}
    )
    backs = [
        (
            f"{r['spike_at_step']:,.0f}",
            f"{r['step']:,}",
            f"{r['skipped_from_sample']:,.0f} to {r['skipped_to_sample'] - 1:,.0f}",
        )
        for r in run.roll_backs
    ]
    spikes = _table(("loss spiked at step", "back to step", "samples passed over"), backs) if backs else ""
    return f'<div class="bar">{bar}</div><ul class="key">{key}</ul><p>{words}</p>{table}{spikes}'


def _data(run: RunFiles) -> str:
    last = (run.training or [{}])[-1]
    sizes = {d["name"]: d["tokens"] for d in run.checkpoints[-1].get("data", [])} if run.checkpoints else {}
    names = [k.removeprefix("data_share/") for k in last if k.startswith("data_share/")]
    rows = [
        (name, f"{last[f'data_share/{name}']:.2%}", _figure(last.get(f"epochs_{name}")),
         f"{sizes[name]:,}" if name in sizes else "")
        for name in names
    ]  # fmt: skip
    return _table(("data set", "share so far", "epochs", "tokens"), rows, numbers={1, 2, 3}) if rows else ""


def _texts(samples: list[Row]) -> str:
    """The newest evaluation's, and the earlier ones folded away."""
    steps = sorted({r["step"] for r in samples})[-_SHOWN_TEXTS:]
    shown = [
        "".join(
            f'<pre class="text"><b>{_e(r["prompt"])}</b>{_e(r["text"])}</pre>' for r in samples if r["step"] == step
        )
        for step in steps
    ]
    if not shown:
        return ""
    earlier = "".join(
        f"<details><summary>step {s:,}</summary>{t}</details>" for s, t in list(zip(steps, shown, strict=True))[-2::-1]
    )
    return f'<p class="dim">after step {steps[-1]:,}; the prompt is marked</p>{shown[-1]}{earlier}'


def _audit(report: Row | None) -> str:
    if report is None:
        return '<p class="dim">There is no audit.json.</p>'
    return f"<p>{_e(str(report.get('verdict') or report['causal']))}</p>"


def _checkpoints(run: RunFiles) -> str:
    rows = [(c["name"], f"{c['tokens']:,}", c.get("world_size", ""), _size(c["bytes"])) for c in run.checkpoints]
    if not rows:
        return '<p class="dim">None yet.</p>'
    return _table(("checkpoint", "tokens", "ranks", "size"), rows, numbers={1, 2, 3})


def _environment(environment: Row) -> str:
    if not environment:
        return '<p class="dim">There is no environment.json.</p>'
    versions = environment.get("versions", {})
    rows = [
        *versions.items(),
        ("ranks", environment.get("world_size")),
        ("command", " ".join(map(str, environment.get("command", [])))),
    ]
    return _table(("", ""), rows)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _table(head: Iterable[str], rows: Iterable[Iterable[object]], numbers: Iterable[int] = ()) -> str:
    kind = dict.fromkeys(numbers, ' class="number"')
    titles = "".join(f"<th{kind.get(i, '')}>{_e(title)}</th>" for i, title in enumerate(head))
    lines = "".join(
        "<tr>" + "".join(f"<td{kind.get(i, '')}>{_e(str(cell))}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


def _figure(value: float | None) -> str:
    return "no number" if value is None else f"{value:.4f}"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"


def _duration(seconds: float) -> str:
    """2 d 03:04:05."""
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock


def _date(seconds: float) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


def _e(text: str) -> str:
    return html.escape(text)

"""`report RUN`: figures that add up, a page that stands alone, for runs in every state; looked at in a real browser."""

import html
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest

from megatron_steel import cli
from megatron_steel.run_report import account, plots
from megatron_steel.run_report.page import page_of
from megatron_steel.run_report.read import read

NO_PROCESS = 2**22 + 1  # above the kernel's largest process number
SECTIONS = ("Curves", "Time", "Data", "Texts", "Audit", "Checkpoints", "Environment", "Recipe")


@pytest.fixture(scope="module")
def finished(tiny_recipe, tmp_path_factory):
    """A run of two starts: 3 steps, then 3 more."""
    folder = tmp_path_factory.mktemp("report") / "a <run>"
    words = [str(tiny_recipe), f"run.dir={folder}", "schedule.name=constant", "train.sample_tokens=4", "train.eval_every_steps=2",
             "train.sample_prompts=['w5 <b>', '']"]  # fmt: skip
    for steps in (3, 6):
        assert cli.main(["pretrain", *words, f"train.steps={steps}"]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(finished, tmp_path / "run")


def _rewrite(file, change):
    rows = [change(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows if row), encoding="utf-8")


def _cards(page):
    return dict(re.findall(r'<div class="card"><span class="dim">(.*?)</span><b>(.*?)</b>', page))


def test_a_finished_run(finished, tmp_path, capsys):
    target = tmp_path / "out.html"
    assert cli.main(["report", str(finished), "--output", str(target), "--price-per-gpu-hour", "36"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    page, read_back = target.read_text(encoding="utf-8"), read(finished)
    for section in SECTIONS:
        assert f"<h2>{section}</h2>" in page
    for title in ("loss", "learning rate", "gradient norm", "tokens per second", "seconds of a step", "memory"):
        assert f"<h3>{title}</h3><svg" in page
    cards = _cards(page)
    assert cards["step"] == "6 of 6"
    assert cards["starts"] == "2"
    assert float(cards["cost"]) == pytest.approx(36 * account.gpu_hours(account.starts_of(read_back)), abs=0.006)
    assert f"{read_back.validation[-1]['validation_loss']:.4f}" == cards["validation loss"]
    assert '<span class="badge done">complete</span><span class="badge causal">causal</span>' in page
    assert "mathdefault" not in page
    assert "a &lt;run&gt;" in page
    assert "<b>w5 &lt;b&gt;</b>" in page
    assert "w5 <b>" not in page
    assert "step-00000006" in page
    assert "0 steps had to be made again" in page


def test_the_page_names_no_other_place_and_runs_nothing(finished):
    page = page_of(read(finished))
    assert not re.search(r"<script|\son\w+=|@import|<link(?! rel=\"icon\" href=\"data:,\")|<img|<iframe", page)
    assert {url for url in re.findall(r"(?:https?:)?//[\w.]+[^\s\"'<]*", page) if "w3.org" not in url} == set()
    ids = re.findall(r'\sid="(.*?)"', page)
    references = set(re.findall(r'(?:xlink:href="#|url\(#)([\w-]+)', page))
    assert references <= set(ids)


def test_time_adds_up(finished):
    run = read(finished)
    starts = account.starts_of(run)
    spent = account.account_of(run, starts)
    assert [(s.from_step, s.reached, s.noted) for s in starts] == [(0, 3, True), (3, 6, True)]
    parts = spent.training + spent.validation + spent.samples + spent.save + spent.idle + spent.rest
    assert parts == pytest.approx(spent.wall, abs=0.2)  # times are rounded to tenths
    assert spent.samples > 0
    assert 0 < spent.goodput < 1


def test_a_run_that_goes_on(run):
    (run / "run.lock").write_text(f"{os.getpid()} {socket.gethostname()}\n")
    _rewrite(
        run / "starts.jsonl", lambda r: {**r, "steps": 100} if (r["event"], r["from_step"]) != ("end", 3) else None
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    page = page_of(read(run))
    assert f'<span class="badge running">running (process {os.getpid()} ' in page
    assert _cards(page)["step"] == "6 of 100"
    assert "left, at this speed" in _cards(page)


def test_a_run_that_was_killed_and_started_again(run):
    """By the supervisor's account: 5 steps were made, the run went on from step 3."""
    begin = json.loads((run / "starts.jsonl").read_text().splitlines()[0])["time"]
    _rewrite(run / "starts.jsonl", lambda r: {**r, "steps": 9} if r["event"] == "start" else None)
    second = read(run).starts[1]["time"]
    killed = "rank 0 (process 7 on a) was killed without a word; the launcher ended with SIGKILL (exit code -9)"
    line = {"began": begin - 3, "ended": second - 0.05, "exit_code": 70, "step": 5, "cause": killed}
    early = {"began": begin - 9, "ended": begin - 4, "exit_code": 70, "step": 0, "cause": "no port"}
    (run / "launches.jsonl").write_text(json.dumps(early) + "\n" + json.dumps(line) + "\n")
    (run / "run.lock").write_text(f"{NO_PROCESS} {socket.gethostname()}\n")
    found = read(run)
    starts = account.starts_of(found)
    assert [(s.from_step, s.reached, s.exit_code) for s in starts] == [(None, None, 70), (0, 5, 70), (3, 6, None)]
    assert account.lost_steps(starts) == 2
    spent = account.account_of(found, starts)
    assert spent.idle == pytest.approx(1 + 0.05, abs=1e-3)
    page = page_of(found)
    assert '<span class="badge failed">ended without a word</span>' in page
    assert "2 steps had to be made again" in page
    assert html.escape(killed) in page


def test_no_validation_no_texts_and_no_times(run):
    """As an older version recorded it."""
    keys = ("validation_loss", "time")
    _rewrite(run / "metrics.jsonl", lambda r: {k: v for k, v in r.items() if k not in keys} if "loss" in r else None)
    for name in ("samples.jsonl", "starts.jsonl", "audit.json", "environment.json"):
        (run / name).unlink()
    page = page_of(read(run))
    assert _cards(page)["validation loss"] == "none"
    assert "No held-out data has been evaluated" in page
    assert "<h2>Texts</h2>" not in page
    assert "holds no times" in page
    assert "no audit" in page


def test_before_the_first_step_and_after_damage(run):
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    (run / "checkpoints" / "step-00000006" / "manifest.json").write_text("{}")
    (run / "metrics.jsonl").write_text("")
    (run / "recipe.yaml").write_text("a: [")
    page = page_of(read(run))
    assert "Nothing has been logged yet" in page
    assert "step-00000006: " in page


def test_numbers_that_are_none_are_gaps(run):
    _rewrite(run / "metrics.jsonl", lambda r: {**r, "loss": None} if "loss" in r else r)
    page = page_of(read(run))
    assert _cards(page)["loss"] == "no number"
    assert "<h3>loss</h3>" in page  # the validation loss is still there


_LOGGED = {"step": 7, "time": 1.79e9, "tokens": 7000, "seconds_step": 1.0}
_LAUNCH = {"began": 1.79e9, "ended": 1.79e9 + 5, "exit_code": 70, "step": 7, "cause": "no port"}
_START = {"event": "start", "time": 1.79e9, "from_step": 6, "steps": 9, "ranks": 1}


@pytest.mark.parametrize(
    ("name", "row", "is_damage"),
    [
        ("metrics.jsonl", {**_LOGGED, "loss": 2.0, "time": None}, False),
        ("metrics.jsonl", {**_LOGGED, "loss": 2.0, "time": "noon"}, True),
        ("metrics.jsonl", {**_LOGGED, "loss": "2.0"}, True),
        ("metrics.jsonl", {**_LOGGED, "loss": 2.0, "seconds_step": "1.0"}, True),
        ("metrics.jsonl", {**_LOGGED, "loss": 1e308}, True),
        ("metrics.jsonl", {**_LOGGED, "loss": -1e308}, True),
        ("metrics.jsonl", {**_LOGGED, "loss": 2.0, "data_share/\ud83d": 1.0}, False),
        ("metrics.jsonl", [1], True),
        ("samples.jsonl", {"step": 7, "prompt": None, "text": "x"}, True),
        ("samples.jsonl", {"step": 7, "prompt": "p", "text": "half of a face: \ud83d"}, False),
        ("launches.jsonl", {key: value for key, value in _LAUNCH.items() if key != "step"}, True),
        ("launches.jsonl", {**_LAUNCH, "cause": "\ud83d"}, False),
        ("starts.jsonl", {**_START, "ranks": None}, False),
        ("starts.jsonl", {**_START, "ranks": "two"}, True),
        ("starts.jsonl", {**_START, "time": 1e18}, True),
        ("environment.json", {"versions": None}, False),
        ("environment.json", {"versions": "2.0"}, True),
        ("audit.json", {"causal": "yes"}, True),
        ("audit.json", {"verdict": "causal"}, True),
    ],
)
def test_json_of_the_wrong_kind_is_a_gap_and_is_told(run, name, row, is_damage):
    for _ in range(2):
        with (run / name).open("a" if name.endswith("l") else "w", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    page = page_of(read(run))
    page.encode()
    assert _cards(page)["step"].startswith(("6 of", "7 of"))
    assert (f"<p>{name}: " in page) == is_damage
    assert ("<h2>Damaged</h2>" in page) == is_damage


def test_only_what_is_wrong_in_a_line_is_left_out(run):
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**_LOGGED, "loss": 2.5, "lr": "high"}) + "\nno json\n")
    found = read(run)
    assert found.training[-1] == {**_LOGGED, "loss": 2.5}
    assert [problem.partition(" of ")[0] for problem in found.damaged] == ["metrics.jsonl: 2"]


def test_bad_input(finished, tmp_path, capsys):
    for words, said in (([str(tmp_path)], "this is no run folder"), ([str(finished), "--price-per-gpu-hour=-1"], "is no price"),
                        ([str(finished), "--output", f"{tmp_path}/none/x.html"], "cannot write"),
                        ([str(finished), "--output", f"{tmp_path}/recipe.yaml"], "no name of")):  # fmt: skip
        assert cli.main(["report", *words]) == 78
        assert said in capsys.readouterr().err


def test_many_restarts_are_all_counted_and_some_are_drawn(tmp_path):
    """Each start makes 3 steps, one second each, and a killed one's last step is made again."""
    starts = 250
    (tmp_path / "recipe.yaml").write_text("")
    logged = [{"step": i, "time": 1e9 + 0.5 + i + i // 2, "tokens": 10 * i, "loss": 2.0, "data_share/a": 0.5, "data_share/b": 0.5}
              for i in range(1, 2 * starts + 1)]  # fmt: skip
    begun = [{"event": "start", "time": 1e9 + 3 * i, "from_step": 2 * i, "steps": 500} for i in range(starts)]
    ended = [{"began": r["time"], "ended": r["time"] + 2, "exit_code": 70, "step": r["from_step"] + 3, "cause": "x"}
             for r in begun[:-1]]  # fmt: skip
    for name, rows in (("metrics", logged), ("starts", begun), ("launches", ended)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read(tmp_path)
    found = account.starts_of(run)
    assert [(s.from_step, s.reached) for s in found] == [(2 * i, min(2 * i + 3, 500)) for i in range(starts)]
    assert account.lost_steps(found) == starts - 1
    assert account.account_of(run, found).idle == starts - 1
    page = page_of(run)
    svg = re.search("<h3>loss</h3>(<svg.*?</svg>)", page, re.DOTALL)[1]
    assert svg.count("stroke: #868e96") == 83  # every third of 249
    assert "some of the 249 places" in page


def test_stacked_curves_are_thinned():
    x = list(range(50_000))
    lines = [plots.Line(name, x, [0.5] * len(x)) for name in "ab"]
    assert len(plots.curves("shares", "", lines, stacked=True)) < 200_000


def test_a_spike_is_not_thinned_away():
    n = 100_000
    y = [2.0] * n
    y[77_777], y[5] = 9.0, float("nan")
    x, thin = plots.thinned(list(range(n)), y)
    assert len(x) <= plots.MOST_POINTS
    assert (77_777, 9.0) in zip(x, thin, strict=True)
    assert x == sorted(x)


@pytest.mark.filterwarnings("error")
def test_names_in_any_script_are_shown_as_they_are():
    lines = [plots.Line(name, [1, 2], [0.5, 0.5]) for name in ("钢铁", "a $b$ <i>", "_c")]
    for stacked in (False, True):
        svg = plots.curves("names", "", lines, stacked=stacked)
        for shown in ("钢铁", "a $b$ &lt;i&gt;"):
            assert f">{shown}</text>" in svg, svg


def test_a_report_imports_no_torch(finished, tmp_path):
    code = ("import sys; from megatron_steel import cli; assert cli.main(sys.argv[1:]) == 0; "
            "print([m for m in ('torch', 'transformers', 'deepspeed') if m in sys.modules])")  # fmt: skip
    words = ["report", str(finished), "--output", str(tmp_path / "x.html")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        pytest.skip("no chromium or chrome on PATH")

    def open_page(file, folder, *options):
        """The document as rendered, what it said on its console, and every address it asked for."""
        log = folder / "net.json"
        quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
        done = subprocess.run(
            [found, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *quiet, f"--user-data-dir={folder}/profile",
             "--enable-logging=stderr", f"--log-net-log={log}", "--dump-dom", *options, file.as_uri()],
            capture_output=True, text=True, timeout=180, check=True,
        )  # fmt: skip
        asked = set(re.findall(r'"url":"(.*?)"', log.read_text(errors="replace")))
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line], asked

    return open_page


MEASURE = """<!DOCTYPE html><title>wait</title><body style="margin:0">
<iframe id="f" style="border:0;width:%dpx;height:4000px" srcdoc="%s"></iframe>
<script>
onload = () => {
  const d = document.getElementById("f").contentDocument, page = d.documentElement;
  const svgs = [...d.querySelectorAll("figure svg")].map(s => s.getBoundingClientRect());
  const text = [...d.querySelectorAll("figure svg text")].map(t => t.getBoundingClientRect().height);
  document.title = JSON.stringify({ width: page.scrollWidth, shown: page.clientWidth, svgs: svgs.length,
    least: Math.min(...svgs.map(r => Math.min(r.width, r.height))), right: Math.max(...svgs.map(r => r.right)),
    text: Math.min(...text), words: d.body.innerText });
};
</script>"""


OWN = ("google.com", "googleapis.com", "gvt1.com", "gstatic.com")  # what the browser asks for by itself


def _of_the_page(asked):
    hosts = {url.split("/")[2] for url in asked if url.startswith("http")}
    return {host for host in hosts if not host.endswith(OWN)}


@pytest.mark.browser
def test_a_request_would_be_noticed(browser, tmp_path):
    (tmp_path / "bad.html").write_text('<img src="http://steel.invalid/x.png"><script>console.log("seen")</script>')
    _, console, asked = browser(tmp_path / "bad.html", tmp_path)
    assert "seen" in "".join(console)
    assert _of_the_page(asked) == {"steel.invalid"}


@pytest.mark.browser
def test_in_a_browser(finished, browser, tmp_path):
    page = page_of(read(finished), 2.0)
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    dom, console, asked = browser(tmp_path / "report.html", tmp_path)
    assert console == []
    assert _of_the_page(asked) == set()
    assert dom.count("<svg") == page.count("<svg") >= 8
    for width in (1280, 400):
        (tmp_path / "measure.html").write_text(MEASURE % (width, html.escape(page)), encoding="utf-8")
        dom, console, _ = browser(tmp_path / "measure.html", tmp_path)
        assert console == []
        seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]))
        assert seen["width"] <= seen["shown"] <= width  # nothing sticks out
        assert seen["right"] <= width
        assert seen["svgs"] >= 8
        assert seen["least"] > 150
        assert seen["text"] >= 8  # pixels: still to be read
        for word in (*SECTIONS, "goodput", "GPU-hours", "cost", "complete", "causal"):
            assert word in seen["words"]

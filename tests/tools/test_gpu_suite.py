"""The GPU suite at toy size on this machine, through its real command; how it goes on where it was cut off; what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "tools" / "benchmarks"
WAYS = {
    "ours auto": None, "ours zero0": None, "ours zero3": None, "hand-written": "hand-written PyTorch",
    "hf trainer": "HF Trainer + DeepSpeed + Liger + compile", "plain loop": "HF + DeepSpeed loop",
}  # fmt: skip

CEILING = {"kind": "ceiling", "what": "bf16 product", "size": 8, "per_second": 1.0, "unit": "FLOP/s"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder that `--part all --toy` has written."""
    pytest.importorskip("accelerate", reason="HF Trainer needs accelerate")
    from conftest import one_thread

    out = tmp_path_factory.mktemp("suite")
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--toy", "--part", "all", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread(), timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "apex: not run" in done.stdout
    return out


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_suite

    return gpu_suite


@pytest.fixture
def on_a_gpu(suite, monkeypatch, tmp_path):
    """on_a_gpu(answer, seconds): a suite that believes in a GPU and asks `answer(task)` -> (rows, problem)."""
    from gpu import parts
    from gpu.store import Store

    def make(answer, seconds=1e9):
        monkeypatch.setattr(parts, "ask", lambda task, *_: answer(task))
        one = parts.Suite(Store(tmp_path / "out", False, "1.0"), False, seconds)
        one.store.facts({"device_gib": 140.0})
        return one

    return make


def _results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_check_passed_or_says_why_it_did_not_run(toy):
    checks = {c["name"]: c for c in _results(toy)["checks"]}
    for check in checks.values():
        assert check["status"] in ("pass", "not run"), check
        assert check["reason"] if check["status"] == "not run" else check["measured"] <= check["tolerance"], check
    for what in ("loss", "gradient norm", "update"):
        for step in ("zh-1b zero3 fp32", "zh-1b zero3 bf16", "tiny zero3 fp32", "tiny zero3 bf16"):
            assert checks[f"step {step} against plain fp32: {what}"]["status"] == "pass"
        assert checks[f"packed documents zh-1b bf16 against a dense mask in fp32: {what}"]["status"] == "pass"
    assert {c["status"] for name, c in checks.items() if name.startswith("head")} == {"pass"}
    assert checks["AdamW by torch against plain AdamW, 100 steps"]["status"] == "pass"
    assert checks["resume zero1 bf16, train.deterministic: steps that differ in any bit"]["measured"] == 0
    (exported,) = (c for name, c in checks.items() if name.startswith("export"))
    assert exported["status"] == "pass"


@pytest.mark.slow
def test_throughput_rows_hold_every_implementation_and_no_share_where_no_peak_is_known(toy):
    results = _results(toy)
    rows = results["throughput"]
    assert {r["way"]: r["peer"] for r in rows} == WAYS
    for row in rows:
        assert row["recipe"] == "zh-1b"
        assert len(row["step_seconds"]) >= 3
        assert row["tokens_per_step"] == row["micro_batch"] * row["accumulation"] * row["sequence_length"]
        assert row["tokens_per_second"] > 0
        assert row["flops_per_token_causal"] < row["flops_per_token_hw"]
    first = {r["way"]: r["warm_up_loss"] for r in reversed(rows)}  # of the first size that each has tried
    assert max(first.values()) - min(first.values()) < 0.02  # the same weights and the same samples
    assert len({r["micro_batch"] for r in rows if r["way"] == "ours zero3"}) > 1  # doubled within one engine
    assert {r["what"] for r in results["ceilings"]} == {"bf16 product", "device copy"}
    assert {r["way"] for r in results["heads"]} == {"ours", "plain"}
    assert {r["change"] for r in results["ablation"]} >= {"as it is", "deepspeed.config=zero3.json"}
    facts = results["facts"]
    assert facts["toy"] is True
    assert set(facts["versions"]) >= {"torch", "deepspeed", "transformers", "accelerate", "liger_kernel"}
    if facts["device"] == "cpu":
        assert {r[f"mfu_{kind}"] for r in rows for kind in ("hw", "causal", "6n")} == {None}


@pytest.mark.slow
def test_markdown_says_that_toys_prove_no_speed(toy):
    text = (toy / "README.md").read_text(encoding="utf-8")
    assert "nothing about speed" in text
    for title in ("Ceilings", "What is asked", "Throughput", "Ablation", "Correctness"):
        assert f"## {title}" in text
    assert "| steel-1b | floor 50 %, aim 60 % | not run |" in text
    assert "hand-written PyTorch" in text


def test_the_engine_that_is_measured_takes_the_steps_of_plain_torch(suite):
    """One group of checks of the real suite, in this process."""
    from gpu import ask

    task = {"task": "checks", "group": "steps zh-1b", "toy": True, "build_deepspeed_adam": False}
    rows, problem = ask.ask(task, 0.0, [])
    checks = [row for row in rows if row["kind"] == "check"]
    assert problem == ""
    assert len(checks) == 6
    assert {check["status"] for check in checks} == {"pass"}, checks


def test_what_this_code_has_measured_is_not_measured_again_and_other_code_is(on_a_gpu):
    from gpu import parts

    asked = []

    def answer(task):
        asked.append(task["task"])
        return [_speed_row(task["micro_batch"]) if task["task"] == "measure" else CEILING], ""

    one = on_a_gpu(answer)
    parts.throughput(one, ["zh-1b"])
    first = len(asked)
    assert asked.count("ceilings") == 1
    parts.throughput(one, ["zh-1b"])
    assert len(asked) == first
    one.store.code = "other code"
    parts.throughput(one, ["zh-1b"])
    assert len(asked) == 2 * first
    assert len({r["way"] for r in one.store.rows("throughput", code="other code")}) == 6  # the old rows are replaced


def test_a_part_whose_time_is_over_leaves_the_rest_for_the_next_call(on_a_gpu):
    from gpu import parts

    one = on_a_gpu(lambda task: pytest.fail("started without time"), seconds=5)
    parts.throughput(one, ["zh-1b", "steel-1b"])
    assert one.left_out == 1 + 2 * 6
    assert not one.store.rows("gaps")


def test_what_was_cut_off_is_measured_again_and_what_died_is_not(on_a_gpu, monkeypatch):
    from gpu import parts

    asked = []

    def answer(task):
        asked.append(task["task"])
        if task["task"] == "ceilings":
            return [], "exit code -11"
        return [_speed_row(8)], "stopped after 150 s" if len(asked) == 2 else ""

    one = on_a_gpu(answer)
    monkeypatch.setattr(parts.Suite, "cut_off", lambda self: len(asked) == 2)
    parts.throughput(one, ["zh-1b"])
    assert [r["key"] for r in one.store.rows("throughput", cut_off=True)] == ["zh-1b / ours auto"]
    assert [g["key"] for g in one.store.rows("gaps")] == ["ceilings"]
    before = len(asked)
    parts.throughput(one, ["zh-1b"])
    assert asked[before:] == ["measure"]
    assert not one.store.rows("throughput", cut_off=True)


def test_a_failed_check_is_exit_code_1_and_what_is_left_75(suite, monkeypatch, tmp_path):
    check = {"name": "a", "status": "pass", "measured": 0.0, "tolerance": 1.0, "reason": ""}

    def part(status, left):
        def run(one, *_):
            one.store.put("checks", "group", [check | {"status": status}])
            one.left_out = left

        return run

    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--toy", "--part", "correctness", "--out", str(tmp_path)])
    for status, left, code in (("pass", 0, 0), ("pass", 2, 75), ("fail", 2, 1)):
        monkeypatch.setattr(suite, "_run", part(status, left))
        assert suite.main() == code


def test_a_process_that_dies_is_a_failed_check(on_a_gpu):
    from gpu import parts

    one = on_a_gpu(lambda task: ([], "exit code -11: Segmentation fault"))
    parts.correctness(one)
    assert {c["status"] for c in one.store.rows("checks")} == {"fail"}
    assert len(one.store.rows("checks")) == len(parts.CHECK_GROUPS)


def test_a_difference_that_is_not_a_number_fails(suite):
    from gpu.checks import compare

    assert [compare("x", value, 1.0).status for value in (1.0, 1.1, float("nan"))] == ["pass", "fail", "fail"]


def test_micro_batches_halve_until_one_fits_and_a_process_of_its_own_doubles_while_it_is_faster(on_a_gpu):
    """A device on which 16 samples fit, and 8 are as fast."""
    from gpu import parts

    asked = []

    def answer(task):
        asked.append(task["micro_batch"])
        size = task["micro_batch"]
        return ([{"kind": "out of memory"}] if size > 16 else [_speed_row(size, rate=1000.0 * min(size, 8))]), ""

    one = on_a_gpu(answer)
    trainer = {"recipe": "zh-1b", "way": "hf trainer", "overrides": []}
    assert [r["micro_batch"] for r in parts.measure(one, "key", trainer, 4)] == [4, 8, 16]
    assert asked == [4, 8, 16]
    asked.clear()
    assert [r["micro_batch"] for r in parts.measure(one, "key", trainer | {"way": "plain loop"}, 64)] == [16]
    assert asked == [64, 32, 16]
    assert parts.measure(on_a_gpu(lambda task: ([{"kind": "out of memory"}], "")), "key", trainer, 2) == []
    assert [g["reason"] for g in one.store.rows("gaps")] == []


def test_a_recipe_below_its_floor_is_profiled_and_said(on_a_gpu):
    from gpu import asked, parts

    def answer(task):
        if task["task"] == "profile":
            return [{"kind": "profile", "micro_batch": 8, "table": "where the time goes"}], ""
        rate = 300.0 if task.get("recipe") == "steel-1b" else 600.0  # of 1000 at peak
        return [_speed_row(8, rate) if task["task"] == "measure" else CEILING], ""

    one = on_a_gpu(answer)
    parts.throughput(one, ["zh-1b", "steel-1b"])
    assert [p["recipe"] for p in one.store.rows("profiles")] == ["steel-1b"]
    verdicts = {a.what: a.verdict for a in asked.answers(one.store.rows("throughput"))}
    assert verdicts["zh-1b"] == "reached"
    assert verdicts["steel-1b"] == "below the floor"
    assert verdicts["tinyllama-1.1b"] == ""
    assert verdicts["zh-1b, ours auto / HF + DeepSpeed loop"] == "missed"
    assert "where the time goes" in (one.store.out / "README.md").read_text(encoding="utf-8")


def _speed_row(size, rate=1000.0):
    flops = {f"flops_per_token_{kind}": 1.0 for kind in ("hw", "causal", "6n")}
    return {"kind": "speed", "tokens_per_second": rate, "tokens_per_step": 1000, "step_seconds": [1.0], "warm_up_loss": 1.0,
            "micro_batch": size, "accumulation": 64 // size, "memory_gib": 1.0, "sharding": None, "peak_flops": 1000.0,
            **flops}  # fmt: skip


def test_apex_is_built_from_the_files_that_its_own_setup_names(suite, tmp_path):
    from gpu import apex

    with pytest.raises(RuntimeError, match="no checkout of NVIDIA's apex"):
        apex.build(tmp_path, tmp_path / "build")
    setup = "CUDAExtension(name='amp_C',\n sources=['csrc/frontend.cpp',\n 'csrc/adam.cu'],\n) CUDAExtension(name='other', sources=['x.cu'])"
    (tmp_path / "setup.py").write_text(setup, encoding="utf-8")
    assert apex.sources(tmp_path) == [tmp_path / "csrc/frontend.cpp", tmp_path / "csrc/adam.cu"]


def test_without_a_gpu_and_without_toy_it_says_so_and_writes_nothing(suite, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suite, "gpu", lambda: (None, None))
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--part", "correctness", "--out", str(tmp_path / "out")])
    assert suite.main() == 78
    assert "--toy" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

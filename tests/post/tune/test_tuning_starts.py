"""What a command of sft finds beside it: ranks of other runs, ranks of its own that a killed supervisor left, bad places."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from processes import wait_for
from tiny_tuning import conversation, run, sums, write_rows, write_tiny

from megatron_steel import tune
from megatron_steel.errors import EXIT_BAD_INPUT, EXIT_STOPPED, SteelError, Stopped, TrainingError


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("letters"))


@pytest.fixture
def rank_of():
    """rank_of(work, start): a process that looks like a rank of that start."""
    made = []

    def begin(work, start):
        words = [
            sys.executable,
            "-c",
            "import time; time.sleep(60)",
            "megatron_steel.tune",
            "--local_rank=0",
            str(work),
            start,
        ]
        made.append(subprocess.Popen(words))
        wait_for(lambda: start in psutil.Process(made[-1].pid).cmdline(), 10)
        return made[-1].pid

    yield begin
    for process in made:
        process.kill()
        process.wait()


def test_ranks_are_those_of_one_start(rank_of, tmp_path):
    mine, other = rank_of(tmp_path / "a.partial", "--start=1"), rank_of(tmp_path / "a.partial", "--start=2")
    assert [process.pid for process in tune._ranks(tmp_path / "a.partial", "--start=1")] == [mine]
    assert {process.pid for process in tune._ranks(tmp_path / "a.partial")} == {mine, other}
    assert tune._ranks(tmp_path / "b.partial") == []


def test_a_command_waits_for_nobody_of_another_folder_and_is_refused_beside_its_own(
    letters, rank_of, tmp_path, monkeypatch, capsys
):
    rows = write_rows(tmp_path / "rows.jsonl", sums(4))
    words = ["sft", letters, rows, "--global-batch-size=8", "max_steps=1", "--output", "out"]
    rank_of("out.partial", "--start=1")  # as in another folder
    monkeypatch.chdir(tmp_path)
    left = rank_of(tmp_path / "out.partial", "--start=2")
    assert run(*words) == EXIT_BAD_INPUT
    assert f"1 ranks of an earlier start still train there (processes {left})" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    psutil.Process(left).kill()
    assert run(*words) == 0
    assert "-> out\n" in capsys.readouterr().out  # told by the name that was given


@pytest.mark.parametrize("output", [".", "/", "..", "model/..", ""])
def test_an_output_without_a_name_is_refused(output, letters, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("sft", letters, tmp_path, "--output", output) == EXIT_BAD_INPUT
    assert "this names no new folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_output_inside_the_model_is_refused(letters, tmp_path, monkeypatch, capsys):
    before = sorted(os.listdir(letters))
    monkeypatch.chdir(letters)
    for output in ("sft", "deeper/sft", letters):
        assert run("sft", letters, tmp_path, "--output", output) == EXIT_BAD_INPUT
        assert "the output lies in the folder of the model" in capsys.readouterr().err
    assert sorted(os.listdir(letters)) == before


def test_a_stop_before_the_first_step_leaves_nothing(letters, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [conversation("a", "b")] * 20000)

    def stop() -> None:
        while not (tmp_path / "out.partial" / "tokens" / "train.arrow").exists():
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    assert run("sft", letters, rows, "--output", tmp_path / "out") == EXIT_STOPPED
    assert "stopped on request" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("codes", "asked", "kind", "named"),
    [
        ([70], False, TrainingError, "lost the other; and 1 of 2 ranks died without a word"),
        ([70, 70], False, TrainingError, "lost the other$"),
        ([78], False, SteelError, "lost the other$"),
        ([], False, TrainingError, "^2 of 2 ranks died without a word"),
        ([75], True, Stopped, "stopped at once"),
        ([75, 75], True, Stopped, "lost the other"),
    ],
)
def test_how_ranks_ended_is_told_with_those_that_died(codes, asked, kind, named, tmp_path):
    for rank, code in enumerate(codes):
        told = {"exit_code": code, "what": "lost the other", "where": "rank 0", "remedy": "see above"}
        (tmp_path / f"{rank}.json").write_text(json.dumps(told))
    with pytest.raises(kind) as caught:
        tune._judge(tmp_path, 2, -9, asked)
    assert type(caught.value) is kind
    assert re.search(named, getattr(caught.value, "what", str(caught.value)))

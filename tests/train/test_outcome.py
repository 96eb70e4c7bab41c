"""What a start of the job came to, from the ranks' reports; the launcher's code alone is never believed."""

import json

import pytest

from megatron_steel.train.outcome import judge, said


def _rank(rank, exit_code, ended=1.0, error="", step=5, lost=False, world=2):
    return {"rank": rank, "world_size": world, "host": "a", "pid": 100 + rank, "step": step, "exit_code": exit_code,
            "ended": ended, "error": error, "launcher_lost": lost}  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "lost", "launcher", "expected"),
    [
        ((0, 0), False, 0, 0),
        ((0, 0), False, -9, 0),  # the launcher died after the last word of the last rank
        ((0,), False, 0, 70),  # one of two never began
        ((None, None), False, 0, 70),  # deepspeed says 0 where its node launcher was killed
        ((0, None), False, 0, 70),
        ((75, 75), False, 75, 75),
        ((75, 75), False, 1, 75),  # somebody told the node launcher to stop
        ((75, 75), True, 0, 70),  # saved because the launcher had died: nobody wanted it
        ((75, None), False, 75, 70),
        ((75, 70), False, 75, 70),
        ((78, 75), False, 78, 78),
        ((None, 78), False, 78, 78),
        ((), False, 1, 70),
    ],
)
def test_the_ranks_decide(codes, lost, launcher, expected):
    reports = [_rank(rank, code, lost=lost) for rank, code in enumerate(codes)]
    assert judge(reports, launcher, set(), False).exit_code == expected


def test_a_stop_of_the_whole_group_is_a_stop():
    """SLURM and systemd signal the launcher too, which dies of it."""
    reports = [_rank(0, 75, lost=True), _rank(1, 75)]
    assert judge(reports, -15, set(), True).exit_code == 75


def test_the_first_failure_is_the_cause():
    broken = "Traceback (most recent call last):\n  File x\nRuntimeError: Connection closed by peer"
    cause = "Traceback (most recent call last):\n  File y\nValueError: 17 is odd"
    outcome = judge([_rank(0, 70, 2.0, broken), _rank(1, 70, 1.0, cause)], 70, set(), False)
    assert outcome.cause == "rank 1 (process 101 on a) failed first: ValueError: 17 is odd"
    assert outcome.detail == cause
    again = judge([_rank(0, 70, 2.0, broken), _rank(1, 70, 1.0, cause.replace("17", "19"))], 70, set(), False)
    assert again.kind == outcome.kind  # numbers differ from start to start
    assert judge([_rank(0, 70, step=6), _rank(1, 70, step=6)], 70, set(), False).kind != outcome.kind


def test_a_rank_without_a_last_word_was_killed_unless_we_killed_it():
    others = _rank(0, 70, error="RuntimeError: Connection closed by peer")
    outcome = judge([others, _rank(1, None)], 247, set(), False)
    assert (
        outcome.cause
        == "rank 1 (process 101 on a) was killed without a word; the launcher ended with SIGKILL (exit code 247)"
    )
    assert "rank 0 (process 100 on a) failed first" in judge([others, _rank(1, None)], 70, {101}, False).cause


def test_an_error_of_ours_is_told_by_its_first_line():
    error = "error: the port is in use\n  where: MASTER_PORT=1\n  do:    choose another"
    assert judge([_rank(0, 70, error=error), _rank(1, 75)], 70, set(), False).cause.endswith(
        "failed first: the port is in use"
    )


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-9, "SIGKILL (exit code -9)"),
        (247, "SIGKILL (exit code 247)"),
        (137, "SIGKILL (exit code 137)"),
        (143, "SIGTERM (exit code 143)"),
        (245, "SIGSEGV (exit code 245)"),
        (1, "exit code 1"),
        (78, "exit code 78"),
    ],
)
def test_launchers_fold_signals_into_their_codes(code, words):
    assert said(code) == f"ended with {words}"


def test_ranks_and_supervisor_talk_through_files(tmp_path):
    from megatron_steel import dist
    from megatron_steel.train.report import Report, ask_to_stop, read_all

    dist.set_up_logging()
    report = Report(tmp_path)
    assert [(r["rank"], r["exit_code"], r["step"]) for r in read_all(tmp_path)] == [(0, None, 0)]
    report.beat(7)
    assert report.stop_asked() is None
    ask_to_stop(tmp_path, "SIGTERM")
    assert report.stop_asked() == "SIGTERM"
    try:
        raise ValueError("odd")
    except ValueError:
        dist.log.exception("a bug")
    report.end(70)
    report.end(0)  # the first word counts
    (entry,) = read_all(tmp_path)
    assert (entry["exit_code"], entry["step"]) == (70, 7)
    assert entry["error"].splitlines()[-1] == "ValueError: odd"
    assert json.dumps(entry)
    assert not Report(None).stop_asked()
    dist.set_up_logging()

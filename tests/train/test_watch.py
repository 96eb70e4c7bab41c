"""Signals and marks in this process; the guard against processes that are stuck in every way Python knows."""

import signal
import subprocess
import sys
import time

import pytest

from megatron_steel.errors import Stopped, StoppedEarly
from megatron_steel.signals import SIGNALS, stop_signals
from megatron_steel.train.watch import Phase, Watch


@pytest.fixture
def watch():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the tests inherit that it is ignored
    watch = Watch(None)
    watch.listen()
    yield watch
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_step_a_signal_ends_the_rank(watch, number):
    with pytest.raises(StoppedEarly, match=number.name) as caught:
        signal.raise_signal(number)
    assert caught.value.exit_code == 75
    signal.raise_signal(signal.SIGTERM)  # while it unwinds: no second exception


@pytest.mark.parametrize("number", SIGNALS)
def test_later_a_signal_only_asks_and_the_first_reason_stands(watch, number):
    watch.begin(3)
    signal.raise_signal(number)
    signal.raise_signal(signal.SIGTERM)
    assert watch.stop_wanted() == number.name
    assert watch.agreed_stop()


def test_the_second_ctrl_c_means_now(watch):
    watch.begin(0)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_nohup_is_respected(watch):
    assert signal.SIGHUP in stop_signals()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert stop_signals() == [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


def test_asked_by_another_thread_before_the_first_step(watch):
    watch.ask("somebody")
    with pytest.raises(Stopped, match="somebody"):
        watch.begin(0)


def test_a_time_budget_that_is_over_still_buys_one_step():
    watch = Watch(1e-9)
    assert watch.stop_wanted() is None
    watch.begin(0)
    assert watch.stop_wanted() == "train.stop_after_minutes is over"


def test_the_longest_pause_leaves_out_the_first_step_and_saves():
    watch = Watch(None)
    watch.begin(0)
    watch.progress(1)
    assert watch.longest_pause is None
    time.sleep(0.02)
    watch.progress(2)
    longest = watch.longest_pause
    assert longest >= 0.02
    with watch.saving():
        assert watch.phase is Phase.SAVING
        time.sleep(2 * longest)
    watch.progress(3)
    assert watch.longest_pause == longest


STUCK = """
import ctypes, sys, time
from pathlib import Path
from megatron_steel.train.guard import Guard
from megatron_steel.train.report import Report
from megatron_steel.train.watch import Watch

watch = Watch(None)
with Guard(watch, Report(None), Path(sys.argv[1]), 1.0) as guard:
    if sys.argv[3] == "training":
        guard.begin(0)
    print("ready", flush=True)
    if sys.argv[2] == "python":
        time.sleep(100)
    elif sys.argv[2] == "lock":  # a library waits, and has let Python's lock go
        mutex = (ctypes.c_char * 64)()
        library = ctypes.CDLL(None)
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)
    else:  # a library works, and keeps Python's lock
        ctypes.PyDLL(None).sleep(100)
"""


def _stuck(run, how, phase):
    process = subprocess.Popen([sys.executable, "-c", STUCK, str(run), how, phase], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("how", "code"), [("python", 70), ("lock", 70), ("gil", 1)])
def test_a_hang_writes_the_stacks_and_ends_the_process(how, code, tmp_path):
    """Where something keeps Python's lock no Python code can run: C code writes the stacks and leaves with 1."""
    process = _stuck(tmp_path, how, "training")
    assert process.wait(60) == code
    text = (tmp_path / "stacks" / "rank-00000.txt").read_text(encoding="utf-8")
    assert 'File "<string>", line ' in text
    assert ("no progress for" in text) == (code == 70)


@pytest.mark.parametrize("how", ["python", "lock"])
def test_a_signal_reaches_a_process_that_is_stuck_before_the_first_step(how, tmp_path):
    process = _stuck(tmp_path, how, "starting")
    time.sleep(1.5)  # longer than hang_after_seconds: before the first step there is no hang
    assert process.poll() is None
    process.terminate()
    assert process.wait(60) == (75 if how == "lock" else 1)  # the exception that this script does not catch
    assert not (tmp_path / "stacks").exists()

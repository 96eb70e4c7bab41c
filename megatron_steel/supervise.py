"""`megatron-steel launch`: keep a job running until it is complete, is asked to stop, or cannot go on.

1. `launch` reads the recipe, so that a mistake in it ends before anything starts, and hands `Supervisor` a way to start.
2. `Supervisor.run` starts `deepspeed` again and again: each start ends in an `Outcome`, and `_next` decides.
3. `_one_start` waits for the launchers and their ranks, passes a stop on to all of them at once, and leaves no process.

A job has one part on this machine (`node.Launched`), or one on each node of a host file (`hosts.Remote`).

It wraps DeepSpeed's launcher and never trusts its exit code: what ranks report (`train/report.py`) is the truth, and
where the run stands is found by scanning its checkpoints. Knows nothing of how training works.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_steel import dist
from megatron_steel.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_STOPPED,
    SteelError,
    Stopped,
    TrainingError,
)
from megatron_steel.hosts import Cluster, read_hostfile
from megatron_steel.node import LEFT_END_IN, Launched, free_port
from megatron_steel.signals import stop_signals
from megatron_steel.train import report
from megatron_steel.train.outcome import Outcome, judge

_SAME_FAILURES = 3
_FAILURES_WITHOUT_PROGRESS = 10
_LONGEST_PAUSE = 300.0  # seconds between two starts
_LOOK_EVERY = 0.2
_FAILED_ENDS_IN = 5.0  # seconds that the other ranks have after one has failed
_LOST_NODE_ENDS_IN = 60.0  # seconds that ranks have after the way to a node is lost: if it lives, they may save
_LOST = 255  # of ssh and srun
Start = Callable[[Path, list[str], Callable[[], bool]], "list[Any]"]
"""(folder of reports, the launcher's words, is a stop wanted?) -> the job's parts, started"""


def launch(recipe: str, overrides: list[str], num_gpus: int | None, hostfile: str | None) -> None:
    """Train a recipe under supervision; a rank per GPU, or two ranks where there is none.

    Raises:
        SteelError: bad recipe or data; the same failure three times at the same step.
        Stopped: stopped on request; everything is saved.
        TrainingError: the job failed while it was stopping.
    """
    from megatron_steel.recipe import accumulation_steps, load_recipe
    from megatron_steel.run_folder import refuse_used
    from megatron_steel.stages import parts_of

    resolved = load_recipe(recipe, overrides)
    if num_gpus is not None and num_gpus < 1:
        raise SteelError(f"{num_gpus} ranks cannot train", "--num_gpus", "give at least 1, or leave it out")
    hosts = read_hostfile(hostfile, num_gpus) if hostfile else []
    trains = [part.recipe.train for part in parts_of(resolved)]
    for train in trains if hosts or num_gpus else ():  # else the ranks find it out
        accumulation_steps(train, sum(host.slots for host in hosts) or num_gpus or 1)
    folder = Path(resolved.run.dir).expanduser().absolute()
    words = [recipe, *overrides]
    if resolved.train.resume == "never":  # asked of the folder as it is now; later starts go on with this run's own
        refuse_used(folder)
        words.append("train.resume=auto")
    supervisor = Supervisor(folder, words, resolved.train.stop_after_minutes)
    with supervisor.listening():
        if hosts:
            cuts = lambda ranks: not any(t.global_batch_size % (t.micro_batch_size * ranks) for t in trains)  # noqa: E731
            supervisor.run(Cluster(hosts, cuts).start)
        else:
            supervisor.run(on_this_machine(num_gpus))


def on_this_machine(num_gpus: int | None) -> Start:
    """A job of one part; a rank per GPU where `num_gpus` is None, or two without one."""
    options = ranks_options(2 if num_gpus is None and not _sees_gpus() else num_gpus)

    def start(reports: Path, words: list[str], wanted: Callable[[], bool]) -> list[Launched]:
        return [Launched([*options, "--master_port", free_port(), *words])]

    return start


class Supervisor:
    """One per command.

    Args:
        folder: the run folder.
        words: the recipe and its overrides.
        stop_after_minutes: the time budget over all starts.
    """

    def __init__(self, folder: Path, words: list[str], stop_after_minutes: float | None):
        self._folder, self._words = folder, words
        self._deadline = None if stop_after_minutes is None else time.monotonic() + 60 * stop_after_minutes
        self._asked: str | None = None
        self._now = False
        self._failures: Counter[str] = Counter()
        self._failed_since_progress = 0
        self._newest = self._newest_checkpoint()

    @contextlib.contextmanager
    def listening(self) -> Any:
        """Take the signals over."""
        before = {n: signal.signal(n, self._on_signal) for n in stop_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._now |= number == signal.SIGINT and self._asked == "SIGINT"  # the second Ctrl-C means now
        self._asked = self._asked or signal.Signals(number).name

    def run(self, start: Start) -> None:
        """Start the job until it ends for good; how, is said as by `launch`."""
        pause, number = 0.0, 0
        while True:
            self._sleep(pause)
            number, began = number + 1, time.time()
            outcome = self._one_start(number, start)
            self._remember(began, outcome)
            if outcome.exit_code == EXIT_DONE:
                return
            pause = self._next(outcome)
            told = f"the job failed after step {outcome.step}: {outcome.cause}\n{_indented(outcome.detail)}".rstrip()
            dist.log.warning("%s\nstarting again in %.0f s from %s", told, pause, self._newest or "the beginning")

    def _next(self, outcome: Outcome) -> float:
        """Seconds to wait before the next start; raises where there is none."""
        if outcome.exit_code == EXIT_STOPPED:
            raise Stopped(f"{outcome.cause} at step {outcome.step}; the same command goes on from there")
        if outcome.exit_code == EXIT_BAD_INPUT:
            raise SteelError(outcome.cause, self._folder, f"mend it and start again\n{_indented(outcome.detail)}")
        newest = self._newest_checkpoint()
        if newest != self._newest:
            self._newest, self._failed_since_progress = newest, 0
            self._failures.clear()
        if self._wanted():
            raise TrainingError(f"asked to stop ({self._asked}), but {outcome.cause}", self._folder,
                                f"start again: it goes on from {self._newest or 'the beginning'}\n{_indented(outcome.detail)}")  # fmt: skip
        self._failures[outcome.kind] += 1
        self._failed_since_progress += 1
        same, idle = self._failures[outcome.kind], self._failed_since_progress
        if same >= _SAME_FAILURES or idle >= _FAILURES_WITHOUT_PROGRESS:
            times = (
                f"{same} times after step {outcome.step}"
                if same >= _SAME_FAILURES
                else f"{idle} times without a new checkpoint"
            )
            raise SteelError(f"the run failed {times}: {outcome.cause}", self._folder,
                             f"starting again will not help: mend the cause first\n{_indented(outcome.detail)}")  # fmt: skip
        return min(_LONGEST_PAUSE, 3.0 ** (idle - 1))

    def _one_start(self, number: int, start: Start) -> Outcome:
        """Start the job once, to the end of its last process."""
        reports = self._reports_folder(number)
        words = ["--module", "megatron_steel.pretrain", f"{report.OPTION}{reports}", *self._words]
        try:
            parts = start(reports, words, self._wanted)
            try:
                first = self._wait(parts, reports)
            finally:
                with ThreadPoolExecutor(len(parts)) as pool:
                    killed = set().union(*pool.map(lambda part: part.end(), parts))
            code = first.poll()
            return judge(report.read_all(reports), code, killed, self._asked is not None, first.name)
        finally:
            shutil.rmtree(reports, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._folder.rmdir()  # a run that never began leaves no folder

    def _wait(self, parts: list[Any], reports: Path) -> Any:
        """Until nothing of the job lives, or what lives must be killed. Returns the part whose launcher failed first."""
        told, kill_at = False, float("inf")
        failed = None
        while True:
            if self._wanted() and not told:
                dist.log.info("asked to stop (%s): every rank saves at the end of its step", self._asked)
                self._tell(parts, reports)
                told = True
            now = time.monotonic()
            failed = failed or next((part for part in parts if part.poll()), None)
            codes = [r["exit_code"] for r in report.read_all(reports)]
            if all(part.gone() for part in parts):
                break
            if any(part.poll() is not None for part in parts):
                kill_at = min(kill_at, now + LEFT_END_IN)
            if any(part.name and part.poll() == _LOST for part in parts):
                kill_at = min(kill_at, now + _LOST_NODE_ENDS_IN)
            if any(code not in (None, EXIT_DONE, EXIT_STOPPED) for code in codes):
                kill_at = min(kill_at, now + _FAILED_ENDS_IN)
            if codes and None not in codes:  # all have said their last word
                kill_at = min(kill_at, now + 2 * _FAILED_ENDS_IN)
            if self._now or now > kill_at:
                break
            time.sleep(_LOOK_EVERY)
        return failed or parts[0]

    def _tell(self, parts: list[Any], reports: Path) -> None:
        """Ask every rank to stop: by a file, or where the disk is full by a signal."""
        try:
            report.ask_to_stop(reports, str(self._asked))
        except OSError as error:
            dist.log.warning("%s: %s; the ranks are signalled instead", reports, error)
            for part in parts:
                part.tell()

    def _wanted(self) -> bool:
        """True when this process was asked to stop."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._asked = self._asked or "train.stop_after_minutes is over"
        return self._asked is not None

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._wanted():
            if time.monotonic() >= until:
                return
            time.sleep(_LOOK_EVERY)
        raise Stopped(f"stopped on request ({self._asked}) before a start; the same command goes on from there")

    def _newest_checkpoint(self) -> str | None:
        from megatron_steel.checkpoint.commit import published

        return next((path.name for path in reversed(published(self._folder / "checkpoints"))), None)

    def _reports_folder(self, number: int) -> Path:
        """A fresh folder for the ranks of one start, inside the run folder, which all nodes see."""
        mark = f".launch-{socket.gethostname()}-"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f"{mark}{os.getpid()}-{number}-", dir=self._folder))
            # Of supervisors that were killed: their process is gone, or in a container it has our number.
            for other in self._folder.glob(f"{mark}*"):
                pid = other.name.removeprefix(mark).split("-")[0]
                if other != folder and (pid == str(os.getpid()) or not Path("/proc", pid).exists()):
                    shutil.rmtree(other, ignore_errors=True)
        except OSError as error:
            what = f"the run folder cannot be written: {error.strerror}"
            raise SteelError(what, self._folder, "choose another run.dir, or mend this one") from error
        return folder

    def _remember(self, began: float, outcome: Outcome) -> None:
        """One line per start in the run folder, if there is one: to see afterwards what happened in the night."""
        line = {"began": round(began, 1), "ended": round(time.time(), 1), "exit_code": outcome.exit_code,
                "step": outcome.step, "cause": outcome.cause}  # fmt: skip
        if self._folder.is_dir():
            with contextlib.suppress(OSError), (self._folder / report.HISTORY).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def ranks_options(num_gpus: int | None) -> list[str]:
    """The launcher's options for the number of ranks. With `--num_gpus` it would forget CUDA_VISIBLE_DEVICES."""
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if num_gpus is None:
        return []
    if not visible or not _sees_gpus():
        return ["--num_gpus", str(num_gpus)]
    if num_gpus > len(visible):
        what = f"{num_gpus} ranks, but {len(visible)} GPUs in CUDA_VISIBLE_DEVICES"
        raise SteelError(what, "--num_gpus", "ask for fewer, or show more")
    return ["--include", "localhost:" + ",".join(visible[:num_gpus])]


def _sees_gpus() -> bool:
    """Whether torch sees a GPU, asked in a process that ends: this one shall stay small and hold no device."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False, stderr=subprocess.DEVNULL).returncode == 0


def _indented(text: str) -> str:
    return "\n".join(f"    | {line}" for line in text.splitlines())

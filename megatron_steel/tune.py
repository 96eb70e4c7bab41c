"""`megatron-steel sft` and `dpo`: prepare a run, train it in this process or under DeepSpeed's launcher, publish it.

1. `tune` checks everything and makes the work folder (`post/tune/prepare`).
2. One rank without DeepSpeed trains here; else `deepspeed` starts this module on every rank. A stop goes to all of them at
   once, by a file, and each writes how it ended: the launcher's exit code is not trusted.
3. The model is published (`post/tune/publish`).

Holds together what may not know each other: training's DeepSpeed and the fine-tuning of `post`.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_steel import dist, node, supervise
from megatron_steel.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_STOPPED,
    SteelError,
    Stopped,
    StoppedEarly,
    TrainingError,
)
from megatron_steel.signals import stop_signals

_MODULE = "megatron_steel.tune"
_OUTCOMES = "outcomes"
_START = "--start="  # and a word that no other start has, on the command line of its ranks
_LOOK_EVERY = 0.2
_LEFT_END_IN = 120.0  # seconds for ranks that lost their launcher to save and leave


@contextlib.contextmanager
def _leaves_when_asked() -> Iterator[None]:
    """A signal to stop ends what trains nothing: reading, tokenizing, publishing. Training has handlers of its own."""
    asked: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if asked.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt
        if len(asked) == 1:  # the next may not tear what cleans up
            raise StoppedEarly("stopped on request; the same command goes on from what is saved")

    before = {number: signal.signal(number, leave) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@_leaves_when_asked()
def tune(
    kind: str, model: str, data: str, output: str, overrides: list[str], global_batch: int | None, num_gpus: int | None,
    deepspeed: str | None, lora: str | None, packing: bool, trust_code: bool,
) -> None:  # fmt: skip
    """Fine-tune a Hugging Face folder; the output is one too.

    Args:
        kind: sft or dpo.
        num_gpus: ranks; None: one per GPU, or one without.
        deepspeed: a file of `ds_configs/`, by path or name.
        lora: `r=16` and the like, "" for the defaults; None trains all weights.

    Raises:
        SteelError: bad settings, model, data or output; nothing is written then.
        Stopped, StoppedEarly: asked to stop; the same command goes on.
        TrainingError: a rank failed.
    """
    from megatron_steel.post.tune import settings
    from megatron_steel.post.tune.lora import read_lora

    settings.require_extra()
    from megatron_steel.data.reserve import reserved
    from megatron_steel.post.tune.plan import Plan, work_folder
    from megatron_steel.post.tune.prepare import prepare
    from megatron_steel.train.engine import read_config

    if num_gpus is not None and num_gpus < 1:
        raise SteelError(f"{num_gpus} ranks cannot train", "--num_gpus", "give at least 1, or leave it out")
    values = settings.read_settings(kind, overrides)
    config = read_config(deepspeed) if deepspeed else None
    ranks = num_gpus or _gpus()
    batch = settings.GLOBAL_BATCH[kind] if global_batch is None else global_batch
    settings.accumulation(batch, values["per_device_train_batch_size"], ranks)
    alone = ranks == 1 == _gpus() and config is None  # of several GPUs the launcher shows a rank its own
    plan = Plan(kind, str(Path(model).resolve()), trust_code, values, batch, ranks, config, read_lora(lora), packing, {},
                starter=0 if alone else os.getpid())  # fmt: skip
    target = Path(output)
    _require_place(target, Path(plan.model))
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(reserved(target))
            _require_nobody(work_folder(target.resolve()))
            work = prepare(plan, data, target)
        except OSError as error:  # what the file system has against the output
            remedy = "mend it and give the same command again"
            raise SteelError(f"cannot write: {error.strerror or error}", target, remedy) from error
        if work is not None:
            _run(work_folder(target.resolve()), target, alone)  # absolute: it names the run's ranks


def _require_place(output: Path, model: Path) -> None:
    """Raise SteelError where no new folder can be."""
    if output.name in ("", ".."):
        raise SteelError("this names no new folder", f"--output {output}", "name one that does not exist yet")
    if output.resolve().is_relative_to(model):  # the run's own files would become part of the model
        raise SteelError("the output lies in the folder of the model", output, "name one outside of it")


def _require_nobody(work: Path) -> None:
    """Raise SteelError while ranks of an earlier start write there: their supervisor was killed."""
    left = _ranks(work)
    if left:
        what = (
            f"{len(left)} ranks of an earlier start still train there (processes {', '.join(str(p.pid) for p in left)})"
        )
        raise SteelError(what, work, "they save and leave at the end of their step: wait for them, or kill them")


def _run(work: Path, output: Path, alone: bool) -> None:
    from megatron_steel.post.tune import summary
    from megatron_steel.post.tune.plan import Plan, newest_whole
    from megatron_steel.post.tune.publish import publish

    plan = Plan.read(work)
    print(summary.before(plan, output), flush=True)
    try:
        if not (work / "result.json").is_file():
            _train_here(work) if alone else _launch(plan.ranks, work)
    except SteelError as error:
        if error.exit_code == EXIT_BAD_INPUT and newest_whole(work) is None:
            shutil.rmtree(work, ignore_errors=True)  # nothing came of it
        raise
    publish(plan, work, output)
    print(summary.after(plan, output), flush=True)


def _train_here(work: Path) -> None:
    from megatron_steel.post.tune.trainers import train
    from megatron_steel.train.engine import fetch_mixtures_whole

    train(work, fetch_mixtures_whole)


def _launch(ranks: int, work: Path) -> None:
    """Start the ranks and wait for them; raises how they ended."""
    from megatron_steel.post.tune.plan import STOP

    outcomes = work / _OUTCOMES
    outcomes.mkdir(exist_ok=True)
    for old in [*outcomes.iterdir(), work / STOP]:
        old.unlink(missing_ok=True)
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    start = _START + secrets.token_hex(8)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *supervise.ranks_options(ranks),
               "--master_port", node.free_port(), "--module", _MODULE, str(work), start]  # fmt: skip
    before = {number: signal.signal(number, ask) for number in stop_signals()}
    launcher = subprocess.Popen(command, start_new_session=True, env=_environment(ranks))
    try:
        _wait(launcher, work, start, asked)
    finally:
        node.kill(_ranks(work, start))
        if launcher.poll() is None:
            launcher.kill()
        launcher.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
        (work / STOP).unlink(missing_ok=True)
    _judge(outcomes, ranks, launcher.returncode, bool(asked))


def _wait(launcher: "subprocess.Popen[bytes]", work: Path, start: str, asked: list[int]) -> None:
    """Until no rank lives, or what lives must be killed."""
    from megatron_steel.post.tune.plan import STOP

    told, kill_at = 0, float("inf")
    while launcher.poll() is None or _ranks(work, start):
        if len(asked) > told:
            told = len(asked)
            if asked.count(signal.SIGINT) > 1:  # the second Ctrl-C means now
                return
            dist.log.info("asked to stop: every rank saves at the end of its step")
            (work / STOP).touch()  # also for ranks that have not begun yet
        if launcher.poll() is not None:
            kill_at = min(kill_at, time.monotonic() + _LEFT_END_IN)
        if time.monotonic() > kill_at:
            return
        time.sleep(_LOOK_EVERY)


def _ranks(work: Path, start: str | None = None) -> list[Any]:
    """The rank processes of one start that live; of any start in this folder where none is named.

    Processes of another container may be seen here, with a folder of the same name.
    """
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if (
            process.info["status"] != psutil.STATUS_ZOMBIE
            and str(work) in words
            and any(word.startswith("--local_rank=") for word in words)
            and _MODULE in words[:4]
            and (start is None or start in words)
        ):
            found.append(process)
    return found


def _judge(outcomes: Path, ranks: int, code: int, asked: bool) -> None:
    """Raise how a run ended, from what each rank wrote last."""
    told = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(outcomes.glob("*.json"))]
    problems = [tree for tree in told if tree["exit_code"] not in (EXIT_DONE, EXIT_STOPPED)]
    dead = (
        f"{ranks - len(told)} of {ranks} ranks died without a word (the launcher ended with {code})"
        if len(told) < ranks
        else ""
    )
    if problems:
        worst = max(problems, key=lambda tree: tree["exit_code"] == EXIT_BAD_INPUT)
        if worst["exit_code"] == EXIT_BAD_INPUT:
            raise SteelError(worst["what"], worst["where"], worst["remedy"])
        # Who lost a partner fails too, and says so louder than the one who died.
        raise TrainingError(worst["what"] + (f"; and {dead}" if dead else ""), worst["where"], worst["remedy"])
    if dead and asked:
        raise Stopped("stopped at once, on request; the same command goes on from the last checkpoint")
    if dead:
        raise TrainingError(dead, outcomes.parent,
                            "see above; the same command goes on from the last checkpoint")  # fmt: skip
    stopped = [tree["what"] for tree in told if tree["exit_code"] == EXIT_STOPPED]
    if stopped:
        raise Stopped(stopped[0])


def _environment(ranks: int) -> dict[str, str]:
    given = dict(os.environ)
    if "OMP_NUM_THREADS" not in given and _gpus() == 1:  # ranks of one machine share its cores
        given["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))
    return given


def _gpus() -> int:
    """GPUs that this process may use; 1 without."""
    import torch

    return max(1, torch.cuda.device_count())


def main(words: list[str]) -> int:
    """One rank under the launcher: train, and write how it ended."""
    work = Path(next(word for word in words if not word.startswith(("--local_rank", _START))))
    dist.set_up_logging()
    outcome: dict[str, Any] = {"exit_code": EXIT_DONE}
    try:
        _quiet()
        _train_here(work)
    except Stopped as stopped:
        outcome = {"exit_code": EXIT_STOPPED, "what": str(stopped)}
    except SteelError as error:
        outcome = {"exit_code": error.exit_code, "what": error.what, "where": error.where, "remedy": error.remedy}
    except Exception as error:
        dist.log.exception("rank %d failed", dist.rank())
        outcome = {"exit_code": TrainingError.exit_code, "what": f"{type(error).__name__}: {error}", "where": f"rank {dist.rank()}",
                   "remedy": "see the traceback above; the same command goes on from the last checkpoint"}  # fmt: skip
    file = work / _OUTCOMES / f"{dist.rank()}.json"
    aside = file.with_suffix(".tmp")
    try:
        aside.write_text(json.dumps(outcome, ensure_ascii=False), encoding="utf-8")
        aside.replace(file)
    except OSError as problem:  # a full disk, most likely: the terminal takes what it does not
        dist.log.error("rank %d: %s; and %s", dist.rank(), outcome, problem)
    return EXIT_DONE if outcome["exit_code"] == EXIT_STOPPED else int(outcome["exit_code"])


def _quiet() -> None:
    import torch

    from megatron_steel.train.engine import quiet_deepspeed

    quiet_deepspeed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

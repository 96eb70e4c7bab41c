"""Jobs under real launchers that the fault tests hurt and watch. A job's processes are known by its run folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from conftest import launcher, one_thread

INJECT = Path(__file__).with_name("inject")
ENDLESS = (
    "train.steps=100000",
    "train.save_every_steps=100000",
    "train.eval_every_steps=100000",
    "schedule.name=constant",
)
PATIENCE = 400  # seconds; a start takes 15 on two quiet cores


class Job:
    """A started job; use as a context, which kills what is left.

    Args:
        run: the run folder.
        supervised: by `megatron-steel launch`, else by the bare `deepspeed`.
        port: the bare launcher's rendezvous; any free one when left out.
        fault: (module, function, code) for `inject/sitecustomize.py`.
        nodes: of `multihost/nodes.py`, to run on under the supervisor.
    """

    def __init__(self, recipe, run, *overrides, supervised=False, fault=None, port=None, nodes=None):
        self.run = Path(run)
        if nodes:
            command = [sys.executable, "-m", "megatron_steel.cli", "launch", "--hostfile", str(nodes.hostfile)]
        elif supervised:
            command = [sys.executable, "-m", "megatron_steel.cli", "launch", "--num_gpus", "2"]
        else:
            start = launcher(2)
            command = [*(start if port is None else [*start[:-1], str(port)]), "--module", "megatron_steel.pretrain"]
        environment = one_thread()
        if fault:
            environment["FAULT"] = json.dumps(dict(zip(("module", "function", "code"), fault, strict=True)))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(INJECT), environment.get("PYTHONPATH")]))
        if nodes:  # they get their environment by DeepSpeed's file
            environment |= nodes.environment | {"DS_ENV_FILE": str(self.run.with_suffix(".env"))}
            self.run.with_suffix(".env").write_text(f"FAULT={environment.get('FAULT', 'null')}\n")
        self._log = self.run.with_suffix(".log").open("w+", encoding="utf-8")
        self.process = subprocess.Popen([*command, str(recipe), f"run.dir={run}", *overrides], env=environment,
                                        stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.alive():
            process.kill()
        self.process.kill()
        self.process.wait()
        self._log.close()

    def alive(self):
        """Every living process of the job, the one that was started included."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            if process.info["status"] != psutil.STATUS_ZOMBIE and f"run.dir={self.run}" in (
                process.info["cmdline"] or ()
            ):
                found.append(process)
        return found

    def ranks(self):
        """The ranks' processes, in order; empty until the launcher has started them."""
        found = {}
        for process in self.alive():
            words = process.info["cmdline"]
            local = [w for w in words if w.startswith("--local_rank=")]
            if local and "deepspeed.launcher.launch" not in words:
                found[int(local[0].split("=")[1])] = process
        return [found[rank] for rank in sorted(found)]

    def node_launcher(self):
        return self._one("deepspeed.launcher.launch")

    def runner(self):
        """`deepspeed` itself."""
        return self.node_launcher().parent()

    def _one(self, word):
        (found,) = [p for p in self.alive() if word in p.info["cmdline"]]
        return found

    def steps(self):
        """Steps that stand in the metrics, whole lines only."""
        file = self.run / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
        return [json.loads(line)["step"] for line in lines]

    def until(self, condition, what, seconds=PATIENCE):
        """Poll until `condition()` is true; returns the seconds it took."""
        begin = time.monotonic()
        while not condition():
            assert time.monotonic() - begin < seconds, f"{what}: not within {seconds} s\n{self.output()[-6000:]}"
            time.sleep(0.1)
        return time.monotonic() - begin

    def until_step(self, step):
        return self.until(
            lambda: self.process.poll() is not None or max(self.steps(), default=0) >= step, f"step {step}"
        )

    def until_said(self, text, seconds=PATIENCE):
        return self.until(lambda: text in self.output() or self.process.poll() is not None, text, seconds)

    def until_gone(self, name, seconds):
        """No process of the job lives; prints how long it took."""
        took = self.until(lambda: not self.alive(), f"{name}: all processes end", seconds)
        print(f"figure: {name}: 0 processes after {took:.1f} s")
        return took

    def end(self, seconds=PATIENCE):
        """Wait for the started process; returns its exit code."""
        self.until(lambda: self.process.poll() is not None, "the job ends", seconds)
        return self.process.returncode

    def output(self):
        return self.run.with_suffix(".log").read_text(encoding="utf-8", errors="replace")

    def checkpoints(self):
        return (
            sorted(p.name for p in (self.run / "checkpoints").glob("*")) if (self.run / "checkpoints").is_dir() else []
        )


def send(processes, number=signal.SIGTERM):
    for process in processes:
        process.send_signal(number)


def curve(rows):
    """What must be equal bitwise between two runs, by step."""
    keys = ("loss", "grad_norm", "lr", "tokens", "samples", "validation_loss")
    return {step: [row.get(k) for k in keys] for step, row in rows.items()}

"""A run with a small model in place of DeepSpeed, in child processes that can be killed wherever one likes.

As a program it imports torch once and forks a child for every job that it is told on stdin (`Stub` talks to it). The
child trains through the real order, loader, `state.save` and `state.find`; only the engine is a stand-in, with the
engine's calls. `Disk` numbers every write, open, sync, rename, mkdir and unlink of one save and ends the child at a
given number, as SIGKILL or as a power cut would.
"""

import contextlib
import copy
import ctypes
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LENGTH, BATCH, SEED, VOCABULARY = 16, 4, 5, 128
SAMPLES = 1_000_000  # planned; more than any test trains


class Stub:
    """The server's client, and a context manager: leaving it ends the server and what it still runs."""

    def __init__(self, root):
        self.root = Path(root)
        self.data = [str(self.root / name) for name in ("one", "two")]
        _write_data(self.data)
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._server.kill()
        self._server.wait()
        self._server.stdin.close()
        self._server.stdout.close()

    def below(self, name):
        """The same server, with a folder of its own."""
        other = copy.copy(self)
        other.root = self.root / name
        return other

    def start(self, folder, **job) -> int:
        """Start a child that trains in `folder`; returns its process id."""
        return self._ask({"do": "start", "folder": str(folder), "data": self.data, **job})

    def wait(self, pid) -> int:
        """Its exit code once it has ended; minus the signal's number."""
        return self._ask({"do": "wait", "pid": pid})

    def run(self, folder, expect=0, **job):
        found = self.wait(self.start(folder, **job))
        assert found == expect, (found, (Path(folder) / "log.txt").read_text()[-3000:])

    def start_ranks(self, folder, world, **job) -> list[int]:
        """As `start`, for the ranks of one run."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            place = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(listener.getsockname()[1]),
                "WORLD_SIZE": str(world),
            }
        return [
            self.start(folder, environment={**place, "RANK": str(r), "LOCAL_RANK": str(r)}, **job) for r in range(world)
        ]

    def _ask(self, message):
        self._server.stdin.write(json.dumps(message) + "\n")
        return json.loads(self._server.stdout.readline())


def curve(folder, rank=0) -> dict[int, list]:
    """step -> [loss, batch ids, weights] as hexadecimal text. A step that was done twice must have come out alike."""
    rows: dict[int, list] = {}
    for line in (Path(folder) / f"curve-{rank}.jsonl").read_text().splitlines():
        step, *row = json.loads(line)
        assert rows.setdefault(step, row) == row, f"step {step} came out differently"
    return rows


def starts(folder, rank=0) -> list[int]:
    """The step from which each attempt went on."""
    return [int(line) for line in (Path(folder) / f"starts-{rank}.txt").read_text().split()]


@contextlib.contextmanager
def fast_folder(tmp_path_factory):
    """A folder in memory where there is one: kills are about processes, and the disk may be slow and shared."""
    shared = Path("/dev/shm")
    if os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 2 << 30:
        with tempfile.TemporaryDirectory(dir=shared, prefix="steel-faults-") as folder:
            yield Path(folder)
    else:
        yield tmp_path_factory.mktemp("faults")


def _write_data(prefixes):
    """51 and 50 blocks: an epoch of 101 samples ends in the middle of a batch of 4."""
    import numpy as np

    from megatron_steel.data.indexed import IndexedWriter

    generator = np.random.default_rng(3)
    for prefix, blocks in zip(prefixes, (51, 50), strict=True):
        with IndexedWriter(prefix, np.uint16) as writer:
            left = (blocks + 1) * LENGTH + 3
            while left:
                count = min(left, int(generator.integers(5, 40)))
                writer.add_document(generator.integers(3, VOCABULARY, count).astype(np.uint16))
                left -= count


# ---- what runs in the child ---------------------------------------------------------------------------------------


class Engine:
    """What `state.save` asks of DeepSpeed's engine, around an embedding and a linear layer."""

    def __init__(self, rank, ballast, slow):
        import torch

        torch.manual_seed(SEED)
        self.rank, self.slow = rank, slow
        self.module = torch.nn.Sequential(
            torch.nn.Embedding(VOCABULARY, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, VOCABULARY)
        )
        self.ballast = torch.arange(ballast, dtype=torch.float32)  # makes a save last as long as wanted
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-2, foreach=False)
        self.checkpoint_engine = self
        self.param_names = {parameter: name for name, parameter in self.module.named_parameters()}

    def zero_optimization_stage(self):
        return 0

    def fp16_enabled(self):
        return False

    def save_checkpoint(self, folder, tag, client_state, save_latest):
        from megatron_steel import dist

        assert not save_latest
        Path(folder, tag).mkdir(parents=True, exist_ok=True)
        dist.barrier()
        if self.rank == 0:
            model = {"module": self.module.state_dict(), **client_state}
            self.checkpoint_engine.save(model, f"{folder}/{tag}/mp_rank_00_model_states.pt")
        time.sleep(self.slow)
        states = {"optimizer_state_dict": self.optimizer.state_dict(), "ballast": self.ballast}
        self.checkpoint_engine.save(states, f"{folder}/{tag}/zero_pp_rank_{self.rank}_mp_rank_00_optim_states.pt")
        self._copy_recovery_script(folder)
        dist.barrier()

    def save(self, state_dict, path):
        import torch

        whole = io.BytesIO()
        torch.save(state_dict, whole)
        cut = len(whole.getvalue()) // 3
        with open(path, "wb") as file:  # a Python file and three writes, so that `Disk` sees each
            for piece in (slice(0, cut), slice(cut, 2 * cut), slice(2 * cut, None)):
                file.write(whole.getbuffer()[piece])

    def _copy_recovery_script(self, folder):
        if self.rank == 0:
            Path(folder, "zero_to_fp32.py").write_text("print('stub')\n")

    def load_checkpoint(self, folder, tag):
        import torch

        model = torch.load(f"{folder}/{tag}/mp_rank_00_model_states.pt", weights_only=True)
        states = torch.load(f"{folder}/{tag}/zero_pp_rank_{self.rank}_mp_rank_00_optim_states.pt", weights_only=True)
        self.module.load_state_dict(model["module"])
        self.optimizer.load_state_dict(states["optimizer_state_dict"])
        assert torch.equal(states["ballast"], self.ballast)

    def step(self, batches, step):
        """One optimizer step over this rank's micro-batches. Returns the loss, summed over the ranks."""
        import torch

        from megatron_steel import dist

        torch.manual_seed(SEED * 1000 + step * 8 + self.rank)
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for batch in batches:
            logits = self.module(batch["input_ids"])
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        (total / (BATCH * LENGTH)).backward()
        if dist.world_size() > 1:
            for parameter in self.module.parameters():
                torch.distributed.all_reduce(parameter.grad)
        self.optimizer.step()
        return dist.sum_over_ranks([float(total.detach())])[0]

    def fingerprint(self):
        digest = hashlib.sha256()
        for parameter in self.module.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        return digest.hexdigest()[:16]


def run(job):
    """Go on from the newest whole checkpoint, or from `job["checkpoint"]`, to `job["steps"]`."""
    from megatron_steel import dist
    from megatron_steel.checkpoint import commit
    from megatron_steel.data.dataset import BlendedDataset
    from megatron_steel.data.indexed import IndexedDataset
    from megatron_steel.data.loader import Loader
    from megatron_steel.data.manifest import trust
    from megatron_steel.data.order_json import from_json
    from megatron_steel.data.segments import Member, plan
    from megatron_steel.train import lock, state

    dist.set_up_logging()
    if dist.world_size() > 1:
        dist.start()
    folder, rank = Path(job["folder"]), dist.rank()
    held = lock.take(folder) if dist.is_main() else None
    members = [Member(prefix, (m := trust(prefix)).digest, m.tokens, None) for prefix in job["data"]]
    checkpoint = commit.verify(Path(job["checkpoint"])) if "checkpoint" in job else state.find(folder / "checkpoints")
    before = from_json(checkpoint.manifest["order"], checkpoint.path) if checkpoint else None
    order = plan(before, members, LENGTH, BATCH, SAMPLES, SEED)
    engine = Engine(rank, job.get("ballast", 1000), job.get("slow", {}).get(str(rank), 0))
    begin = checkpoint.step if checkpoint else 0
    if checkpoint:
        engine.load_checkpoint(str(checkpoint.path), commit.ENGINE)
    _append(folder / f"starts-{rank}.txt", f"{begin}\n")
    dataset = BlendedDataset(order, {m.digest: IndexedDataset(m.prefix) for m in members})
    keep = job.get("keep_last", 2), job.get("keep_every")
    kill = job.get("kill", {})

    def save(step, tokens):
        progress = state.Progress(step, tokens, loader.state.to_json())
        path = state.save(engine, folder / "checkpoints", progress, {"parameters": 1}, [], *keep)
        state.wait_until_tidy()  # so that its operations are counted, too, and in one order
        return path

    saves = state.Saves(save)
    with Loader(dataset, order, BATCH, 2, rank, dist.world_size()) as loader:
        for step in range(begin + 1, job["steps"] + 1):
            time.sleep(job.get("pace", 0))
            batches = loader.step()
            ids = hashlib.sha256(b"".join(b["input_ids"].numpy().tobytes() for b in batches)).hexdigest()[:16]
            loss = engine.step(batches, step)
            _append(folder / f"curve-{rank}.jsonl", json.dumps([step, loss.hex(), ids, engine.fingerprint()]) + "\n")
            if step % job.get("save_every", 5) == 0 or step == job["steps"]:
                hurt = kill.get("step") == step and kill.get("rank", 0) == rank
                disk = Disk(folder / "checkpoints", **kill["how"]) if hurt else None
                _append(folder / "saves.txt", f"{step} begins\n")
                with disk or contextlib.nullcontext():
                    saves(step, step * BATCH * LENGTH, must=step == job["steps"])
                _append(folder / "saves.txt", f"{step} is over\n")
                if disk:
                    (folder / "operations.json").write_text(json.dumps(disk.done))
    del held


def _append(path, text):
    with open(path, "ab", buffering=0) as file:  # one write: a kill never leaves half a line
        file.write(text.encode())


class Disk:
    """Numbers the operations on files below a folder while it is entered.

    Args:
        at: the operation that is not done any more (of a write, half is); 0: none.
        power: also lose what was not synced: the second half of every file, and renames when `"renames"`.
        fails: the error number that operation `at` raises instead of dying; `times` in all.
    """

    def __init__(self, folder, at=0, power=None, fails=None, times=1):
        self.folder, self.at, self.power, self.fails, self.times = str(folder), at, power, fails, times
        self.done: list[str] = []
        self._unsynced: set[str] = set()
        self._renames: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._saved: list[tuple] = []

    def __enter__(self):
        import builtins

        for name in ("mkdir", "unlink", "rmdir"):
            self._wrap(os, name, self._plain(name, getattr(os, name)))
        for name in ("rename", "replace"):
            self._wrap(os, name, self._rename(getattr(os, name)))
        self._wrap(os, "fsync", self._fsync(os.fsync))
        opened = self._open(io.open)
        self._wrap(io, "open", opened)
        self._wrap(builtins, "open", opened)
        return self

    def __exit__(self, *exception):
        for place, name, before in reversed(self._saved):
            setattr(place, name, before)

    def _wrap(self, place, name, function):
        self._saved.append((place, name, getattr(place, name)))
        setattr(place, name, function)

    def count(self, what, half=lambda: None):
        """One more operation is about to be done."""
        with self._lock:
            self.done.append(what)
            if not self.at or not self.at <= len(self.done) < self.at + self.times:
                return
            if self.fails:
                raise OSError(self.fails, os.strerror(self.fails), what)
            half()
            self._cut_power()
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    def _cut_power(self):
        if not self.power:
            return
        for path in self._unsynced:
            with contextlib.suppress(OSError):
                os.truncate(path, os.path.getsize(path) // 2)
        if self.power == "renames":
            renamed = next(before for place, name, before in self._saved if name == "rename")
            for old, new in reversed(self._renames):
                with contextlib.suppress(OSError):
                    renamed(new, old)

    def _is_ours(self, path):
        return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.folder)

    def _plain(self, name, function):
        def call(path, *arguments, **named):
            if self._is_ours(path) or "dir_fd" in named:
                self.count(f"{name} {os.path.basename(os.fspath(path))}")
            return function(path, *arguments, **named)

        return call

    def _rename(self, function):
        def call(old, new, *arguments, **named):
            if self._is_ours(old):
                self.count(f"rename {os.path.basename(old)} {os.path.basename(new)}")
                self._renames.append((os.fspath(old), os.fspath(new)))
                self._unsynced = {p.replace(f"{os.fspath(old)}/", f"{os.fspath(new)}/") for p in self._unsynced}
            return function(old, new, *arguments, **named)

        return call

    def _fsync(self, function):
        def call(descriptor):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if self._is_ours(path):
                self.count(f"fsync {os.path.basename(path)}")
            function(descriptor)
            self._unsynced.discard(path)
            self._renames = [pair for pair in self._renames if os.path.dirname(pair[1]) != path]

        return call

    def _open(self, function):
        def call(path, mode="r", *arguments, **named):
            if not self._is_ours(path) or not set(mode) & set("wax+"):
                return function(path, mode, *arguments, **named)
            self.count(f"open {os.path.basename(path)}")
            self._unsynced.add(os.fspath(path))
            return _Torn(self, function(path, mode, *arguments, **named), os.path.basename(path))

        return call


class _Torn:
    """A file whose writes are counted; it has no number, so that nobody writes past it."""

    def __init__(self, disk, file, name):
        self._disk, self._file, self._name = disk, file, name

    def write(self, data):
        def half():
            self._file.write(bytes(data)[: len(data) // 2] if not isinstance(data, str) else data[: len(data) // 2])
            self._file.flush()

        self._disk.count(f"write {self._name}", half)
        return self._file.write(data)

    def flush(self):
        self._file.flush()

    def close(self):
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()


def _serve():
    import torch

    import megatron_steel.data.loader
    import megatron_steel.data.manifest
    import megatron_steel.train.state

    torch.set_num_threads(1)
    warm = Engine(0, 1, 0)  # the first step and the first save import a lot
    for parameter in warm.module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    warm.optimizer.step()
    torch.save(warm.optimizer.state_dict(), io.BytesIO())
    megatron_steel.train.state.versions()
    for line in sys.stdin:
        message = json.loads(line)
        answer = (
            _start(message) if message["do"] == "start" else os.waitstatus_to_exitcode(os.waitpid(message["pid"], 0)[1])
        )
        print(json.dumps(answer), flush=True)


def _start(job) -> int:
    Path(job["folder"]).mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the server
    os.environ.update(job.get("environment", {}))
    log = os.open(f"{job['folder']}/log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, number in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, number)
    from megatron_steel import dist

    if "largest_file" in job:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], job["largest_file"]))
    os._exit(dist.exit_code(lambda: run(job)))


if __name__ == "__main__":
    _serve()

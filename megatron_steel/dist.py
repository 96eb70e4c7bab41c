"""Ranks: who am I, wait for each other, add numbers up, fail together.

The only module that reads the launcher's rank variables. A process started without a launcher is rank 0 of 1.
Control messages travel over a gloo group on the CPU, so that asking "has any rank been told to stop?" never
waits for the GPU. Knows nothing of models, data or DeepSpeed.
"""

import atexit
import datetime
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_steel.errors import EXIT_DONE, EXIT_INTERNAL, SteelError, Stopped, StoppedEarly, TrainingError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("megatron_steel")
T = TypeVar("T")
_TIMEOUT = datetime.timedelta(minutes=30)
_PATIENCE = datetime.timedelta(days=2)  # control messages wait while one rank scans terabytes or hashes a checkpoint
_control: list[Any] = []  # the gloo group, once `start` has made it


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def ranks_on_node() -> int:
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or world_size())


def is_first_of_node() -> bool:
    return local_rank() == 0


def several_nodes() -> bool:
    return world_size() > ranks_on_node()


def is_main() -> bool:
    return rank() == 0


def start() -> "torch.device":
    """Join the process group (NCCL on GPUs, gloo on CPUs) and return this rank's device.

    The group lasts until the process ends: DeepSpeed keeps references to it and cannot start twice on two groups.
    """
    import torch

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank())
    if not torch.distributed.is_initialized():
        # A store in memory needs no port, so that one process starts anywhere, also twice.
        alone: dict[str, Any] = (
            {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1} if world_size() == 1 else {}
        )
        atexit.register(_leave)
        try:
            torch.distributed.init_process_group("nccl" if gpu else "gloo", timeout=_TIMEOUT, **alone)
        except torch.distributed.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            where = f"MASTER_PORT={os.environ.get('MASTER_PORT')}"
            remedy = "give the launcher another --master_port (megatron-steel launch finds a free one)"
            raise TrainingError("the port where the ranks shall meet is in use", where, remedy) from None
    if not gpu and "OMP_NUM_THREADS" not in os.environ:
        # Ranks of one machine share its cores; torch alone would give every rank all of them.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_on_node()))
    for name in ("RANK", "LOCAL_RANK"):
        os.environ.setdefault(name, "0")  # DeepSpeed reads them even where no launcher set them
    os.environ.setdefault("WORLD_SIZE", "1")
    if not _control:
        _control.append(torch.distributed.new_group(backend="gloo", timeout=_PATIENCE))
    return torch.device("cuda", local_rank()) if gpu else torch.device("cpu")


def _leave() -> None:
    import torch

    _control.clear()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        import torch

        torch.distributed.barrier(group=_control[0])


def sum_over_ranks(values: list[float]) -> list[float]:
    """Add float64 numbers up over the ranks (CPU, exact order of ranks does not matter to the caller)."""
    return _reduce(values, "SUM")


def max_over_ranks(values: list[float]) -> list[float]:
    """The largest of each number over the ranks."""
    return _reduce(values, "MAX")


def any_rank(flag: bool) -> bool:
    """True on every rank when it is true on one."""
    return max_over_ranks([float(flag)])[0] > 0


def _reduce(values: list[float], how: str) -> list[float]:
    if world_size() == 1:
        return list(values)
    import torch

    tensor = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(tensor, op=getattr(torch.distributed.ReduceOp, how), group=_control[0])
    return tensor.tolist()


def gather(value: T) -> list[T]:
    """Every rank's value, in order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    import torch

    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value, group=_control[0])
    return values


def together(action: Callable[[], T], only: bool = True) -> T | None:
    """Run `action` where `only` holds; wait for all; if one rank failed with a SteelError, all raise it.

    A rank that left alone would make the launcher kill the others in the middle of what they do.
    """
    result: T | None = None
    problem: SteelError | None = None
    if only:
        try:
            result = action()
        except SteelError as error:
            problem = error
            if several_nodes() and not error.shared:  # the same path may be another file there
                error.where += f" on {socket.gethostname()}"
        except Exception as error:
            log.exception("rank %d failed", rank())
            problem = TrainingError(f"{type(error).__name__}: {error}", f"rank {rank()}", "see the traceback above")
    problems = [p for p in gather(problem) if p is not None]
    if problems:
        raise shared(problems[0])
    return result


def shared(problem: SteelError) -> SteelError:
    """Mark an error that every rank raises alike, so that it is told once and the ranks leave together."""
    problem.shared = True
    return problem


def exit_code(action: Callable[[], object]) -> int:
    """Run a command and turn its end into an exit code; an error that all ranks share is told once.

    Where stdout's reader left early (`| head`) it ends without a word, with the code that a shell gives such a command.
    """
    try:
        action()
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where it can still be answered
    except SteelError as error:
        if not error.shared or is_main():
            log.error("error: %s", error)
        return error.exit_code
    except (Stopped, StoppedEarly) as stopped:
        log.info("%s", stopped)
        return stopped.exit_code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered is flushed at the end
            return 128 + signal.SIGPIPE
        log.exception("this is a bug, or something this program does not know; please report it with the lines below")
        return EXIT_INTERNAL
    return EXIT_DONE


def _reader_is_gone() -> bool:
    """Whether it is stdout that broke, not a pipe to another process."""
    stdout = select.poll()
    stdout.register(1, 0)
    return any(event & select.POLLERR for _, event in stdout.poll(0))


def set_up_logging() -> None:
    """One line per message on stderr, from rank 0 alone; other ranks speak only to warn."""
    handler = logging.StreamHandler()
    mark = "" if world_size() == 1 or is_main() else f"[rank {rank()}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {mark}%(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if is_main() else logging.WARNING)

"""Run one function over many items in worker processes; results come in the order of the items.

Fresh processes (spawn): a fork of a process with threads may hang. At most two items a worker are under way, so a
slow reader holds the workers back. Workers end when their parent does, however it ends. Knows nothing of data.
"""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from megatron_steel.errors import SteelError

T = TypeVar("T")
_state: list[Any] = []  # in a worker: what `prepare` made there, once


class WorkerDied(SteelError):  # noqa: N818  (it says what happened)
    """A worker process ended without an answer; what others finished is good."""


def cpus() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    work: Callable[[Any, Any], T], items: Iterable[Any], workers: int, prepare: Callable[[Any], Any], argument: Any
) -> Generator[T, None, None]:
    """Yield `work(item, prepare(argument))` for each item; `prepare` runs once in each process.

    Closing it waits for the items under way. Raises what `work` raises, and `WorkerDied` when a process does.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(prepare, argument))
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_call, work, item))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        what = "a worker process died (killed, perhaps for memory)"
        raise WorkerDied(what, f"{workers} worker processes", "repeat with fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(prepare: Callable[[Any], Any], argument: Any) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _state[:] = [prepare(argument)]


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _call(work: Callable[[Any, Any], T], item: Any) -> T:
    return work(item, _state[0])

"""One check: a number beside its tolerance.

A check that raises has failed; one whose part is not installed did not run, with the reason; neither passes.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Check:
    name: str
    status: str
    """pass, fail, not run, or peer: another project's figure, which decides nothing here"""
    measured: float | None
    tolerance: float | None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(name: str, measured: float, tolerance: float) -> Check:
    """Pass where measured <= tolerance; a NaN fails."""
    return Check(name, "pass" if measured <= tolerance else "fail", measured, tolerance)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the twin `b`."""
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm() / b.norm())


def guarded(name: str, check: Callable[..., Iterator[Check]], *arguments: Any) -> Iterator[Check]:
    """The checks of `check`; what it raises is a failed one."""
    try:
        yield from check(*arguments)
    except Exception as error:
        yield failed(name, error)
    finally:
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()


def failed(name: str, error: Exception) -> Check:
    return Check(name, "fail", None, None, f"{type(error).__name__}: {str(error)[:300]}")

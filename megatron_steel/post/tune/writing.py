"""A disk that takes no more, said as what it is: weights and checkpoints are written by libraries with errors of their own.

Must not know what is written.
"""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from megatron_steel.errors import SteelError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TORCH = ("PytorchStreamWriter", "inline_container", "iostream")  # in torch.save's RuntimeError


@contextlib.contextmanager
def writing(place: str | Path, whole: bool = True) -> Iterator[None]:
    """Raise SteelError where a block cannot write to `place`.

    Args:
        whole: the block does nothing but write; else only a full disk is taken for that.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        torch_says = isinstance(error, RuntimeError) and any(word in str(error) for word in _TORCH)
        if not (full or (whole and (torch_says or not isinstance(error, RuntimeError)))):
            raise
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise SteelError(f"cannot write: {what}", place,
                         "make room, or mend it; the same command goes on from the last whole checkpoint") from error  # fmt: skip

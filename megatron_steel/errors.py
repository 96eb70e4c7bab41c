"""What can go wrong, said once: what happened, where, and what to do; and the exit codes.

Knows nothing else of the project. Everything a user can cause is a `SteelError`; anything else that
escapes is a bug of ours and exits with `EXIT_INTERNAL`.
"""

EXIT_DONE = 0
EXIT_INTERNAL = 70  # a bug of ours, or numbers that stopped being numbers
EXIT_STOPPED = 75  # stopped on request after a save: start the same command again (SLURM: requeue)
EXIT_BAD_INPUT = 78  # bad configuration or data: starting again cannot help


class SteelError(Exception):
    """A problem the user can mend.

    Args:
        what: what is wrong, in one sentence.
        where: the file, key or place it was found in.
        remedy: what to do about it.
    """

    exit_code = EXIT_BAD_INPUT
    shared = False  # raised on every rank alike: one of them tells it

    def __init__(self, what: str, where: object, remedy: str):
        super().__init__(what, str(where), remedy)
        self.what, self.where, self.remedy = what, str(where), remedy

    def __reduce__(self) -> tuple:
        return type(self), (self.what, self.where, self.remedy)  # errors travel between ranks

    def __str__(self) -> str:
        return f"{self.what}\n  where: {self.where}\n  do:    {self.remedy}"


class TrainingError(SteelError):
    """The run itself failed (out of memory, non-finite numbers); the input may be fine."""

    exit_code = EXIT_INTERNAL


class Stopped(Exception):  # noqa: N818  (it is a request that was obeyed, not an error)
    """The run was asked to stop, has saved, and every rank leaves together with `EXIT_STOPPED`."""

    exit_code = EXIT_STOPPED


class StoppedEarly(BaseException):  # no `except Exception` on its way may take it for a failure
    """A stop asked for before the first step: nothing to save, so this rank leaves without waiting for the others."""

    exit_code = EXIT_STOPPED

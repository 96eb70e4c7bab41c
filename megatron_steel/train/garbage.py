"""Python's garbage collector, held off the steps.

Left alone it stops a rank for up to half a second at a moment of its own choosing, and with it every rank that waits for
that one in the next exchange. Here all ranks collect after the same steps: where a save or an evaluation has made a
pause anyway, else every `EVERY_STEPS`. Tensors go when their last reference goes, as ever; what waits is cycles alone.
"""

import gc

EVERY_STEPS = 100


class Garbage:
    """A context around the steps; leaving it, however, puts the collector back as it was."""

    def __enter__(self) -> "Garbage":
        self._was_on, self._frozen, self._steps = gc.isenabled(), False, 0
        return self

    def after_step(self, paused: bool) -> None:
        """Between two steps; `paused`: it was saved or evaluated.

        The first call takes everything that the first step has built out of all later collections.
        """
        self._steps += 1
        if self._frozen and not paused and self._steps < EVERY_STEPS:
            return
        gc.collect()
        self._steps = 0
        if not self._frozen:
            gc.freeze()
            gc.disable()
            self._frozen = True

    def __exit__(self, *exception: object) -> None:
        if self._frozen:
            gc.unfreeze()
        if self._was_on:
            gc.enable()

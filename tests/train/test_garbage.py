"""The collector is off between two pauses, and as it was before afterwards, also where a step raises."""

import gc
import weakref

import pytest

from megatron_steel.train.garbage import EVERY_STEPS, Garbage


class _Knot:
    def __init__(self):
        self.itself = self


@pytest.fixture(autouse=True)
def collector():
    assert gc.isenabled()
    yield
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def _dead_knot():
    return weakref.ref(_Knot())


def test_cycles_wait_for_a_pause_or_for_so_many_steps():
    with Garbage() as garbage:
        assert gc.isenabled()  # the first step builds, and is followed by a collection
        garbage.after_step(paused=False)
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
        knot = _dead_knot()
        for _ in range(EVERY_STEPS - 1):
            garbage.after_step(paused=False)
        assert knot() is not None
        garbage.after_step(paused=False)
        assert knot() is None
        knot = _dead_knot()
        garbage.after_step(paused=True)
        assert knot() is None


def test_it_is_put_back_where_a_step_raises():
    def steps():
        with Garbage() as garbage:
            garbage.after_step(paused=False)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        steps()


def test_one_that_was_off_stays_off():
    gc.disable()
    with Garbage() as garbage:
        garbage.after_step(paused=False)
    assert not gc.isenabled()
    gc.enable()

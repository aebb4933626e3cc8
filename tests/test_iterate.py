"""The one loop: every way it can end."""

import math

import numpy as np
import pytest

from lowrank_sp import Record, Stop, iterate


def halve(x):
    return x / 2, x / 2


class Unreadable:
    def __float__(self):
        raise AssertionError("the change was read")


def run(step=halve, state=1.0, *, stop=None, **kwargs):
    return iterate(step, state, stop=stop or Stop(), dtype=np.float64, **kwargs)


def test_converges():
    solution = run(stop=Stop(tol=1e-3))
    assert solution.converged is True
    assert solution.n_iter == 10
    assert solution.value == 2.0**-10
    assert solution.reason == "change 9.8e-04 <= tol 1.0e-03 after 10 steps"


def test_automatic_tolerance_is_of_the_dtype():
    for dtype in (np.float32, np.float64, np.complex64):
        solution = iterate(halve, 1.0, stop=Stop(), dtype=dtype)
        assert solution.converged
        tol = 4 * math.sqrt(np.finfo(dtype).eps)
        assert solution.value <= tol < 2 * solution.value


def test_history_is_what_was_monitored():
    solution = run(stop=Stop(max_iter=4, tol=0.0))
    assert all(isinstance(record, Record) for record in solution.history)
    assert [record.step for record in solution.history] == [1, 2, 3, 4]
    assert [record.change for record in solution.history] == [0.5, 0.25, 0.125, 0.0625]
    seconds = [record.seconds for record in solution.history]
    assert seconds == sorted(seconds)
    assert seconds[0] >= 0


def test_max_iter():
    solution = run(stop=Stop(max_iter=3, tol=0.0))
    assert solution.converged is False
    assert solution.n_iter == 3
    assert solution.reason == "max_iter = 3 reached, change 1.2e-01"


def test_no_steps():
    solution = run(stop=Stop(max_iter=0))
    assert (solution.value, solution.converged, solution.n_iter) == (1.0, False, 0)
    assert solution.reason == "max_iter = 0 reached"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_divergence_returns_the_last_good_state(bad):
    def step(x):
        return (x + 1, 1.0) if x < 3 else (math.nan, bad)

    solution = run(step, 0)
    assert solution.value == 3
    assert solution.converged is False
    assert solution.n_iter == len(solution.history) == 3
    assert solution.reason == f"diverged in step 4: change is {bad}"


def test_callback_sees_every_step_and_stops():
    seen = []

    def callback(k, change, value):
        seen.append((k, change, value))
        return k == 2

    solution = run(callback=callback, value=lambda x: -x)
    assert seen == [(1, 0.5, -0.5), (2, 0.25, -0.25)]
    assert solution.value == -0.25
    assert solution.converged is False
    assert solution.reason == "stopped by the callback at step 2"


def test_without_tolerance_the_change_is_never_read():
    solution = run(lambda x: (x + 1, Unreadable()), 0, stop=Stop(max_iter=5, tol=None))
    assert solution.value == 5
    assert solution.converged is None
    assert solution.reason == "max_iter = 5 reached"
    assert all(math.isnan(record.change) for record in solution.history)


def test_unreadable_change_can_fail():
    with pytest.raises(AssertionError, match="the change was read"):
        run(lambda x: (x + 1, Unreadable()), 0)


def test_interrupt_keeps_the_last_full_step():
    def step(x):
        if x == 4:
            raise KeyboardInterrupt
        return x + 1, 1.0

    solution = run(step, 0)
    assert solution.value == 4
    assert solution.converged is False
    assert solution.reason == "interrupted in step 5"


def test_errors_of_a_step_are_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        run(lambda x: (x, 1 / 0))


def test_seconds():
    solution = run(lambda x: (x + 1, 1.0), 0, stop=Stop(seconds=0.0, max_iter=10**6))
    assert solution.converged is False
    assert solution.n_iter < 100
    assert solution.reason == f"out of time after {solution.n_iter} steps"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_iter": -1}, "max_iter must be at least 0, got -1"),
        ({"tol": -1e-3}, "tol must be at least 0, got -0.001; use None to disable it"),
        ({"tol": math.nan}, "tol must be at least 0, got nan"),
    ],
)
def test_bad_rules(options, text):
    with pytest.raises(ValueError, match=text):
        Stop(**options)

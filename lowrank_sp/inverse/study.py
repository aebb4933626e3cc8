"""Studies of solvers on problems with known truth: where they recover, and how fast."""

from __future__ import annotations

import csv
import itertools
import math
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp.iterate import Solution
from lowrank_sp.tasks import Executor, run
from lowrank_sp.testing import relative_error

#: A row of a table: what was run, and what came out. ``pandas.DataFrame(records)`` reads a list.
Record = dict[str, Any]
# Trials in work at a time: enough for large pools, and their problems are made where they run.
_AHEAD = 256


def truth_error(problem: Any, value: Any) -> float:
    """``relative_error(value, problem.truth)``, of the low-rank part of a decomposition."""
    return relative_error(getattr(value, "low_rank", value), problem.truth)


def phase_transition(
    make_problem: Callable[..., Any],
    solvers: Mapping[str, Callable[[Any], Solution]],
    grid: Mapping[str, Sequence[Any]],
    trials: int,
    executor: Executor | None = None,
    rng: int = 0,
    *,
    error: Callable[[Any, Any], float] = truth_error,
    path: str | Path | None = None,
    callback: Callable[[Record, int, int], Any] | None = None,
) -> list[Record]:
    """Solve random problems at every point of a grid, some times over, by every solver.

    Parameters
    ----------
    make_problem : callable
        ``make_problem(rng=Generator, **point)``, such as
        :func:`~lowrank_sp.inverse.synthetic.completion` with other arguments fixed by
        :func:`functools.partial`.
    solvers : mapping from name to callable
        ``solver(problem)`` returns a :class:`~lowrank_sp.iterate.Solution`.
    grid : mapping from parameter to values
        Numbers or strings; all combinations are points.
    trials : int
        Problems a point. All solvers get the same ones.
    executor : Executor, optional
        Any with ``submit``, as of :mod:`concurrent.futures` or Dask. Processes need functions that
        can be pickled: ``def`` at the top of a module, not ``lambda``.
    rng : int
        A problem depends on it, the point and the number of the trial, and on nothing else: grids
        and trials may grow later.
    error : callable
        ``error(problem, value)``; by default the relative error to ``problem.truth``.
    path : path, optional
        A CSV file to which every trial is added as soon as it is done. What it holds already is not
        run again, so that an interrupted study goes on where it was.
    callback : callable, optional
        Called as ``callback(record, done, total)`` after every record that was run.

    Returns
    -------
    list of dict
        Keys ``solver``, the parameters, ``trial``, ``error``, ``seconds``, ``n_iter``,
        ``converged`` and ``reason``. A problem that cannot be made or a solver that refuses it, by
        ``ValueError`` or ``ArithmeticError``, has the error NaN and its message as the reason.

    Examples
    --------
    >>> from functools import partial
    >>> from lowrank_sp.inverse import robust, synthetic
    >>> def projections(p):
    ...     return robust.alternating_projections(p.data, rank=p.rank, rng=0)
    >>> records = phase_transition(
    ...     partial(synthetic.robust, shape=(60, 50), rank=2),
    ...     {"projections": projections},
    ...     {"outliers": [0.1, 0.9]},
    ...     trials=2,
    ... )
    >>> [(r["outliers"], r["trial"], r["error"] < 1e-6) for r in records]
    [(0.1, 0, True), (0.1, 1, True), (0.9, 0, False), (0.9, 1, False)]
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    columns = ["solver", *grid, "trial", *_Outcome._fields]
    if len(set(columns)) < len(columns):
        raise ValueError(f"parameters must not be called like a column of the records: {columns}")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]

    def key(record: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(record[name]) for name in columns[: len(grid) + 2])

    known = {key(r): r for r in (load_records(path) if path is not None else [])}
    wanted: list[Record] = [
        {"solver": name, **point, "trial": trial}
        for point in points
        for trial in range(trials)
        for name in solvers
    ]
    tasks = []
    for (_, trial), group in itertools.groupby(
        (r for r in wanted if key(r) not in known), lambda r: (key(r)[1:], r["trial"])
    ):
        rows = list(group)
        point = {name: rows[0][name] for name in grid}
        tasks.append(_Task(point, trial, [r["solver"] for r in rows]))
    total = sum(len(task.solvers) for task in tasks)
    done = itertools.count(1)
    work = partial(_solve, make_problem, dict(solvers), rng, error)
    for task, outcomes in zip(tasks, run(work, tasks, executor, _AHEAD), strict=True):
        fresh = [
            {"solver": name, **task.point, "trial": task.trial, **outcome._asdict()}
            for name, outcome in zip(task.solvers, outcomes, strict=True)
        ]
        known.update((key(r), r) for r in fresh)
        if path is not None:
            save_records(fresh, path, append=True)
        for record in fresh:
            if callback is not None:
                callback(record, next(done), total)
    return [known[key(r)] for r in wanted]


def compare(
    problem: Any,
    solvers: Mapping[str, Callable[..., Solution]],
    *,
    error: Callable[[Any, Any], float] = truth_error,
) -> list[Record]:
    """Error of every iterate of every solver, against steps and seconds.

    Parameters
    ----------
    problem
        Has the attribute ``truth``, unless ``error`` does without.
    solvers : mapping from name to callable
        ``solver(problem, callback=...)`` passes the callback on. Solvers must be deterministic,
        that is, have their ``rng`` fixed: each runs twice, once undisturbed for its times, and once
        for its errors.
    error : callable
        ``error(problem, value)``.

    Returns
    -------
    list of dict
        Keys ``solver``, ``step``, ``seconds``, ``change`` and ``error``.

    Examples
    --------
    >>> from lowrank_sp.inverse import robust, synthetic
    >>> p = synthetic.robust(shape=(60, 50), rank=2, rng=0)
    >>> def projections(p, callback=None):
    ...     return robust.alternating_projections(p.data, rank=p.rank, rng=0, callback=callback)
    >>> records = compare(p, {"projections": projections})
    >>> records[-1]["error"] < 1e-6 < records[0]["error"]
    True
    """
    records = []
    for name, solver in solvers.items():
        errors: list[float] = []

        def see(_k: int, _change: float, value: Any, errors: list[float] = errors) -> None:
            errors.append(error(problem, value))

        undisturbed = solver(problem, callback=None)
        solver(problem, callback=see)
        records += [
            {"solver": name, **step._asdict(), "error": e}
            for step, e in zip(undisturbed.history, errors, strict=False)
        ]
    return records


def success_rate(
    records: Iterable[Mapping[str, Any]], by: Sequence[str], tol: float = 1e-6
) -> list[Record]:
    """Share of the records with an error of at most ``tol``, for all values of some columns.

    Parameters
    ----------
    records : iterable of dict
        As :func:`phase_transition` returns them.
    by : sequence of str
        Columns.
    tol : float

    Returns
    -------
    list of dict
        The columns, ``trials`` and ``success``, in the order of first appearance.

    Examples
    --------
    >>> records = [{"rank": 1, "error": 1e-9}, {"rank": 1, "error": 0.1}]
    >>> success_rate(records, ["rank"])
    [{'rank': 1, 'trials': 2, 'success': 0.5}]
    """
    hits: dict[tuple, list[bool]] = {}
    for r in records:
        hits.setdefault(tuple(r[name] for name in by), []).append(r["error"] <= tol)
    return [
        {**dict(zip(by, point, strict=True)), "trials": len(h), "success": sum(h) / len(h)}
        for point, h in hits.items()
    ]


def save_records(records: Sequence[Record], path: str | Path, *, append: bool = False) -> None:
    """Write records, all with the same keys, to a CSV file; or add them to one that has these."""
    path = Path(path)
    if not records:
        return
    columns = list(records[0])
    text = path.read_text(encoding="utf-8") if append and path.exists() else ""
    if text:
        found = next(csv.reader(text.splitlines()))
        if found != columns:
            raise ValueError(f"{path} has the columns {found}, not {columns}; choose another path")
    with path.open("a" if append else "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if not text:
            writer.writeheader()
        elif not text.endswith("\n"):
            file.write("\r\n")
        writer.writerows(records)


def load_records(path: str | Path) -> list[Record]:
    """Records of a CSV file, with numbers and truth values as such; none if there is no file.

    A last line that was cut off when the process that wrote it ended is left out.
    """
    path = Path(path)
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{k: _parsed(v) for k, v in row.items()} for row in rows if None not in row.values()]


class _Outcome(NamedTuple):
    error: float
    seconds: float
    n_iter: int
    converged: bool | None
    reason: str


class _Task(NamedTuple):
    point: dict[str, Any]
    trial: int
    solvers: list[str]


def _solve(
    make_problem: Callable[..., Any],
    solvers: Mapping[str, Callable[[Any], Solution]],
    seed: int,
    error: Callable[[Any, Any], float],
    task: _Task,
) -> list[_Outcome]:
    """What becomes of one problem in the hands of every solver."""
    # Of the values alone: the place of a point in the grid does not matter.
    place = zlib.crc32(repr(sorted((k, str(v)) for k, v in task.point.items())).encode())
    generator = np.random.default_rng([seed, task.trial, place])
    try:
        problem = make_problem(rng=generator, **task.point)
    except (ValueError, ArithmeticError) as reason:
        refusal = _refused(reason, 0.0)
        return [refusal] * len(task.solvers)
    outcomes = []
    for name in task.solvers:
        start = time.perf_counter()
        try:
            solution = solvers[name](problem)
        except (ValueError, ArithmeticError) as reason:
            outcomes.append(_refused(reason, time.perf_counter() - start))
            continue
        seconds = time.perf_counter() - start
        outcomes.append(
            _Outcome(
                float(error(problem, solution.value)),
                seconds,
                solution.n_iter,
                solution.converged,
                solution.reason,
            )
        )
    return outcomes


def _refused(reason: Exception, seconds: float) -> _Outcome:
    return _Outcome(math.nan, seconds, 0, False, f"{type(reason).__name__}: {reason}")


def _parsed(text: str) -> Any:
    constants = {"True": True, "False": False, "": None}
    if text in constants:
        return constants[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

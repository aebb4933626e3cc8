"""Studies: what records hold, that they resume, and that they do not depend on the order."""

import math
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytest

import lowrank_sp as lr
from lowrank_sp.inverse import robust, study, synthetic

GRID = {"outliers": [0.05, 0.8], "rank": [1, 2]}
make_problem = partial(synthetic.robust, shape=(60, 50))


def projections(p, callback=None):
    return robust.alternating_projections(p.data, rank=p.rank, rng=0, callback=callback)


def pursuit(p, callback=None):
    return robust.principal_component_pursuit(
        p.data, rng=0, stop=lr.Stop(max_iter=100), callback=callback
    )


SOLVERS = {"projections": projections, "pursuit": pursuit}


def timeless(records):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def test_records():
    records = study.phase_transition(make_problem, SOLVERS, GRID, trials=3)
    assert len(records) == 2 * 2 * 3 * 2
    assert list(records[0]) == [
        *("solver", "outliers", "rank", "trial"),
        *("error", "seconds", "n_iter", "converged", "reason"),
    ]
    assert [(r["outliers"], r["rank"], r["trial"], r["solver"]) for r in records] == [
        (outliers, rank, trial, name)
        for outliers in GRID["outliers"]
        for rank in GRID["rank"]
        for trial in range(3)
        for name in SOLVERS
    ]
    rates = study.success_rate(records, ["outliers", "solver"])
    assert [(r["outliers"], r["trials"]) for r in rates] == [
        (0.05, 6),
        (0.05, 6),
        (0.8, 6),
        (0.8, 6),
    ]
    assert rates[0]["success"] == rates[1]["success"] == 1.0
    assert rates[2]["success"] == rates[3]["success"] == 0.0
    assert all(r["seconds"] > 0 and r["n_iter"] > 0 for r in records)
    assert not any(r["converged"] for r in records if r["outliers"] == 0.8)


def test_problems_depend_on_seed_point_and_trial_alone():
    whole = study.phase_transition(make_problem, SOLVERS, GRID, trials=2)
    part = study.phase_transition(
        make_problem, {"pursuit": pursuit}, {"rank": [2], "outliers": [0.05]}, trials=1
    )
    (same,) = [
        r
        for r in timeless(whole)
        if (r["solver"], r["rank"], r["outliers"], r["trial"]) == ("pursuit", 2, 0.05, 0)
    ]
    assert timeless(part) == [same]
    assert len({r["error"] for r in whole}) == len(whole)
    other = study.phase_transition(make_problem, SOLVERS, GRID, trials=2, rng=1)
    assert not {r["error"] for r in other} & {r["error"] for r in whole}


def test_every_problem_has_draws_of_its_own():
    def draw(rng, **point):
        return (*point.values(), rng.random())

    def solve(problem):
        return lr.Solution(problem, True, "", 0, ())

    records = study.phase_transition(
        draw,
        {"one": solve, "two": solve},
        {"a": [1, 2, 3], "b": ["x", "y"]},
        trials=4,
        error=lambda problem, _: problem[-1],
    )
    assert len({r["error"] for r in records}) == 3 * 2 * 4
    for one, two in zip(records[::2], records[1::2], strict=True):
        assert (one["solver"], two["solver"]) == ("one", "two")
        assert one["error"] == two["error"]


@pytest.mark.parametrize(
    "pool",
    [
        partial(ThreadPoolExecutor, 3),
        partial(ProcessPoolExecutor, 2, mp_context=get_context("spawn")),
    ],
    ids=["threads", "processes"],
)
def test_executors_change_nothing(pool):
    alone = study.phase_transition(make_problem, SOLVERS, GRID, trials=2)
    with pool() as executor:
        together = study.phase_transition(make_problem, SOLVERS, GRID, trials=2, executor=executor)
    assert timeless(alone) == timeless(together)


def test_resumes(tmp_path):
    path = tmp_path / "study.csv"
    whole = study.phase_transition(make_problem, SOLVERS, GRID, trials=2)
    seen = []

    def interrupt(record, done, total):
        seen.append((record["trial"], done, total))
        if done == 5:
            raise KeyboardInterrupt

    run = partial(study.phase_transition, make_problem, SOLVERS, GRID, path=path)
    with pytest.raises(KeyboardInterrupt):
        run(trials=2, callback=interrupt)
    assert [s[1:] for s in seen] == [(k, 16) for k in range(1, 6)]
    held = len(study.load_records(path))
    assert 5 <= held < 16
    # The process may have ended in the middle of a line.
    path.write_bytes(path.read_bytes()[:-1] + b"\r\nprojections,0.8")
    rest = []
    resumed = run(trials=2, callback=lambda r, *_: rest.append(r))
    assert len(rest) == 16 - held
    assert timeless(resumed) == timeless(whole)
    assert timeless(study.load_records(path)) == timeless([*resumed[:held], *rest])
    # Nothing is left to do, and more trials keep those there are.
    assert run(trials=2, callback=lambda *_: pytest.fail("ran again")) == resumed
    assert [r for r in run(trials=3) if r["trial"] < 2] == resumed


def test_a_path_of_another_study_is_refused(tmp_path):
    path = tmp_path / "study.csv"
    study.save_records([{"solver": "x", "trial": 0}], path)
    with pytest.raises(ValueError, match=r"has the columns \['solver', 'trial'\], not"):
        study.save_records([{"solver": "x", "rank": 1}], path, append=True)


def test_csv_keeps_values(tmp_path):
    records = [
        {"solver": 'a, "b"\nc', "x": 1, "y": 0.1, "z": True, "w": math.inf, "v": None},
        {"solver": "é", "x": -(2**70), "y": 1e-300, "z": False, "w": -math.inf, "v": "text"},
    ]
    path = tmp_path / "r.csv"
    study.save_records(records[:1], path)
    study.save_records(records[1:], path, append=True)
    assert study.load_records(path) == records
    study.save_records([], path)
    assert study.load_records(path) == records
    assert study.load_records(tmp_path / "none.csv") == []


def refuse(_):
    raise np.linalg.LinAlgError("singular")


def test_refusals_are_records():
    grid = {"rank": [1, 51]}
    first, second = study.phase_transition(make_problem, {"refuse": refuse}, grid, trials=1)
    assert math.isnan(first["error"])
    assert first["converged"] is False
    assert first["reason"] == "LinAlgError: singular"
    assert "rank must be in 1..50" in second["reason"]
    assert study.success_rate([first], ["rank"]) == [{"rank": 1, "trials": 1, "success": 0.0}]


def test_mistakes_are_not():
    with pytest.raises(TypeError):
        study.phase_transition(make_problem, {"wrong": lambda: None}, GRID, trials=1)


def test_bad_arguments():
    with pytest.raises(ValueError, match="trials must be at least 1"):
        study.phase_transition(make_problem, SOLVERS, GRID, trials=0)
    with pytest.raises(ValueError, match="must not be called like a column"):
        study.phase_transition(make_problem, SOLVERS, {"error": [1]}, trials=1)


def test_compare():
    p = make_problem(outliers=0.05, rank=1, rng=0)
    records = study.compare(p, SOLVERS)
    for name, solver in SOLVERS.items():
        mine = [r for r in records if r["solver"] == name]
        solution = solver(p)
        assert [r["step"] for r in mine] == list(range(1, solution.n_iter + 1))
        assert [r["change"] for r in mine] == [h.change for h in solution.history]
        assert all(np.diff([r["seconds"] for r in mine]) > 0)
        assert mine[-1]["error"] == study.truth_error(p, solution.value)
        assert mine[-1]["error"] < 1e-5 < mine[0]["error"]


def test_compare_with_an_error_of_ones_own():
    p = make_problem(outliers=0.05, rank=1, rng=0)
    records = study.compare(
        p, {"projections": projections}, error=lambda _, value: value.low_rank.rank
    )
    assert {r["error"] for r in records} == {1}

"""How few entries are enough: the recovery tables of the completion solvers.

``python -m pytest tests/benchmarks/test_recovery.py`` times the second-order solvers near the
information limit, on 20 instances each. ``python -m tests.benchmarks.test_recovery results.csv``
runs the grid of :cite:`kummerle2021scalable`, figures 1 and 2, and prints it as Markdown beside the
published medians; it resumes what the file holds already, and ``--trials``, ``--solvers`` and
``--conditions`` make it shorter.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import pytest

import lowrank_sp as lr
from lowrank_sp.inverse import completion, synthetic
from lowrank_sp.inverse.study import phase_transition

# As published: all solvers stop at a relative change of 1e-9, first-order ones after 4000 steps.
TOL = 1e-9
SECOND_ORDER, FIRST_ORDER = lr.Stop(max_iter=400, tol=TOL), lr.Stop(max_iter=4000, tol=TOL)


def solve(solver, stop, problem):
    return solver(problem.entries, rank=problem.rank, rng=0, stop=stop)


SOLVERS = {
    "MatrixIRLS": partial(solve, completion.matrix_irls, SECOND_ORDER),
    "GNMR": partial(solve, completion.gnmr, lr.Stop(max_iter=100, tol=TOL)),
    "LRGeomCG": partial(solve, completion.riemannian_cg, FIRST_ORDER),
    "LMaFit": partial(solve, completion.lmafit, FIRST_ORDER),
    "ScaledASD": partial(solve, completion.scaled_asd, FIRST_ORDER),
    "ScaledGD": partial(solve, completion.scaled_gd, FIRST_ORDER),
    "NIHT": partial(solve, completion.niht, FIRST_ORDER),
}
#: Published medians of 100 instances, by condition and oversampling, in the order of PUBLISHED_FOR.
PUBLISHED_FOR = ["MatrixIRLS", "LRGeomCG", "LMaFit", "ScaledASD", "ScaledGD", "NIHT"]
PUBLISHED = {
    (10.0, 1.3): (0.31, 5.0, 0.98, 0.96, 0.66, 0.58),
    (10.0, 1.4): (0.071, 4.4, 0.83, 0.82, 0.59, 0.53),
    (10.0, 1.5): (5e-13, 4.2, 0.74, 0.75, 0.54, 0.48),
    (10.0, 2.0): (2e-14, 2.6, 0.28, 0.31, 0.24, 0.27),
    (10.0, 2.5): (6e-15, 0.76, 0.12, 0.17, 0.083, 0.19),
    (10.0, 3.0): (5e-15, 1e-7, 4e-9, 4e-9, 1e-7, 0.25),
    (1e5, 1.5): (6e-4, 0.18, 0.22, 0.15, 0.15, 0.24),
    (1e5, 2.0): (2e-14, 0.14, 0.14, 0.077, 0.069, 0.16),
    (1e5, 3.0): (3e-15, 0.14, 0.078, 0.030, 0.015, 0.10),
    (1e5, 4.0): (2e-15, 0.14, 0.059, 0.016, 7e-3, 0.088),
}


def table(records) -> str:
    """Median errors as Markdown, the published ones in brackets."""
    names = list(dict.fromkeys(r["solver"] for r in records))
    lines = [
        f"| condition | oversampling | {' | '.join(names)} |",
        f"| --- | --- |{' --- |' * len(names)}",
    ]
    for condition, oversampling in PUBLISHED:
        cells = []
        for name in names:
            errors = [
                float(r["error"])
                for r in records
                if r["solver"] == name
                and float(r["condition"]) == condition
                and float(r["oversampling"]) == oversampling
            ]
            if not errors:
                break
            cell = f"{median(errors):.0e}"
            if name in PUBLISHED_FOR:
                index = PUBLISHED_FOR.index(name)
                cell += f" ({PUBLISHED[condition, oversampling][index]:.0e})"
            cells.append(cell)
        if cells:
            lines.append(f"| {condition:g} | {oversampling:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def recovery(path: str, trials: int, solvers: list[str], conditions: list[float]) -> list:
    """Records of the published grid, saved in ``path`` as they come."""
    records = []
    for condition in conditions:
        grid = [rho for kappa, rho in PUBLISHED if kappa == condition]
        records += phase_transition(
            partial(synthetic.completion, shape=(1000, 1000), rank=5),
            {name: SOLVERS[name] for name in solvers},
            {"condition": [condition], "oversampling": grid},
            trials,
            path=path,
        )
    return records


INSTANCES = 20
#: Solver, shape, oversampling, condition.
TARGETS: dict[str, tuple[Callable, tuple[int, int], float, float]] = {
    "matrix_irls, 1000 x 1000, oversampling 1.5, condition 10": (
        completion.matrix_irls, (1000, 1000), 1.5, 10.0
    ),
    "matrix_irls, 1000 x 1000, oversampling 2, condition 1e5": (
        completion.matrix_irls, (1000, 1000), 2.0, 1e5
    ),
    "gnmr, 300 x 350, oversampling 1.5, condition 10": (
        completion.gnmr, (300, 350), 1.5, 10.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_recovery_near_the_information_limit(target, benchmark):
    solver, shape, oversampling, condition = TARGETS[target]
    stop = lr.Stop(max_iter=400, tol=1e-12)
    problems = iter(
        synthetic.completion(
            shape=shape, rank=5, oversampling=oversampling, condition=condition, rng=seed
        )
        for seed in range(INSTANCES)
    )
    errors = []

    def run(p):
        errors.append(lr.relative_error(solve(solver, stop, p).value, p.truth))

    benchmark.pedantic(run, setup=lambda: ((next(problems),), {}), rounds=INSTANCES)
    hits = sum(error < 1e-6 for error in errors)
    benchmark.extra_info["accuracy"] = (
        f"median error {np.median(errors):.0e}, {hits} of {INSTANCES} below 1e-6"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--trials", type=int, default=INSTANCES)
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--conditions", nargs="+", type=float, default=[10.0, 1e5])
    options = parser.parse_args()
    records = recovery(options.path, options.trials, options.solvers, options.conditions)
    print(table(records))


if __name__ == "__main__":
    main()

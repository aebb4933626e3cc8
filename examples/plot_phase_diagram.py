"""
Phase diagrams of three completion solvers
==========================================

How many entries does a solver need? :func:`~lowrank_sp.inverse.study.phase_transition` asks it on
random problems of known truth, and :func:`~lowrank_sp.plot.phase_diagram` draws the share of those
it recovers. No solver can succeed below an oversampling of 1, the entries a degree of freedom.
"""

# %%
# Problems and solvers
# --------------------
#
# Every solver gets the same problems, 60 x 50 and of condition number 5. To keep this page short,
# there are 3 problems a point.

from functools import partial

import matplotlib.pyplot as plt

import lowrank_sp as lr
from lowrank_sp import plot
from lowrank_sp.inverse import completion, study, synthetic

make_problem = partial(synthetic.completion, shape=(60, 50), condition=5.0)
stop = lr.Stop(max_iter=300, tol=1e-8)


def matrix_irls(p, callback=None):
    """Iteratively reweighted least squares, whose steps are few and large."""
    few = lr.Stop(max_iter=100, tol=1e-8)
    return completion.matrix_irls(
        p.entries, rank=p.rank, rng=0, stop=few, decay=0.6, callback=callback
    )


def als(p, callback=None):
    """Alternating least squares."""
    return completion.als(p.entries, rank=p.rank, rng=0, stop=stop, callback=callback)


def scaled_asd(p, callback=None):
    """Scaled alternating steepest descent."""
    return completion.scaled_asd(p.entries, rank=p.rank, rng=0, stop=stop, callback=callback)


solvers = {"matrix_irls": matrix_irls, "als": als, "scaled_asd": scaled_asd}
records = study.phase_transition(
    make_problem,
    solvers,
    {"rank": [1, 2, 3, 4], "oversampling": [1.4, 1.8, 2.4, 3.0]},
    trials=3,
)

fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), layout="constrained")
for ax, name in zip(axes, solvers, strict=True):
    plot.phase_diagram(
        (r for r in records if r["solver"] == name), "rank", "oversampling", tol=1e-5, ax=ax
    )
    ax.set_title(name)
fig.colorbar(axes[0].images[0], ax=axes, label="share recovered")

# %%
# Longer studies
# --------------
#
# With ``path="study.csv"`` every trial is saved as it comes, and an interrupted study goes on where
# it was; with ``executor=ProcessPoolExecutor()`` trials run side by side. The records are plain
# dictionaries:

print(records[0])
for row in study.success_rate(records, ["solver"], tol=1e-5):
    print(row)

# %%
# One problem
# -----------
#
# Where all three recover, they differ in the number of steps, and in what a step costs.

p = make_problem(rank=3, oversampling=3.0, rng=1)
curves = study.compare(p, solvers)
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
for ax, against in zip(axes, ("step", "seconds"), strict=True):
    plot.convergence(curves, against=against, ax=ax)

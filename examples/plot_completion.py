"""
Completion from few entries
===========================

A matrix of 300 x 200 and rank 5 has 2475 degrees of freedom. Here seven per cent of its 60000
entries are observed, 1.8 a degree of freedom, and the solvers of
:mod:`lowrank_sp.inverse.completion` are to find the others.
"""

# %%
# Convergence
# -----------
#
# The truth is known, so a callback can record the true error. Second-order steps are few. Of the
# first-order methods only alternating least squares comes through, and only with a slow
# continuation: its penalty leads to the solution of least nuclear norm until the entries suffice.

import matplotlib.pyplot as plt
import numpy as np

import lowrank_sp as lr
from lowrank_sp.inverse import completion, synthetic

p = synthetic.completion(shape=(300, 200), rank=5, oversampling=1.8, condition=10, rng=0)
print(p.entries, p.dof)

runs = {
    "matrix_irls": (completion.matrix_irls, {}),
    "als, continuation=0.9": (completion.als, {"continuation": 0.9}),
    "als": (completion.als, {}),
    "scaled_asd": (completion.scaled_asd, {}),
    "lmafit": (completion.lmafit, {}),
}
fig, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
for name, (solver, options) in runs.items():
    errors = []

    def record(*step, errors=errors):
        """Keep the true error, and stop where it is next to rounding."""
        errors.append(lr.relative_error(step[-1], p.truth))
        return errors[-1] < 1e-10

    stop = lr.Stop(max_iter=150, tol=0.0)
    solver(p.entries, rank=5, rng=0, stop=stop, callback=record, **options)
    ax.plot(np.arange(1, len(errors) + 1), errors, label=name)
ax.set(yscale="log", ylim=(1e-11, 1e3), xlabel="step", ylabel="relative error, all entries")
ax.legend(frameon=False)

# %%
# Is it right?
# ------------
#
# A small residual on the entries is no proof near the information limit, where other matrices fit
# as well. Withheld entries are one: they were not fitted, so their error is that of all others. It
# costs oversampling, however.

easier = synthetic.completion(shape=(300, 200), rank=5, oversampling=3.0, condition=10, rng=0)
kept, withheld = easier.entries.split(0.05, rng=0)
solution = completion.als(kept, rank=5, rng=0)
print(solution.reason)
print(f"withheld {withheld.relative_residual(solution.value):.1e}")
print(f"true     {lr.relative_error(solution.value, easier.truth):.1e}")

# %%
# Noise, and a rank that is not known
# -----------------------------------
#
# With noise there is a trade-off. :func:`~lowrank_sp.inverse.completion.selection.select_rank`
# measures it on withheld entries, and
# :func:`~lowrank_sp.inverse.completion.nuclear.soft_impute_path` lets the nuclear norm choose the
# rank: its answers are biased towards zero, so that it takes more rank than there is.

noisy = synthetic.completion(shape=(300, 200), rank=5, oversampling=6, noise=0.3, rng=1)
chosen = completion.select_rank(noisy.entries, range(1, 11), rng=0)
path = completion.soft_impute_path(noisy.entries, rank=40, rng=0, stop=lr.Stop(tol=1e-4))

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
ranks = [score.rank for score in chosen.curve]
left.plot(ranks, [score.error for score in chosen.curve], "o-", label="withheld entries")
left.plot(ranks, [score.fit for score in chosen.curve], "s--", color="C7", label="fitted entries")
left.axvline(chosen.rank, color="C3", linewidth=1, label=f"chosen: rank {chosen.rank}")
left.set(xlabel="rank", ylabel="relative error", title="als")
left.legend(frameon=False)

shares = [point.regularization for point in path]
errors = [lr.relative_error(point.solution.value, noisy.truth) for point in path]
right.plot(shares, errors, "o-", label="true error")
for share, error, point in list(zip(shares, errors, path, strict=True))[2::4]:
    right.annotate(
        f"rank {point.solution.value.rank}", (share, error), (4, 6), textcoords="offset points"
    )
best = completion.als(noisy.entries, rank=chosen.rank, rng=0).value
right.axhline(
    lr.relative_error(best, noisy.truth), color="C3", linewidth=1, label="als, chosen rank"
)
right.set(xscale="log", xlabel="threshold / largest singular value", title="soft_impute_path")
right.legend(frameon=False)

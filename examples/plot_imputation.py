"""
Missing values in a scikit-learn pipeline
=========================================

Where features go together, what is missing in a row follows from what is there.
:class:`~lowrank_sp.estimators.LowRankImputer` learns a low-rank model on the training rows, fits
every row by it, and stands in a pipeline like any other imputer.
"""

# %%
# How well holes are filled
# -------------------------
#
# The 30 features of the breast cancer data are measures of the size, the shape and the texture of
# cells, and far from independent. Some share of the values is lost at random; errors are in units
# of the standard deviation of a feature.

from functools import partial

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.impute import KNNImputer, SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import lowrank_sp as lr
from lowrank_sp.estimators import LowRankImputer
from lowrank_sp.inverse import completion

x, y = load_breast_cancer(return_X_y=True)
x = StandardScaler().fit_transform(x)


def with_holes(share):
    """The data without a random share of the values."""
    return np.where(np.random.default_rng(0).random(x.shape) < share, np.nan, x)


imputers = {
    "mean": SimpleImputer(),
    "5 neighbours": KNNImputer(),
    "low rank": LowRankImputer(rank=6, regularization=0.03),
}
shares = [0.1, 0.3, 0.5, 0.7]
fig, ax = plt.subplots(figsize=(5, 3.4), layout="constrained")
for name, imputer in imputers.items():
    errors = []
    for share in shares:
        holes = with_holes(share)
        wrong = (imputer.fit_transform(holes) - x)[np.isnan(holes)]
        errors.append(np.sqrt(np.mean(wrong**2)))
    ax.plot(shares, errors, "o-", label=name)
ax.set(xlabel="share missing", ylabel="root mean square error", ylim=(0, None))
ax.legend(frameon=False)

# %%
# In a pipeline
# -------------
#
# Its parameters are chosen by what they do to the classifier, on training rows only.

holes = with_holes(0.5)
pipeline = make_pipeline(StandardScaler(), LowRankImputer(), LogisticRegression(max_iter=2000))
search = GridSearchCV(
    pipeline,
    {
        "lowrankimputer__rank": [2, 4, 6],
        "lowrankimputer__regularization": [0.01, 0.03, 0.1],
    },
    cv=3,
)
print(f"low rank       accuracy {cross_val_score(search, holes, y, cv=3).mean():.3f}")
for name in ("mean", "5 neighbours"):
    other = make_pipeline(StandardScaler(), imputers[name], LogisticRegression(max_iter=2000))
    print(f"{name:14s} accuracy {cross_val_score(other, holes, y, cv=3).mean():.3f}")

# %%
# Another solver
# --------------
#
# A solver is a function of the observed entries and the rank, so any other is passed as it is.

soft = partial(completion.soft_impute, rng=0, stop=lr.Stop(tol=1e-4))
filled = LowRankImputer(rank=6, regularization=0.03, solver=soft).fit_transform(holes)
wrong = (filled - x)[np.isnan(holes)]
print(f"soft-impute    root mean square error {np.sqrt(np.mean(wrong**2)):.3f}")

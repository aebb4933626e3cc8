"""Estimators for scikit-learn's pipelines: imputation, robust PCA, truncated SVD.

Arrays of NumPy in single or double precision. What they compute is documented at the functions
that they call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    OneToOneFeatureMixin,
    TransformerMixin,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted, validate_data

from lowrank_sp.factors import check_rank
from lowrank_sp.inverse.completion import als
from lowrank_sp.inverse.entries import Entries
from lowrank_sp.inverse.robust import alternating_projections
from lowrank_sp.iterate import Solution, Stop
from lowrank_sp.linalg.svd import truncated_svd

_DTYPES = (np.float64, np.float32)
# A model of data with holes is not worth more digits.
_STOP = Stop(max_iter=1000, tol=1e-5)


class LowRankImputer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    r"""Fill missing values by a low-rank model of the rows about the mean row.

    Fitting completes the data, :math:`X \approx 1 \mu^T + L R`, with :math:`\mu` the mean of the
    observed values. A row to be transformed, seen before or not, is fitted by the columns of
    :math:`R` at the entries it has,

    .. math:: \min_z \sum_{j\ \text{observed}} |x_j - \mu_j - z^T R_j|^2 + \lambda \|z\|^2,
              \qquad \lambda = \rho\, \sigma\, \frac{M}{\sqrt{m n}},

    and only its missing entries are replaced. A row without any becomes :math:`\mu`.

    Parameters
    ----------
    rank : int
        In ``1..min(n_samples, n_features)``.
    solver : callable, optional
        ``solver(entries, rank=rank)`` returns a :class:`~lowrank_sp.iterate.Solution` of an SVD, as
        do the functions of :mod:`lowrank_sp.inverse.completion`; fix their other arguments by
        :func:`functools.partial`. By default :func:`~lowrank_sp.inverse.completion.als` with the
        same penalty.
    regularization : float
        The :math:`\rho`, positive. Of the training data, :math:`\sigma` is the root mean square of
        the :math:`M` observed entries about the mean, and ``m, n`` the shape.
    center : bool
        Whether there is a mean; otherwise :math:`\mu = 0`. Data of exactly low rank are best left
        as they are: the mean of what is observed is not theirs, which costs one more rank.
    random_state : int or None
        Seed of the default solver.

    Attributes
    ----------
    mean_ : array, shape (n_features,)
    components_ : array, shape (rank, n_features)
        The :math:`R`, with ``L`` of equal norm.
    n_iter_ : int

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> truth = rng.standard_normal((50, 2)) @ rng.standard_normal((2, 8))
    >>> x = np.where(rng.random(truth.shape) < 0.2, np.nan, truth)
    >>> filled = LowRankImputer(rank=2).fit_transform(x)
    >>> missing = np.isnan(x)
    >>> bool(np.std((filled - truth)[missing]) < 0.2 * np.std(truth[missing]))
    True
    """

    def __init__(
        self,
        rank: int = 2,
        *,
        solver: Callable[..., Solution] | None = None,
        regularization: float = 0.01,
        center: bool = True,
        random_state: int | None = 0,
    ):
        self.rank = rank
        self.solver = solver
        self.regularization = regularization
        self.center = center
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> LowRankImputer:
        """Learn mean and components from the rows of ``X``, with NaN where values are missing."""
        del y
        X = self._validated(X, reset=True)
        if not 0 < self.regularization < np.inf:
            raise ValueError(f"regularization must be positive, got {self.regularization}")
        seen = ~np.isnan(X)
        if not seen.any(axis=0).all():
            empty = np.flatnonzero(~seen.any(axis=0)).tolist()
            raise ValueError(f"every feature needs a value, got none in columns {empty}; drop them")
        # Rows without a value say nothing.
        X = X[seen.any(axis=1)]
        check_rank(self.rank, min(X.shape), X.shape)
        self.mean_ = np.nanmean(X, axis=0) if self.center else np.zeros_like(X[0])
        entries = Entries.from_nan(X - self.mean_)
        size = entries.norm() / entries.size**0.5
        self._ridge = self.regularization * size * entries.size / (X.shape[0] * X.shape[1]) ** 0.5
        solution = self._solve(entries)
        _warn_of(self, solution)
        self.components_ = solution.value.split().right
        if not np.isfinite(self.components_).all():
            raise ValueError("the solver left features undetermined; lower the rank")
        self.n_iter_ = solution.n_iter
        return self

    def transform(self, X: Any) -> np.ndarray:
        """``X`` with its NaN replaced."""
        check_is_fitted(self)
        X = self._validated(X, reset=False)
        entries = Entries.from_nan(X - self.mean_.astype(X.dtype))
        components = self.components_.astype(X.dtype)
        zeros = np.zeros((len(X), len(components)), X.dtype)
        scores, _ = entries.least_squares(zeros, components, self._ridge)
        return np.where(np.isnan(X), self.mean_ + scores @ components, X).astype(X.dtype)

    def _solve(self, entries: Entries) -> Solution:
        if self.solver is not None:
            return self.solver(entries, rank=self.rank)
        return als(
            entries,
            rank=self.rank,
            regularization=self.regularization,
            weighted=False,
            rng=self.random_state,
            stop=_STOP,
        )

    def _validated(self, X: Any, *, reset: bool) -> Any:
        return validate_data(
            self,
            X,
            reset=reset,
            dtype=_DTYPES,
            ensure_all_finite="allow-nan",
            ensure_min_features=2 if reset else 1,
            ensure_min_samples=2 if reset else 1,
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class RobustPCA(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Principal components of data some of whose entries are grossly wrong.

    Fitting takes the rows, less their median, apart into a low-rank and a sparse matrix. A row
    to be transformed, seen before or not, is projected on the components after entries beyond a
    threshold that falls to the size of the others have been set aside: alternating projections
    with the row space fixed.

    Parameters
    ----------
    n_components : int
        In ``1..min(n_samples, n_features)``.
    solver : callable, optional
        ``solver(data, rank=n_components)`` returns a :class:`~lowrank_sp.iterate.Solution` of a
        :class:`~lowrank_sp.inverse.separation.LowRankPlusSparse`. By default
        :func:`~lowrank_sp.inverse.robust.alternating_projections`.
    center : bool
        Whether to subtract the median row. It differs from the mean, so that data of exactly low
        rank have one rank more without it.
    random_state : int or None
        Seed of the default solver.

    Attributes
    ----------
    components_ : array, shape (n_components, n_features)
        Orthonormal.
    singular_values_ : array, shape (n_components,)
    center_ : array, shape (n_features,)
        Median row, or zero.
    decomposition_ : LowRankPlusSparse
        Of the training data less the median row.
    n_iter_ : int

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> clean = rng.standard_normal((200, 2)) @ rng.standard_normal((2, 60))
    >>> x = clean + np.where(rng.random(clean.shape) < 0.1, rng.normal(0, 20, clean.shape), 0)
    >>> pca = RobustPCA(n_components=2, center=False).fit(x[:150])
    >>> again = pca.inverse_transform(pca.transform(x[150:]))
    >>> bool(abs(again - clean[150:]).max() < 1e-4)
    True
    """

    def __init__(
        self,
        n_components: int = 2,
        *,
        solver: Callable[..., Solution] | None = None,
        center: bool = True,
        random_state: int | None = 0,
    ):
        self.n_components = n_components
        self.solver = solver
        self.center = center
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> RobustPCA:
        """Learn median and components from the rows of ``X``."""
        del y
        X = validate_data(self, X, dtype=_DTYPES, ensure_min_features=2, ensure_min_samples=2)
        self.center_ = np.median(X, axis=0) if self.center else np.zeros_like(X[0])
        data = X - self.center_
        rank = check_rank(self.n_components, min(X.shape), X.shape)
        if self.solver is None:
            solution = alternating_projections(data, rank=rank, rng=self.random_state)
        else:
            solution = self.solver(data, rank=rank)
        _warn_of(self, solution)
        self.decomposition_ = solution.value
        self.components_ = self.decomposition_.low_rank.vh
        self.singular_values_ = self.decomposition_.low_rank.s
        self.n_iter_ = solution.n_iter
        return self

    def transform(self, X: Any) -> Any:
        """Scores of the rows of ``X``, of shape ``(n_samples, n_components)``."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=_DTYPES, reset=False)
        return _scores(X - self.center_.astype(X.dtype), self.components_.astype(X.dtype))

    def inverse_transform(self, X: Any) -> Any:
        """Rows that have the scores ``X``."""
        check_is_fitted(self)
        return X @ self.components_ + self.center_

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class TruncatedSVD(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Leading singular vectors, to a certified accuracy, by :func:`lowrank_sp.truncated_svd`.

    Data are not centered, and may be sparse.

    Parameters
    ----------
    n_components : int or None
        In ``1..min(n_samples, n_features)``. None, with ``tol``: as many as that needs.
    tol : float, optional
        As of :func:`~lowrank_sp.linalg.svd.truncated_svd`: the accuracy of the triplets, or without
        ``n_components`` that of the matrix.
    random_state : int or None
        Seed.

    Attributes
    ----------
    components_ : array, shape (n_components, n_features)
    singular_values_ : array, shape (n_components,)
    bounds_ : array, shape (n_components,)
        Certified error of each singular value.
    explained_variance_, explained_variance_ratio_ : array, shape (n_components,)
        Variance of the transformed training data, and its share of all variance.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((300, 120))
    >>> svd = TruncatedSVD(n_components=5).fit(x)
    >>> exact = np.linalg.svd(x, compute_uv=False)[:5]
    >>> bool(np.all(abs(svd.singular_values_ - exact) <= svd.bounds_))
    True
    """

    def __init__(
        self,
        n_components: int | None = 2,
        *,
        tol: float | None = None,
        random_state: int | None = 0,
    ):
        self.n_components = n_components
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> TruncatedSVD:
        """Learn the components of ``X``."""
        del y
        X = validate_data(
            self,
            X,
            dtype=_DTYPES,
            accept_sparse=("csr", "csc"),
            ensure_min_features=2,
            ensure_min_samples=2,
        )
        if self.n_components is None and self.tol is None:
            raise ValueError("n_components or tol must be given, got None for both")
        f = truncated_svd(X, self.n_components, tol=self.tol, rng=self.random_state)
        self.components_, self.singular_values_, self.bounds_ = f.vh, f.s, f.bounds
        scores = X @ self.components_.T
        self.explained_variance_ = np.var(scores, axis=0)
        mean = np.asarray(X.mean(axis=0)).ravel()
        squares = X.multiply(X) if hasattr(X, "multiply") else X * X
        total = np.sum(np.maximum(np.asarray(squares.mean(axis=0)).ravel() - mean**2, 0.0))
        self.explained_variance_ratio_ = self.explained_variance_ / (total or 1.0)
        return self

    def transform(self, X: Any) -> Any:
        """Coordinates of the rows of ``X``, of shape ``(n_samples, n_components)``."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=_DTYPES, accept_sparse=("csr", "csc"), reset=False)
        return X @ self.components_.T

    def inverse_transform(self, X: Any) -> Any:
        """Rows with the coordinates ``X``."""
        check_is_fitted(self)
        return X @ self.components_

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _scores(rows: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Coordinates of every row for itself, without its entries beyond a falling threshold."""
    size = abs(rows)
    level = np.minimum(size.max(axis=1), 20 * np.median(size, axis=1))
    level = np.where(level > 0, level, size.max(axis=1))[:, None]
    scores = np.zeros((len(rows), len(components)), rows.dtype)
    for _ in range(60):
        rest = rows - scores @ components
        size = abs(rest)
        scores = scores + (rest * (size <= level)) @ components.T
        # Three standard deviations of Gaussian noise.
        level = np.maximum(0.7 * level, 4.45 * np.median(size, axis=1)[:, None])
    return scores


def _warn_of(estimator: BaseEstimator, solution: Solution) -> None:
    if solution.converged is False:
        name = type(estimator).__name__
        warnings.warn(f"{name}: {solution.reason}", ConvergenceWarning, stacklevel=3)

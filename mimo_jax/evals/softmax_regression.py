"""Softmax regression with an L2 penalty: the linear classifier of the probes. NumPy and SciPy, deterministic.

E examples, F features, K classes.

Minimised is the mean cross-entropy plus `penalty / (2 E)` times the sum of squared weights; the bias is free. The
problem is convex, and L-BFGS goes on until the objective no longer falls. Features are scaled by how often they occur,
as a change of variables that leaves the optimum where it is: without it, rare codes take hundreds of iterations more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.sparse

PENALTIES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.01, 1e-3, 1e-4, 1e-5)  # that are tried, from the strongest on
_TOLERANCE = 1e-6  # relative fall of the objective in one iteration at which it has converged
_MAX_ITERATIONS = 1000

type Features = np.ndarray | scipy.sparse.csr_array  # [E, F], float32


@dataclass(frozen=True)
class Classifier:
    """A fitted regression: logits are x @ weight + bias."""

    weight_FK: np.ndarray  # float32
    bias_K: np.ndarray  # float32
    penalty: float
    iterations: int
    converged: bool

    def predict(self, x_EF: Features) -> np.ndarray:
        """The likeliest class of each example, int [E]."""
        return np.argmax(x_EF @ self.weight_FK + self.bias_K, axis=1)

    def cross_entropy(self, x_EF: Features, y_E: np.ndarray) -> float:
        """Mean over examples, in nats."""
        return float(-_log_softmax(x_EF @ self.weight_FK + self.bias_K)[np.arange(len(y_E)), y_E].mean())


def fit(
    x_EF: Features, y_E: np.ndarray, num_classes: int, penalty: float, start: Classifier | None = None
) -> Classifier:
    """Fits a classifier, from zero or from another one, which saves iterations.

    Args:
        x_EF: features, float32, dense or sparse.
        y_E: classes, int in 0..K-1.
        penalty: weight of the squared weights, counted in examples.

    Raises:
        ValueError: there is no example.
    """
    num, width = x_EF.shape
    if not num:
        raise ValueError("softmax regression: expected at least one example")
    square_F = np.asarray((x_EF * x_EF).sum(axis=0), np.float64).reshape(width)
    # The diagonal of the Hessian, but for how sure the classifier is.
    scale_F1 = (1.0 / np.sqrt(square_F / num / num_classes + penalty / num))[:, None].astype(np.float32)
    transposed_FE = x_EF.T if isinstance(x_EF, np.ndarray) else x_EF.T.tocsr()
    rows, split = np.arange(num), width * num_classes

    def objective(vector: np.ndarray) -> tuple[float, np.ndarray]:
        weight_FK = scale_F1 * vector[:split].reshape(width, num_classes).astype(np.float32)
        log_EK = _log_softmax(x_EF @ weight_FK + vector[split:].astype(np.float32))
        value = -log_EK[rows, y_E].sum(dtype=np.float64) / num
        value += penalty / (2 * num) * float(np.sum(np.square(weight_FK), dtype=np.float64))
        error_EK = np.exp(log_EK)
        error_EK[rows, y_E] -= 1.0
        error_EK /= num
        slope_FK = scale_F1 * (transposed_FE @ error_EK + penalty / num * weight_FK)
        return value, np.concatenate([slope_FK.ravel(), error_EK.sum(axis=0)]).astype(np.float64)

    vector = np.zeros(split + num_classes)
    if start is not None:
        vector = np.concatenate([(start.weight_FK / scale_F1).ravel(), start.bias_K]).astype(np.float64)
    options = {"maxiter": _MAX_ITERATIONS, "maxfun": 2 * _MAX_ITERATIONS, "ftol": _TOLERANCE, "gtol": 1e-7}
    found = scipy.optimize.minimize(objective, vector, jac=True, method="L-BFGS-B", options=options)
    weight_FK = scale_F1 * found.x[:split].reshape(width, num_classes).astype(np.float32)
    return Classifier(weight_FK, found.x[split:].astype(np.float32), penalty, int(found.nit), bool(found.success))


def fit_chosen(
    x_EF: Features,
    y_E: np.ndarray,
    num_classes: int,
    judge_E: np.ndarray,
    penalties: Sequence[float] = PENALTIES,
) -> tuple[Classifier, dict[float, float]]:
    """Fits with the penalty that a part of the training side itself prefers, then to all of it.

    The penalty goes down from the strongest until the cross-entropy of that part rises.
    Where the training side can be separated, it may fall to the end: then the margin is as wide as can be.

    Args:
        judge_E: bool, the examples that judge and are not fitted to before the last fit.

    Returns:
        The classifier, and the cross-entropy in nats for each penalty that was tried.

    Raises:
        ValueError: one of the two parts is empty.
    """
    judges, learns = np.flatnonzero(judge_E), np.flatnonzero(~judge_E)
    if not len(judges):
        raise ValueError("softmax regression: expected at least one example to choose the penalty with")
    x_learn_EF, x_judge_EF = x_EF[learns], x_EF[judges]
    tried: dict[float, float] = {}
    best: Classifier | None = None
    last: Classifier | None = None
    for penalty in penalties:
        last = fit(x_learn_EF, y_E[learns], num_classes, penalty, last)
        tried[penalty] = last.cross_entropy(x_judge_EF, y_E[judges])
        if best is not None and tried[penalty] > tried[best.penalty]:
            break
        best = last
    assert best is not None
    return fit(x_EF, y_E, num_classes, best.penalty, best), tried


def _log_softmax(logits_EK: np.ndarray) -> np.ndarray:
    shifted_EK = logits_EK - logits_EK.max(axis=1, keepdims=True)
    return shifted_EK - np.log(np.exp(shifted_EK).sum(axis=1, keepdims=True))

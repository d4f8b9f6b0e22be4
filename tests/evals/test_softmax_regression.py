"""The linear classifier: it reaches the optimum, dense as sparse, and the penalty is chosen on the judging part."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from mimo_jax.evals.softmax_regression import fit, fit_chosen


def problem(num: int, noise: float, seed: int = 0):
    """Two one-hot groups of 5 columns; the class is the first group's column, but for a share of noise."""
    generator = np.random.default_rng(seed)
    first_E, second_E = generator.integers(0, 5, (2, num))
    x_EF = np.zeros((num, 10), np.float32)
    x_EF[np.arange(num), first_E] = 1.0
    x_EF[np.arange(num), 5 + second_E] = 1.0
    wrong_E = generator.random(num) < noise
    return x_EF, np.where(wrong_E, generator.integers(0, 5, num), first_E)


def slope(x_EF, y_E, found):
    """Gradient of the objective by weight and bias, in float64."""
    logits_EK = x_EF.astype(np.float64) @ found.weight_FK + found.bias_K
    p_EK = np.exp(logits_EK - logits_EK.max(axis=1, keepdims=True))
    p_EK /= p_EK.sum(axis=1, keepdims=True)
    p_EK[np.arange(len(y_E)), y_E] -= 1.0
    return (x_EF.T @ p_EK + found.penalty * found.weight_FK) / len(y_E), p_EK.mean(axis=0)


def test_the_gradient_vanishes_where_it_stops():
    x_EF, y_E = problem(400, 0.3)
    found = fit(x_EF, y_E, 5, penalty=2.0)
    by_weight, by_bias = slope(x_EF, y_E, found)
    assert found.converged and np.abs(by_weight).max() < 5e-4 and np.abs(by_bias).max() < 5e-4
    again = fit(x_EF, y_E, 5, penalty=2.0, start=found)
    assert again.iterations <= 3 and np.abs(again.weight_FK - found.weight_FK).max() < 0.02


def test_sparse_features_give_what_dense_ones_give():
    x_EF, y_E = problem(300, 0.3)
    dense, sparse = fit(x_EF, y_E, 5, 1.0), fit(scipy.sparse.csr_array(x_EF), y_E, 5, 1.0)
    np.testing.assert_allclose(dense.weight_FK, sparse.weight_FK, atol=0.02)
    np.testing.assert_array_equal(dense.predict(x_EF), sparse.predict(scipy.sparse.csr_array(x_EF)))


def test_the_penalty_is_chosen_by_the_judging_part_alone():
    x_EF, y_E = problem(100, 0.0)
    judge_E = np.arange(100) % 5 == 4
    weak, tried = fit_chosen(x_EF, y_E, 5, judge_E, (100.0, 1.0, 0.01))
    assert weak.penalty == 0.01 and list(tried) == [100.0, 1.0, 0.01]
    shuffled = y_E.copy()
    shuffled[judge_E] = (y_E[judge_E] + 1) % 5  # what is learnt is wrong there: the strongest penalty is the best
    strong, tried = fit_chosen(x_EF, shuffled, 5, judge_E, (100.0, 1.0, 0.01))
    assert strong.penalty == 100.0 and list(tried) == [100.0, 1.0]  # and the search ends
    with pytest.raises(ValueError, match="to choose the penalty with"):
        fit_chosen(x_EF, y_E, 5, np.zeros(100, bool))


def test_equal_calls_give_equal_weights():
    x_EF, y_E = problem(200, 0.2)
    np.testing.assert_array_equal(fit(x_EF, y_E, 5, 0.3).weight_FK, fit(x_EF, y_E, 5, 0.3).weight_FK)

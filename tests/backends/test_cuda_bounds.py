"""The formulas of csrc/cuda/screen/bound.cuh and certificate.cuh, one by one, against the inequalities they stand for.

No result of a path shows a rounding to the wrong side: the margins that it eats are rarely needed. So each formula is
evaluated here by the kernels' own code and compared with the real number that it bounds: it must be on the right side,
and not far from it, or the screening keeps too much.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from support import simt_build

Real = np.longdouble
Array = np.ndarray[Any, Any]
ULPS = 8 * 2.0**-24
"""How far from the real number a few roundings to one side may be, relative to the largest term."""


def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(simt_build.build("sn_simt_bounds").with_name("libsn_simt_bounds.so")))


def floats(*shape: int) -> Array:
    return np.full(shape, np.nan, np.float32)


def pointer(x: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


def below(found: Array, real: Array, size: Array, what: str) -> None:
    """found <= real, and hardly less."""
    found = found.astype(Real)
    assert (found <= real).all(), f"{what} is above what it bounds"
    assert (found >= real - ULPS * size).all(), f"{what} is far below what it bounds"


def above(found: Array, real: Array, size: Array, what: str) -> None:
    below(-found, -real, size, what)


def uniform(random: np.random.Generator, low: float, high: float, count: int) -> Array:
    """Numbers of every size between two powers of two."""
    return np.exp2(random.uniform(low, high, count)).astype(np.float32)


@pytest.fixture(scope="module")
def pairs() -> tuple[Array, Array]:
    """Inputs of sn_simt_bounds as reals [7][count], and its outputs [8][count]."""
    random, count = np.random.default_rng(1), 20000
    inputs = floats(count, 7)
    inputs[:, 0] = uniform(random, -12, 12, count)
    inputs[:, 2] = inputs[:, 0] * uniform(random, -3, 3, count)
    for column in (1, 3):
        inputs[:, column] = np.sqrt(inputs[:, column - 1]) * uniform(random, -14, -1, count)
    square = (inputs[:, 0] + inputs[:, 2]) * uniform(random, -8, 1, count)
    inputs[:, 4] = square - inputs[:, 0]
    inputs[:, 5] = np.where(np.arange(count) % 3 == 0, 0, uniform(random, -18, -10, count))
    inputs[:, 6] = np.sqrt(square) * uniform(random, -1, 1, count)
    outputs = floats(count, 8)
    library().sn_simt_bounds(ctypes.c_int64(count), pointer(inputs), pointer(outputs))
    return inputs.astype(Real).T, outputs.T


def test_distances(pairs: tuple[Array, Array]) -> None:
    """The error of a score is eta (n_i + n_j), the copies are off by their residuals."""
    (n_i, rho_i, n_j, rho_j, score, eta, _), (lower, upper, *_) = pairs
    error = eta * (n_i + n_j)
    for found, square, rho, check in (
        (lower, n_i + score - error, -(rho_i + rho_j), below),
        (upper, n_i + score + error, rho_i + rho_j, above),
    ):
        root = np.sqrt(np.maximum(square, 0))
        # What the roundings of the square, of the size of its terms, make of its root.
        terms = (n_i + n_j + np.abs(score)) / np.maximum(root, np.sqrt(ULPS * (n_i + n_j)))
        check(found, np.maximum(root + rho, 0), terms + root + np.abs(rho), "a distance")


def test_thresholds_of_the_support(pairs: tuple[Array, Array]) -> None:
    (n_i, rho_i, n_j, rho_j, _, eta, reach), (_, _, T, u, _, _, P, _) = pairs
    t = reach + rho_i
    above(T, t * t - n_i * (1 - eta), t * t + n_i, "T")
    above(u, 2 * t, t, "u")
    # The kernels evaluate with a residual that is larger by 2^-20, for the roundings of doing so (bound.cuh).
    rho = rho_j * (1 + Real(2) ** -20)
    below(P, n_j * (1 - eta) - rho * rho, n_j + rho * rho, "P")


def test_thresholds_of_the_farthest(pairs: tuple[Array, Array]) -> None:
    (n_i, rho_i, n_j, _, _, eta, reach), (*_, G, g2, _, Q) = pairs
    g = reach - rho_i
    some = g > 0
    assert 0.3 < some.mean() < 1
    assert (G[~some] == -np.inf).all() and (g2[~some] == 0).all()
    below(G[some], (g * g - n_i * (1 + eta))[some], ((reach + rho_i) ** 2 + n_i)[some], "G")
    below(g2[some], 2 * g[some], reach[some] + rho_i[some], "g2")
    above(Q, n_j * (1 + eta), n_j, "Q")


def test_groups() -> None:
    """The least bound of a group, with the residual of the same member; no member: infinity."""
    random, count = np.random.default_rng(4), 20000
    inputs, found = floats(count, 4), floats(count)
    inputs[:, 0] = uniform(random, -12, 12, count)
    inputs[:, 2] = inputs[:, 0] * uniform(random, -8, 3, count) - inputs[:, 0]
    for column in (1, 3):
        inputs[:, column] = np.sqrt(inputs[:, 0]) * uniform(random, -14, -1, count)
    inputs[0] = [1, 0.5, np.inf, 0]
    library().sn_simt_groups(ctypes.c_int64(count), pointer(inputs), pointer(found))
    most, rho_i, q, rho_j = inputs[1:].astype(Real).T
    assert found[0] == np.inf
    root = np.sqrt(np.maximum(most + q, 0))
    above(found[1:], root + rho_i + rho_j, (most + np.abs(q)) / np.sqrt(ULPS * most) + rho_i + rho_j, "a group's bound")


def test_rows_that_are_screened_again() -> None:
    """Squares and errors of their own units, and a residual that is not measured (rescreen.cuh)."""
    random, count = np.random.default_rng(5), 20000
    inputs, found = floats(count, 6), floats(count, 3)
    inputs[:, 0] = uniform(random, -12, 12, count)
    inputs[:, 1] = inputs[:, 0] * uniform(random, -16, 2, count)
    inputs[:, 2] = np.sqrt(inputs[:, 0]) * uniform(random, -14, -1, count)
    inputs[:, 3] = uniform(random, -20, 20, count)
    inputs[:, 4] = 1 + uniform(random, -20, -10, count)
    inputs[:, 5] = uniform(random, -24, -16, count)
    library().sn_simt_frames(ctypes.c_int64(count), pointer(inputs), pointer(found))
    square, error, rho, norm, slack, floor = inputs.astype(Real).T
    lower, upper, residual = found.T
    for bound, of, sign, check in ((lower, square - error, -1, below), (upper, square + error, 1, above)):
        root = np.sqrt(np.maximum(of, 0))
        size = (square + error) / np.maximum(root, np.sqrt(ULPS * square)) + rho
        check(bound, np.maximum(root + sign * rho, 0), size, "a distance")
    # Half a unit in the last of 11 bits, and one rounding of a float before.
    real = ((Real(2) ** -11 + Real(2) ** -23) * np.sqrt(norm) + floor) * slack
    assert (residual >= real).all() and (residual <= real * (1 + Real(2) ** -8)).all()


def test_nothing_is_known_of_a_row_without_a_copy() -> None:
    """An infinite residual: distances from 0 to infinity, everything is kept."""
    inputs, outputs = floats(2, 7), floats(2, 8)
    inputs[0] = [0, np.inf, 4, 0.5, 3, 1e-5, 2]
    inputs[1] = [4, 0.5, 0, np.inf, 3, 1e-5, 2]
    library().sn_simt_bounds(ctypes.c_int64(2), pointer(inputs), pointer(outputs))
    assert (outputs[:, 0] == 0).all() and (outputs[:, 1] == np.inf).all()
    assert outputs[0, 2:6].tolist() == [np.inf, 0, -np.inf, 0]
    assert outputs[1, 6:].tolist() == [-np.inf, np.inf]


def test_residuals() -> None:
    """rho of bound.cuh: what the copy leaves, what centring and scaling round, and the least numbers."""
    random, count = np.random.default_rng(2), 20000
    inputs, found = floats(count, 3), floats(count)
    inputs[:, 0] = uniform(random, -70, 20, count)
    inputs[:, 1] = np.where(np.arange(count) % 3 == 0, 0, inputs[:, 0] * uniform(random, -60, -20, count))
    inputs[:, 2] = 1 + uniform(random, -20, -10, count)
    library().sn_simt_residuals(ctypes.c_int64(count), pointer(inputs), pointer(found))
    squares, rests, slack = inputs.astype(Real).T
    real = np.sqrt(rests) * slack + Real(2) ** -23 * np.sqrt(squares) + Real(2) ** -60
    above(found, real, real, "rho")


@pytest.mark.parametrize("dims", [1, 64, 100, 2048, 2049, 40000])
def test_constants_and_certificates(dims: int) -> None:
    """What bound.cuh and certificate.cuh derive, said again: between true distances and keys."""
    random, count = np.random.default_rng(3), 2000
    distances, constants = uniform(random, -20, 20, count), floats(6)
    padded, exponent = -(-dims // 64) * 64, 5
    u = Real(2) ** -24
    gamma = (64 + 5 + -(-dims // 2048) + 4) * u  # a chunk, a tree, sections; three for the second order, one spare
    tiny = Real(dims) * Real(2) ** -150
    for each in (-30, 0, exponent, 40):
        found = floats(count, 3)
        library().sn_simt_certificates(
            ctypes.c_int64(dims), ctypes.c_int32(each), ctypes.c_int64(count), pointer(distances), pointer(constants),
            pointer(found),
        )  # fmt: skip
        unit = Real(2) ** each
        true = distances.astype(Real) / unit
        key, reach, far = found.astype(Real).T
        eta, row_slack, stretch, shrink, underflow, underflow_key = constants.astype(Real)
        assert (key >= true**2 * (1 + gamma) + tiny).all()
        assert (reach >= distances * np.sqrt((1 + gamma) / (1 - gamma)) + np.sqrt(2 * tiny / (1 - gamma)) * unit).all()
        least = distances * np.sqrt((1 - gamma) / (1 + gamma)) - np.sqrt(2 * tiny / (1 + gamma)) * unit
        assert (far <= np.maximum(least, 0)).all()
        # And not by more than the kernels say: they take twice gamma, and round to one side.
        assert (key <= true**2 * (1 + 2.1 * gamma) + 8 * tiny + Real(2) ** -149).all()
        assert (reach <= distances * (1 + 2.1 * gamma) + 2 * np.sqrt(2 * tiny) * unit + Real(2) ** -149).all()
        assert (far >= distances * (1 - 2.1 * gamma) - 2 * np.sqrt(2 * tiny) * unit - Real(2) ** -149).all()
    # Half an accumulation error more than was claimed would be a bound that is not the claimed one.
    assert eta == (1.25 * padded + padded / 32 + 32) * 2.0**-23
    roundings = (padded / 32 + 16) * 2.0**-24  # of the sum of a row's squares, and as many of its root's
    assert 1 + roundings + 2.0**-24 < row_slack <= 1 + 2 * roundings + 2.0**-20 + ULPS
    assert 1 + gamma < stretch < 1 + 2.1 * gamma and 1 - 2.1 * gamma < shrink < 1 - gamma
    assert underflow >= np.sqrt(2 * tiny) and underflow_key >= 2 * tiny

"""The arithmetic of low-rank changes, against NumPy's own SVD of the dense sum and against numbers worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_lora.factors import (
    concatenate,
    dare,
    inner_product,
    input_directions,
    keep_largest,
    linear,
    low_rank,
    product,
    relative_error,
    ties,
    truncate,
)

pytestmark = pytest.mark.once

#: Rounding of float64, with room for the conditioning of an SVD.
NOISE = 1e-9


class Draws:
    """Stands for a `numpy.random.Generator` whose draws are written in the test."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def random(self, shape):
        draw = np.array(self.draws.pop(0))
        assert draw.shape == shape
        return draw


def pair(rng, groups, in_dim, out_dim, rank):
    return rng.normal(size=(*groups, in_dim, rank)), rng.normal(size=(*groups, rank, out_dim))


def diagonal(*values):
    return np.diag(np.array(values, float))


@st.composite
def several_terms(draw, most=3):
    """Terms with one shape, each with a rank and a weight of its own, some of them wider than the matrix."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups = draw(st.sampled_from([(), (1,), (3,)]))
    in_dim, out_dim = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    ranks = draw(st.lists(st.integers(1, 6), min_size=1, max_size=most))
    weights = [draw(st.sampled_from([-2.0, -0.7, 0.3, 1.0])) for _ in ranks]
    return [(weight, pair(rng, groups, in_dim, out_dim, rank)) for weight, rank in zip(weights, ranks, strict=True)]


def true_sum(terms):
    return sum(weight * (a @ b) for weight, (a, b) in terms)


properties = settings(max_examples=150, deadline=None)


# Sums


@properties
@given(several_terms())
def test_a_concatenation_is_the_weighted_sum(terms):
    a, b = concatenate(terms)
    assert a.shape[-1] == b.shape[-2] == sum(a.shape[-1] for _, (a, _) in terms)
    np.testing.assert_allclose(product((a, b)), true_sum(terms), rtol=0, atol=1e-13)


def test_a_concatenation_of_whole_numbers_is_exact():
    first = np.array([[1.0], [2.0]]), np.array([[3.0, -1.0, 0.0]])
    second = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    a, b = concatenate([(2.0, first), (-1.0, second)])
    np.testing.assert_array_equal(a, [[1, 1, 0], [2, 0, 1]])
    np.testing.assert_array_equal(b, [[6, -2, 0], [-1, -2, -3], [-4, -5, -6]])
    np.testing.assert_array_equal(product((a, b)), [[5, -4, -3], [8, -9, -6]])


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.1, 0.2, -0.3), (1e6, -1e6)], ids=str)
@pytest.mark.parametrize("groups", [(), (2,)], ids=str)
def test_a_change_and_its_opposite_cancel(groups, weights):
    change = pair(np.random.default_rng(0), groups, 40, 30, 5)
    (a, b), error = truncate(concatenate([(weight, change) for weight in weights]), energy=1.0)
    assert a.shape == (*groups, 40, 1)
    assert b.shape == (*groups, 1, 30)
    assert not product((a, b)).any()
    assert error == 0.0


def test_cancelled_terms_leave_the_others():
    rng = np.random.default_rng(0)
    kept, gone = pair(rng, (), 40, 30, 2), pair(rng, (), 40, 30, 5)
    (a, b), error = truncate(concatenate([(1.0, gone), (0.5, kept), (-1.0, gone)]), energy=1.0)
    assert a.shape == (40, 2)
    assert error == 0.0
    assert relative_error(product((a, b)), 0.5 * product(kept)) < 1e-13


def test_linear_adds_the_factors():
    first = np.array([[1.0], [0.0]]), np.array([[2.0, 0.0]])
    second = np.array([[0.0], [1.0]]), np.array([[0.0, 3.0]])
    a, b = linear([(4.0, first), (-9.0, second)])
    np.testing.assert_array_equal(a, [[2], [3]])
    np.testing.assert_array_equal(b, [[4, -9]])
    np.testing.assert_array_equal(product((a, b)), [[8, -18], [12, -27]])
    np.testing.assert_array_equal(product(concatenate([(4.0, first), (-9.0, second)])), [[8, 0], [0, -27]])


def test_linear_makes_the_mean_of_a_change_with_itself_twice_as_large():
    change = np.array([[1.0], [2.0]]), np.array([[3.0, 4.0]])
    np.testing.assert_allclose(product(linear([(0.5, change), (0.5, change)])), [[6, 8], [12, 16]], rtol=1e-15)


@properties
@given(several_terms(most=1))
def test_linear_is_exact_for_one_term(terms):
    np.testing.assert_allclose(product(linear(terms)), true_sum(terms), rtol=0, atol=1e-13)


# Best approximations


@properties
@given(several_terms(), st.integers(1, 12))
def test_truncating_is_numpys_truncated_svd_of_the_sum(terms, rank):
    dense = true_sum(terms)
    u, s, v = np.linalg.svd(dense, full_matrices=False)
    s[..., rank:] = 0
    best = (u * s[..., None, :]) @ v
    (a, b), error = truncate(concatenate(terms), rank=rank)
    assert a.shape[-1] == b.shape[-2] == min(rank, *dense.shape[-2:], sum(a.shape[-1] for _, (a, _) in terms))
    np.testing.assert_allclose(product((a, b)), best, rtol=0, atol=NOISE * max(1.0, s.max()))
    assert error == pytest.approx(relative_error(best, dense), abs=NOISE)


@properties
@given(several_terms(), st.integers(1, 12))
def test_the_error_reported_is_the_true_one(terms, rank):
    for approximation, error in [truncate(concatenate(terms), rank=rank), low_rank(true_sum(terms), rank=rank)]:
        assert error == pytest.approx(relative_error(product(approximation), true_sum(terms)), abs=1e-12)


@properties
@given(several_terms(), st.floats(0.01, 0.999))
def test_energy_picks_the_smallest_rank_that_is_enough_in_every_group(terms, energy):
    (a, b), _ = truncate(concatenate(terms), energy=energy)
    squares = np.linalg.svd(true_sum(terms), compute_uv=False) ** 2
    share = np.cumsum(squares, axis=-1) / squares.sum(axis=-1, keepdims=True)
    rank = a.shape[-1]
    assert (share[..., rank - 1] >= energy - NOISE).all()
    assert rank == 1 or (share[..., rank - 2] < energy).any()
    (same_a, same_b), _ = low_rank(true_sum(terms), energy=energy)
    np.testing.assert_allclose(product((same_a, same_b)), product((a, b)), rtol=0, atol=NOISE * max(1.0, squares.max()))


@pytest.mark.parametrize(
    ("singular_values", "energy", "rank", "error"),
    [
        ((3, 1), 0.9, 1, math.sqrt(0.1)),  # 9 of 10, which is 0.9 and no more
        ((3, 1), 0.91, 2, 0.0),
        ((1, 1, 1, 1), 0.5, 2, math.sqrt(0.5)),
        ((2, 2, 1), 0.1, 1, math.sqrt(5 / 9)),
        ((1, 1e-12), 1.0, 2, 0.0),  # whose square is lost beside 1
        ((1, 1e-18), 1.0, 1, 0.0),
        ((0, 0), 0.5, 1, 0.0),
        ((0, 0), 1.0, 1, 0.0),
    ],
    ids=str,
)
def test_energies_worked_out_by_hand(singular_values, energy, rank, error):
    matrix = diagonal(*singular_values)
    for (a, b), found in [low_rank(matrix, energy=energy), truncate((matrix, np.eye(len(matrix))), energy=energy)]:
        assert a.shape == (len(matrix), rank)
        assert b.shape == (rank, len(matrix))
        assert found == pytest.approx(error, abs=1e-15)


def test_energy_gives_every_group_the_rank_that_the_hardest_needs():
    matrix = np.stack([diagonal(1e3, 0, 0), diagonal(2, 1, 0)])  # the second needs both: 4 of 5 is less than 0.9
    (a, b), error = low_rank(matrix, energy=0.9)
    assert a.shape == (2, 3, 2)
    assert error == 0.0
    np.testing.assert_allclose(product((a, b)), matrix, rtol=1e-15, atol=1e-15)


def test_the_error_is_over_all_groups():
    matrix = np.stack([diagonal(4, 3), diagonal(12, 0)])  # drops 3; 16 + 9 + 144 is 13 squared
    assert low_rank(matrix, rank=1)[1] == pytest.approx(3 / 13, rel=1e-15)


@properties
@given(several_terms())
def test_directions_and_inner_products_are_those_of_the_dense_change(terms):
    factors = concatenate(terms)
    dense = product(factors)
    s, u = input_directions(factors)
    size = max(1.0, float(np.abs(dense).max()))
    expected = np.linalg.svd(dense, compute_uv=False)
    np.testing.assert_allclose(
        s, np.concatenate([expected, np.zeros_like(s)], axis=-1)[..., : s.shape[-1]], atol=NOISE * size
    )
    read = np.swapaxes(u, -1, -2) @ dense  # each direction gives an output as long as its singular value
    np.testing.assert_allclose(np.linalg.norm(read, axis=-1), s, atol=NOISE * size)
    np.testing.assert_allclose(
        inner_product(factors, terms[0][1]), np.sum(dense * product(terms[0][1])), atol=NOISE * size**2
    )


@pytest.mark.parametrize("groups", [(), (2,)], ids=str)
def test_a_zero_change_has_no_error(groups):
    zero = np.zeros((*groups, 4, 2)), np.ones((*groups, 2, 3))
    for rank, energy, expected in [(2, None, 2), (None, 0.5, 1), (None, 1.0, 1)]:
        (a, b), error = truncate(zero, rank=rank, energy=energy)
        assert a.shape == (*groups, 4, expected)
        assert not product((a, b)).any()
        assert error == 0.0


def test_both_factors_have_the_square_roots_of_the_singular_values():
    change = pair(np.random.default_rng(0), (2,), 9, 7, 4)
    s = np.linalg.svd(product(change), compute_uv=False)[..., :3]
    for (a, b), _ in [truncate(change, rank=3), low_rank(product(change), rank=3)]:
        np.testing.assert_allclose(np.swapaxes(a, 1, 2) @ a, s[:, None, :] * np.eye(3), atol=1e-13)
        np.testing.assert_allclose(b @ np.swapaxes(b, 1, 2), s[:, None, :] * np.eye(3), atol=1e-13)


def test_truncating_never_forms_the_matrix():
    rng = np.random.default_rng(0)
    change = pair(rng, (), 100_000, 100_000, 2)  # 80 GB as a matrix
    (a, b), error = truncate(concatenate([(1.0, change), (0.5, change)]), energy=1.0)
    assert a.shape == (100_000, 2)
    assert error == 0.0
    np.testing.assert_allclose(a[:5] @ b[:, :5], 1.5 * change[0][:5] @ change[1][:, :5], atol=1e-12)


def test_large_factors_beside_small_ones_do_not_hide_a_change():
    change = diagonal(1e-15, 1e9), diagonal(1e9, 1e-15)  # 1e-6 times the identity
    (a, b), _ = truncate(change, energy=1.0)
    np.testing.assert_allclose(product((a, b)), 1e-6 * np.eye(2), rtol=1e-12)


# Pruned merges


def test_the_largest_entries_are_kept_and_of_equal_ones_the_first():
    matrix = np.array([[0.5, -3.0, 2.0], [1.0, -1.0, 0.0]])
    np.testing.assert_array_equal(keep_largest(matrix, 0.5), [[0, -3, 2], [1, 0, 0]])
    np.testing.assert_array_equal(keep_largest(matrix, 0.01), [[0, -3, 0], [0, 0, 0]])
    np.testing.assert_array_equal(keep_largest(matrix, 1.0), matrix)
    np.testing.assert_array_equal(keep_largest(np.ones((2, 2)), 0.5), [[1, 1], [0, 0]])


def test_groups_are_pruned_as_one_matrix():
    matrix = np.array([[[1.0, 2.0]], [[-4.0, 3.0]]])
    np.testing.assert_array_equal(keep_largest(matrix, 0.5), [[[0, 0]], [[-4, 3]]])


@properties
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_as_many_are_kept_as_asked_and_none_larger_is_dropped(values, density):
    matrix = np.array([values]) + 0.5  # has no zeros, and many ties
    pruned = keep_largest(matrix, density)
    kept = pruned != 0
    assert kept.sum() == max(1, round(density * len(values)))
    np.testing.assert_array_equal(pruned[kept], matrix[kept])
    assert np.abs(matrix[~kept]).max(initial=0.0) <= np.abs(matrix[kept]).min()


def test_ties_worked_out_by_hand():
    terms = [
        (1.0, np.array([[4.0, -1.0, 3.0], [0.5, 2.0, -5.0]])),  # trimmed: 4 0 3 / 0 2 -5
        (2.0, np.array([[-3.0, 5.0, 1.0], [2.0, -0.25, 0.5]])),  # trimmed and weighted: -6 10 2 / 4 0 0
        (-0.5, np.array([[1.0, 6.0, -2.0], [-7.0, -4.0, 0.0]])),  # trimmed and weighted: 0 -3 1 / 3.5 2 0
    ]
    # The sums are -2 7 6 / 7.5 4 -5: 4 loses against -6, and -3 against 10.
    np.testing.assert_array_equal(ties(terms, 0.67), [[-6, 10, 2], [3.75, 2, -5]])


def test_ties_is_zero_where_no_sign_wins():
    np.testing.assert_array_equal(ties([(1.0, np.array([[1.0, 0.0]])), (-1.0, np.array([[1.0, 0.0]]))], 1.0), [[0, 0]])


def test_ties_of_one_whole_term_is_that_term():
    matrix = np.random.default_rng(0).normal(size=(2, 4, 3))
    np.testing.assert_array_equal(ties([(-0.5, matrix)], 1.0), -0.5 * matrix)


DARE_TERMS = [(1.0, np.array([[1.0, 2.0], [3.0, 4.0]])), (0.25, np.array([[-8.0, 1.0], [2.0, -2.0]]))]
DARE_DRAWS = [[0.1, 0.9], [0.4, 0.5]], [[0.2, 0.0], [0.3, 0.3]]  # leaves 1 . / 3 . of the first, and all of the second


@pytest.mark.parametrize(("elect", "expected"), [(False, [[-2, 0.5], [7, -1]]), (True, [[-4, 0.5], [3.5, -1]])])
def test_dare_worked_out_by_hand(elect, expected):
    # Left, divided by 0.5 and weighted: 2 0 / 6 0 and -4 0.5 / 1 -1.
    np.testing.assert_array_equal(dare(DARE_TERMS, 0.5, Draws(*DARE_DRAWS), ties=elect), expected)


def test_dare_is_the_weighted_sum_on_average():
    density, times = 0.3, 4000
    mean = np.mean([dare(DARE_TERMS, density, np.random.default_rng(seed)) for seed in range(times)], axis=0)
    expected = sum(weight * matrix for weight, matrix in DARE_TERMS)
    variance = sum((weight * matrix) ** 2 for weight, matrix in DARE_TERMS) * (1 - density) / density
    assert (np.abs(mean - expected) < 5 * np.sqrt(variance / times)).all()


def test_dare_depends_on_the_generator_alone():
    first, again, other = (dare(DARE_TERMS, 0.5, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("elect", [False, True])
def test_dare_that_drops_nothing_only_combines(elect):
    expected = ties(DARE_TERMS, 1.0) if elect else sum(weight * matrix for weight, matrix in DARE_TERMS)
    np.testing.assert_array_equal(dare(DARE_TERMS, 1.0, np.random.default_rng(0), ties=elect), expected)


# What holds for all


def test_relative_errors_worked_out_by_hand():
    assert relative_error(diagonal(3, 5), diagonal(3, 4)) == 0.2
    assert relative_error(np.zeros((2, 2)), diagonal(3, 4)) == 1.0
    assert relative_error(np.zeros((2, 2)), np.zeros((2, 2))) == 0.0
    assert relative_error(diagonal(3, 4), np.zeros((2, 2))) == math.inf


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32"])
def test_all_is_computed_in_float64(dtype):
    a, b = np.full((2, 1), 1001, dtype), np.full((1, 2), 2001, dtype)  # too much for float16, as is 1 + 1e-10 for float32
    terms, dense = [(1.0, (a, b)), (1e-10, (a, b))], [(1.0, a), (1e-10, a)]
    for found in (product(concatenate(terms)), product(truncate(concatenate(terms), rank=1)[0])):
        np.testing.assert_allclose(found, 2003001 * (1 + 1e-10), rtol=1e-14)
    np.testing.assert_allclose(dare(dense, 1.0, np.random.default_rng(0)), 1001 * (1 + 1e-10), rtol=1e-14)
    for found in (*concatenate(terms), *linear(terms), *low_rank(a, rank=1)[0], keep_largest(a, 0.5), ties(dense, 0.5)):
        assert found.dtype == np.float64


def test_arguments_are_not_written_to():
    change = pair(np.random.default_rng(0), (), 4, 3, 2)
    before = [each.copy() for each in change]
    for found in (concatenate([(1.0, change)]), linear([(1.0, change)]), truncate(change, rank=1)[0]):
        for each in found:
            each[...] = 7.0
    keep_largest(change[0], 1.0)[...] = 7.0
    for each, kept in zip(change, before, strict=True):
        np.testing.assert_array_equal(each, kept)


A, B = np.ones((4, 2)), np.ones((2, 3))


@pytest.mark.parametrize("function", [truncate, low_rank])
@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({}, "Expected one of `rank` and `energy`. Received: rank=None, energy=None"),
        ({"rank": 1, "energy": 0.5}, "Expected one of `rank` and `energy`. Received: rank=1, energy=0.5"),
        ({"rank": 0}, "`rank` must be a positive integer. Received: rank=0"),
        ({"rank": True}, "`rank` must be a positive integer. Received: rank=True"),
        ({"rank": 1.0}, "`rank` must be a positive integer. Received: rank=1.0"),
        ({"energy": 0.0}, r"`energy` must be a number in \(0, 1\]. Received: energy=0.0"),
        ({"energy": 1.1}, r"`energy` must be a number in \(0, 1\]. Received: energy=1.1"),
        ({"energy": math.nan}, r"`energy` must be a number in \(0, 1\]. Received: energy=nan"),
        ({"energy": "half"}, r"`energy` must be a number in \(0, 1\]. Received: energy='half'"),
    ],
    ids=str,
)
def test_a_wrong_rank_or_energy_is_refused(function, chosen, message):
    with pytest.raises(ValueError, match=message):
        function((A, B) if function is truncate else A, **chosen)


@pytest.mark.parametrize("density", [0, 0.0, -0.5, 1.5, math.nan, True, "all"])
def test_a_wrong_density_is_refused(density):
    for call in (
        lambda: keep_largest(A, density),
        lambda: ties([(1.0, A)], density),
        lambda: dare([(1.0, A)], density, np.random.default_rng(0)),
    ):
        with pytest.raises(ValueError, match=r"`density` must be a number in \(0, 1\]. Received: density="):
            call()


@pytest.mark.parametrize(
    "combine", [concatenate, linear, lambda terms: ties(terms, 0.5), lambda terms: dare(terms, 0.5, None)]
)
def test_nothing_to_combine_is_refused(combine):
    with pytest.raises(ValueError, match=r"Expected one or more .* Received the shapes: \[\]"):
        combine([])


@pytest.mark.parametrize("other", [(np.ones((5, 2)), B), (A, np.ones((2, 4))), (np.ones((1, 4, 2)), np.ones((1, 2, 3)))])
def test_changes_of_different_shapes_are_refused(other):
    dense = [(1.0, A @ B), (1.0, other[0] @ other[1])]
    for call in (
        lambda: concatenate([(1.0, (A, B)), (1.0, other)]),
        lambda: linear([(1.0, (A, B)), (1.0, other)]),
        lambda: ties(dense, 0.5),
        lambda: dare(dense, 0.5, np.random.default_rng(0)),
        lambda: relative_error(dense[0][1], dense[1][1]),
    ):
        with pytest.raises(ValueError, match=r"all of one shape. Received the shapes: "):
            call()


def test_linear_refuses_different_ranks():
    with pytest.raises(ValueError, match=r"pairs of factors, all of one shape.*\(4, 2\), \(2, 3\).*\(4, 1\), \(1, 3\)"):
        linear([(1.0, (A, B)), (1.0, (A[:, :1], B[:1]))])


@pytest.mark.parametrize(
    "wrong",
    [
        (A, A),
        (A[None], B),
        (A[None], np.ones((2, 2, 3))),
        (np.ones(4), B),
        (A[:, :0], B[:0]),
        (A[None, None], B[None, None]),
    ],
    ids=lambda wrong: " ".join(str(each.shape) for each in wrong),
)
def test_factors_that_make_no_product_are_refused(wrong):
    for call in (product, lambda factors: truncate(factors, rank=1), lambda factors: concatenate([(1.0, factors)])):
        with pytest.raises(ValueError, match=r"Expected .* Received: "):
            call(wrong)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    for call in (
        lambda: product((A, B * bad)),
        lambda: concatenate([(bad, (A, B))]),
        lambda: linear([(bad, (A, B))]),
        lambda: truncate((A * bad, B), rank=1),
        lambda: low_rank(A * bad, rank=1),
        lambda: ties([(bad, A)], 0.5),
        lambda: dare([(1.0, A * bad)], 0.5, np.random.default_rng(0)),
        lambda: relative_error(A * bad, A),
    ):
        with pytest.raises(ValueError, match=r"Expected finite numbers. Received: "):
            call()

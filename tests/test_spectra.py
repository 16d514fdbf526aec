"""Spectra: known singular values, ranks and angles."""

import math

import pytest
import torch

from lens_affect.spectra import (
    effective_rank,
    inner_product,
    principal_angles,
    product_singular_values,
    singular_values,
    spectral_norm,
    squared_norm,
    top_directions,
)


def planted(rows, columns, values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, len(values), generator=generator))[0] for n in (rows, columns))
    return (u * torch.tensor(values)) @ v.T, u, v


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (1500, 120), (120, 1500)])
def test_planted_singular_values_come_back(shape):
    matrix, _, _ = planted(*shape, [5.0, 2.0, 0.5])
    found = singular_values(matrix)
    torch.testing.assert_close(found[:3], torch.tensor([5.0, 2.0, 0.5], dtype=torch.double), rtol=1e-5, atol=0)
    assert found[3:].sum() < 1e-3
    assert spectral_norm(matrix) == pytest.approx(5, rel=1e-5)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(singular_values(noise).float(), torch.linalg.svdvals(noise), rtol=1e-4, atol=1e-4)
    assert spectral_norm(noise) == pytest.approx(float(torch.linalg.svdvals(noise)[0]), rel=1e-4)


def test_a_products_values_are_those_of_the_matrix():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(50, 4, generator=generator), torch.randn(4, 70, generator=generator)
    torch.testing.assert_close(
        product_singular_values(left, right).float(), torch.linalg.svdvals(left @ right)[:4], rtol=1e-4, atol=1e-4
    )


def test_effective_rank_counts_equal_directions():
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    # entropy of (3/4, 1/4), by hand
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(
        math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    )


@pytest.mark.parametrize("shape", [(60, 50), (400, 150)])
def test_top_directions_span_what_was_planted(shape):
    matrix, u, v = planted(*shape, [5.0, 2.0])
    left, values, right = top_directions(matrix, 2)
    torch.testing.assert_close(values, torch.tensor([5.0, 2.0]), rtol=1e-4, atol=1e-4)
    assert principal_angles(left, u).max() < 0.1
    assert principal_angles(right, v).max() < 0.1
    assert len(top_directions(matrix, 5)[1]) == 2
    assert len(top_directions(torch.zeros(shape), 5)[1]) == 0


def test_angles_between_known_planes():
    axes = torch.eye(4)
    turned = torch.stack([axes[0], math.cos(0.5) * axes[1] + math.sin(0.5) * axes[2]], 1)
    torch.testing.assert_close(
        principal_angles(axes[:, :2], turned),
        torch.tensor([0.0, math.degrees(0.5)], dtype=torch.double),
        atol=1e-3,
        rtol=0,
    )
    assert principal_angles(axes[:, :1], axes[:, 3:]).tolist() == [90]


def test_sums_are_in_double_precision():
    x = torch.full((3, 5), 1e-4)
    assert squared_norm(x) == pytest.approx(15e-8, rel=1e-6)
    assert inner_product(x, -x) == pytest.approx(-15e-8, rel=1e-6)

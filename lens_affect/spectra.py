"""Singular values and directions of weight changes, and how far two subspaces agree. Matrices in, numbers out.

Singular values come from the Gram matrix of the smaller side in double precision: small ones are then right to 1e-8 of the largest, which is
enough for an effective rank, and no third copy of a large matrix is made.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK_ROWS = 1024
"""Rows of a matrix that are in double precision at once."""
BLOCK_ENTRIES = 1 << 20
"""Entries of a tensor that are in double precision at once in a sum."""
SMALL = 96
"""Smaller side up to which a full decomposition is as cheap as an iteration."""


def singular_values(matrix: Float[Tensor, "outputs inputs"]) -> Float[Tensor, " value"]:
    """Singular values in double precision, largest first."""
    eigenvalues = torch.linalg.eigvalsh(_gram(matrix)).flip(0)
    floor = float(eigenvalues[0]) * len(eigenvalues) * torch.finfo(torch.float64).eps if len(eigenvalues) else 0.0
    return torch.where(eigenvalues > floor, eigenvalues, 0.0).sqrt()


def _gram(matrix: Float[Tensor, "outputs inputs"]) -> Float[Tensor, "side side"]:
    """Products of the rows of the smaller side, summed over blocks of the larger one."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    total = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for start in range(0, tall.shape[0], BLOCK_ROWS):
        block = tall[start : start + BLOCK_ROWS].double()
        total += block.T @ block
    return total


def product_singular_values(
    left: Float[Tensor, "outputs rank"], right: Float[Tensor, "rank inputs"]
) -> Float[Tensor, " rank"]:
    """Singular values of `left @ right`, without multiplying it out."""
    _, upper = torch.linalg.qr(left.double())
    _, other = torch.linalg.qr(right.double().T)
    return torch.linalg.svdvals(upper @ other.T)


def effective_rank(values: Float[Tensor, " value"]) -> float:
    """exp(entropy of the normalized singular values): n for n equal ones, 1 for a single one, 0 for none.

    Source: Roy and Vetterli (2007).

    Example:
        >>> round(effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])), 6)
        3.0
    """
    total = float(values.sum())
    if total == 0:
        return 0.0
    share = values.double() / total
    return math.exp(-float(torch.special.xlogy(share, share).sum()))


def spectral_norm(matrix: Float[Tensor, "outputs inputs"]) -> float:
    """Largest singular value, to about 1e-5 of itself (Lanczos from a fixed start)."""
    if min(matrix.shape) <= SMALL:
        return float(singular_values(matrix)[0]) if matrix.numel() else 0.0
    return float(top_directions(matrix, 1)[1][0])


def top_directions(
    matrix: Float[Tensor, "outputs inputs"], count: int
) -> tuple[Float[Tensor, "outputs count"], Float[Tensor, " count"], Float[Tensor, "inputs count"]]:
    """Left directions, singular values and right directions of the largest ones; fewer where the rest are numerically 0.

    Args:
        matrix: any real matrix.
        count: how many are wanted.
    """
    from scipy.sparse.linalg import svds

    if not bool(matrix.any()):
        return tuple(torch.zeros(n, 0) if n else torch.zeros(0) for n in (matrix.shape[0], 0, matrix.shape[1]))  # pyright: ignore[reportReturnType]
    if min(matrix.shape) <= max(SMALL, 4 * count):
        u, values, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    else:
        start = torch.randn(min(matrix.shape), generator=torch.Generator().manual_seed(0)).numpy()
        found: Any = svds(matrix.numpy(), k=count, tol=1e-6, v0=start)  # pyright: ignore[reportArgumentType] - its stub says int
        u, values, vt = (torch.from_numpy(x.copy()) for x in found)
        order = values.argsort(descending=True)
        u, values, vt = u[:, order], values[order], vt[order]
    kept = min(count, int((values > 1e-5 * values[0]).sum()))
    return u[:, :kept].float(), values[:kept].float(), vt[:kept].T.float()


def principal_angles(first: Float[Tensor, "side a"], second: Float[Tensor, "side b"]) -> Float[Tensor, " angle"]:
    """Angles in degrees between two subspaces with orthonormal bases, smallest first: 0 where they share a direction, 90 where none is near.

    Source: Bjorck and Golub (1973).
    """
    cosines = torch.linalg.svdvals(first.double().T @ second.double()).clamp(max=1.0)
    return torch.rad2deg(torch.arccos(cosines))


def inner_product(first: Float[Tensor, "*shape"], second: Float[Tensor, "*shape"]) -> float:
    """Sum of products, in double precision, a block at a time."""
    x, y = first.reshape(-1), second.reshape(-1)
    return sum(
        float(torch.dot(x[i : i + BLOCK_ENTRIES].double(), y[i : i + BLOCK_ENTRIES].double()))
        for i in range(0, len(x), BLOCK_ENTRIES)
    )


def squared_norm(matrix: Float[Tensor, "*shape"]) -> float:
    """Sum of squares, as `inner_product`."""
    return inner_product(matrix, matrix)

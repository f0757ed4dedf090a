"""Makes orthogonal matrices that rotate the channels of query and key. The same rotation of both leaves every score,
and so the attention, unchanged, but divides an outlier among all channels of a head."""

from functools import cache

import torch
from torch import Tensor

NONE, HADAMARD, ORTHOGONAL = "none", "hadamard", "orthogonal"  # kinds of rotations, as the report names them
_SEED = 0  # of random rotations, and of the signs of `walsh`
_REGULAR = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))  # Hadamard matrix whose rows all sum to 2
_SYLVESTER = ((1, 1), (1, -1))  # Hadamard matrix of order 2


def kind_of(width: int) -> str:
    """Returns which kind of matrix `rotation_of` makes for heads of `width` channels: HADAMARD for a power of two,
    otherwise ORTHOGONAL."""
    return HADAMARD if width & (width - 1) == 0 else ORTHOGONAL


@cache
def rotation_of(width: int) -> Tensor:
    """Returns an orthogonal matrix (width, width) in float64, on the CPU.

    If `width` is a power of two, the matrix is a Kronecker product of regular Hadamard matrices of order 4, as in
    ConvRot (Huang et al., arXiv 2512.03673, 2025), and, for 2, 8, 32, 128 and so on, one of order 2. From 4 channels
    on, no column has equal signs everywhere, so a constant offset of all channels does not end up in one channel. For
    another width, the matrix is the factor Q of a random matrix with a fixed seed.
    """
    if kind_of(width) == ORTHOGONAL:
        generator = torch.Generator().manual_seed(_SEED)
        random = torch.randn(width, width, generator=generator, dtype=torch.float64, device="cpu")
        q, r = torch.linalg.qr(random)
        return q * r.diagonal().sign()  # makes Q unique
    exponent = width.bit_length() - 1
    return _kronecker([_REGULAR] * (exponent // 2) + [_SYLVESTER] * (exponent % 2))


@cache
def walsh(width: int, group: int, *, signed: bool = False) -> Tensor:
    """Returns the orthogonal matrix (width, width) in float64 that rotates each group of `group` neighbouring channels
    by the Walsh-Hadamard matrix. Both numbers are powers of two. With `signed`, the matrix multiplies the channels by
    random signs with a fixed seed before it rotates them."""
    block = _kronecker([_SYLVESTER] * (group.bit_length() - 1))
    matrix = torch.block_diag(*[block] * (width // group))
    if not signed:
        return matrix
    generator = torch.Generator().manual_seed(_SEED)
    signs = torch.randint(2, (width, 1), generator=generator, device="cpu") * 2.0 - 1.0
    return signs.double() * matrix


def _kronecker(factors: list[tuple[tuple[int, ...], ...]]) -> Tensor:
    """Returns the Kronecker product of `factors`, divided by its norm, so that it is orthogonal."""
    product = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for factor in factors:
        product = torch.kron(product, torch.tensor(factor, dtype=torch.float64, device="cpu"))
    return product / len(product) ** 0.5

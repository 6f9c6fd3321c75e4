"""Gram matrices and their eigenvalues, with only those eigenvectors that are asked for.

Idea: a symmetric matrix becomes tridiagonal by Householder reflections, G = Q T Q^T; divide and conquer gives all
eigenpairs of T = Z diag(lam) Z^T; eigenvectors of G are Q Z. The last product costs as much as the rest together, and
is needed for some columns of Z only where some eigenvectors are. LAPACK's routines for a part of the spectrum find the
vectors of T one by one instead, which is no faster from an eighth of them on and must mind clusters.

Reference: J. Cuppen, "A divide and conquer method for the symmetric tridiagonal eigenproblem" (1981).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from groundstate.norms.spectral import LinAlgError


def gram(tall: Tensor) -> Tensor:
    """Returns W^T W for float32 or float64 ``(m, n)``, valid in its lower triangle at least.

    Cost: m n^2 flops on the processor (half of a product), 2 m n^2 elsewhere.

    >>> gram(torch.tensor([[3.0], [4.0]]))
    tensor([[25.]])
    """
    if tall.device.type != "cpu":
        return tall.mT @ tall
    from scipy.linalg import get_blas_funcs

    array = tall.numpy()
    by_columns = array.flags.f_contiguous
    (syrk,) = get_blas_funcs(("syrk",), dtype=array.dtype)
    return torch.from_numpy(syrk(1.0, array if by_columns else array.T, trans=int(by_columns), lower=1))


def eigenpairs(symmetric: Tensor) -> tuple[Tensor, Callable[[int], Tensor]]:
    """Returns all eigenvalues of a symmetric matrix, and a function that gives eigenvectors.

    Args:
        symmetric: ``(n, n)``, float32 or float64; only the lower triangle is read.

    Returns:
        ``(lam, leading)``: lam ``(n,)`` in descending order; ``leading(k)`` the first k eigenvectors, ``(n, k)``.

    Raises:
        LinAlgError: the iteration does not converge.

    Cost: 4/3 n^3 flops, half of them bound by memory, and divide and conquer; 2 n^2 k flops for k eigenvectors. One
    full ``eigh`` where the tensor is not in the memory of the processor.

    >>> lam, leading = eigenpairs(torch.tensor([[2.0, 0.0], [0.0, 5.0]]))
    >>> lam, leading(1).abs()
    (tensor([5., 2.]), tensor([[0.],
            [1.]]))
    """
    n = len(symmetric)
    if symmetric.device.type != "cpu" or n < 2:
        lam, v = torch.linalg.eigh(symmetric)
        v = v.flip(1)
        return lam.flip(0), lambda k: v[:, :k]
    import numpy
    from scipy.linalg.lapack import get_lapack_funcs

    array = symmetric.numpy()
    reduce, size, solve, reflect = get_lapack_funcs(("sytrd", "sytrd_lwork", "stevd", "ormqr"), dtype=array.dtype)
    factor, diagonal, beside, tau, _ = reduce(array, lower=1, lwork=int(size(n, lower=1)[0]))
    lam, z, failed = solve(diagonal, beside)
    if failed:
        raise LinAlgError(f"the eigenvalues of a symmetric matrix of size {n} do not converge")

    def leading(k: int) -> Tensor:
        v = numpy.array(z[:, n - k :], order="F")
        if k:  # the reflections leave the first coordinate alone
            reflectors = numpy.asfortranarray(factor[1:, :-1])
            v[1:] = reflect("L", "N", reflectors, tau, numpy.asfortranarray(v[1:]), 64 * k)[0]
        return torch.from_numpy(v).flip(1)

    return torch.from_numpy(lam).flip(0), leading

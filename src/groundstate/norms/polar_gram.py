"""The polar factor by eigenvectors of the Gram matrix, with the small singular values treated apart.

Idea: for a tall W, W^T W = V diag(lambda) V^T gives Q = W V diag(lambda^(-1/2)) V^T in a third to half of the time of
an SVD. But rounding of the Gram matrix is relative to its largest entry, so it moves Q, relative to its norm, by
about::

    eps * sigma_1^2 * rms(1 / sigma_i^2)

which a few small singular values spoil. So V = [V_b, V_s] is split where the sum over the large ones alone is small
enough. With Z_b = V_b diag(lambda_b^(-1/2)) V_b^T and Q_b = W Z_b, what is left of W is the small matrix
B = (I - Q_b Q_b^T) W V_s = W (V_s - Z_b C), C = Q_b^T W V_s. It has a Gram matrix of its own, (W V_s)^T W V_s - C^T C:

    Q = W (Z_b + (V_s - Z_b C) (B^T B)^(-1/2) V_s^T)

in one product with W. Where B has a wide spectrum too, B^T B is made in float64, which keeps all of float32 numbers
that counts. Singular values up to the threshold get none of Q: the minimal-norm one, for any rank.

Reference: N. Higham, "Functions of Matrices" (2008), chapter 8; the deflation is elementary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from groundstate.norms.spectral import LinAlgError, svd

# Eigenvalues below this, relative to the largest, are never taken from a Gram matrix: in float32 a third of their
# digits are left, and the column that belongs to them has noise of a tenth of a percent to be made orthogonal.
_SMALLEST_RATIO = 1e-4
_NOISE = 4.0  # eigenvalues below this times eps, relative to the largest, say nothing but that they are small
_TRUST_PRODUCT = 1e-3  # on eps * sigma_1 * rms(1 / sigma_i), about three times the error of a product W Z in float32
_LONG = 32  # small singular values from which on it pays to find out before whether all are zero
_SPLIT, _HALVES = 128, 768  # sizes from which on a symmetric product is made by blocks, and by blocks of blocks
_PIVOT = 1e-3  # pivots that count as small, relative to the largest
_WORTH = 40_000  # entries of a factor from which on that pays


def symmetric_product(a: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns A A^T.

    Args:
        a: ``(*batch, n, m)``.
        out: Where to write it, if a is one matrix; a fresh tensor by default.

    Cost: 2 m n^2 flops; on a CPU, for a large matrix, three quarters of them, and five eighths from n = 768 on.
    """
    n, m = a.shape[-2:]
    if a.ndim > 2 or n < _SPLIT or n * m < _WORTH or a.device.type != "cpu":
        return torch.matmul(a, a.mT, out=out)
    product = a.new_empty(n, n) if out is None else out
    fill_symmetric(product, a, a.mT)
    return product


def fill_symmetric(product: Tensor, a: Tensor, b: Tensor) -> None:
    """Writes A B, known to be symmetric, into ``product``, ``(n, n)``, without the block above the diagonal."""
    n = len(product)
    half = n // 2
    if n < _HALVES:
        torch.mm(a[half:], b, out=product[half:])
        torch.mm(a[:half], b[:, :half], out=product[:half, :half])
    else:
        torch.mm(a[half:], b[:, :half], out=product[half:, :half])
        fill_symmetric(product[:half, :half], a[:half], b[:, :half])
        fill_symmetric(product[half:, half:], a[half:], b[:, half:])
    product[:half, half:] = product[half:, :half].mT


def complete_symmetric(product: Tensor, a: Tensor) -> None:
    """Writes the lower triangle of A A^T, of which the leading n // 2 rows and columns are there, into ``product``."""
    half = len(product) // 2
    if len(product) < _HALVES:
        torch.mm(a[half:], a.mT, out=product[half:])
    else:
        torch.mm(a[half:], a[:half].mT, out=product[half:, :half])
        symmetric_product(a[half:], out=product[half:, half:])


def split_polar(w: Tensor, gram: Tensor, zero: float, trust: float) -> tuple[Tensor, Tensor] | None:
    """Returns the minimal-norm polar factor and the singular values.

    Args:
        w: ``(m, n)``, float32 or float64, of moderate scale.
        gram: The lower triangle of W^T W, or of W W^T for a wide matrix; overwritten.
        zero: Singular values up to zero * sigma_1 get none of Q.
        trust: Bound on the error from any one Gram matrix, relative to the norm of Q.

    Returns:
        ``(q, s)``, s in no particular order; ``None`` where no eigendecomposition converges, or w is float64 and has
        small singular values.

    Cost: 3.5 m n^2 + 2 n^3 flops and an eigh of size n; for k small singular values 4 m n k + 6 n^2 k and an eigh.

    >>> w = torch.tensor([[0.0, 3.0], [0.0, 4.0]])
    >>> split_polar(w, w.mT @ w, 1e-6, 1e-4)
    (tensor([[0.0000, 0.6000],
            [0.0000, 0.8000]]), tensor([0., 5.]))
    """
    try:
        lam, v = torch.linalg.eigh(gram)
    except LinAlgError:
        return None
    few, top = _small(lam, trust)
    if not top > 0 or (few and w.dtype == torch.float64):
        return None
    tall = w.shape[0] >= w.shape[1]
    big, large = (lam[few:], v[:, few:]) if few else (lam, v)
    z = symmetric_product(large.mul_(big.pow(-0.25)), out=gram)
    s = big.sqrt()
    if few:
        columns, small = (w if tall else w.mT), v[:, :few]
        image = columns @ small
        across = z @ (columns.mT @ image)
        # What the Gram matrix says about the small ones tells whether float32 will do for them.
        eps = torch.finfo(lam.dtype).eps
        easy = few == 1 or float(lam[0]) > max(_NOISE * eps * top, 2 * eps / trust * float(lam[few - 1]))
        found = _rest(image, across, zero * top**0.5, trust if easy else None)
        if found is None:
            return None
        root, rest, amplified = found
        if eps * (top * amplified / len(lam)) ** 0.5 > _TRUST_PRODUCT:
            return double_polar(w, zero)
        z.addmm_(torch.addmm(small, z, across, alpha=-1) @ root, small.mT)
        s = torch.cat((rest, s))
    return (w @ z if tall else z.mT @ w), s


def _rest(p: Tensor, c: Tensor, bound: float, trust: float | None) -> tuple[Tensor, Tensor, float] | None:
    """(B^T B)^(-1/2), the singular values of B, and the sum of 1 / sigma^2 over those above a bound.

    B^T B is P^T P - C^T C, in float64 without a bound ``trust`` on the error.
    """
    left, right = (p, c) if trust else (p.double(), c.double())
    gram = torch.addmm(left.mT @ left, right.mT, right, alpha=-1)
    if len(gram) > _LONG and float(gram.trace()) <= bound * bound:  # no singular value is above the norm
        return torch.zeros_like(gram, dtype=p.dtype), p.new_zeros(len(gram)), 0.0
    try:
        lam, v = torch.linalg.eigh(gram)
    except LinAlgError:
        return None
    values = lam.tolist()
    if trust and not trust * values[0] > 2 * torch.finfo(p.dtype).eps * values[-1]:
        return _rest(p, c, bound, None)
    z, s, amplified = _inverse_root(values, v, bound * bound)
    return z.to(p.dtype), p.new_tensor(s), amplified


def _inverse_root(values: list[float], v: Tensor, bound: float) -> tuple[Tensor, list[float], float]:
    """V diag(lambda^(-1/2)) V^T and the sum of 1 / lambda for those above the bound; the roots of all lambda.

    Numbers in a list are faster than short vectors.
    """
    inverse = [1 / x if x > bound else 0.0 for x in values]
    half = v.mul_(v.new_tensor([x**0.25 for x in inverse]))
    return half @ half.mT, [x**0.5 if x > 0 else 0.0 for x in values], sum(inverse)


def _small(lam: Tensor, trust: float) -> tuple[int, float]:
    """How many of the ascending eigenvalues are too small to be trusted, and the largest (NaN where one is NaN)."""
    values = lam.tolist()
    low, top = values[0], values[-1]
    eps = torch.finfo(lam.dtype).eps
    if low > _SMALLEST_RATIO * top and 2 * eps * top <= trust * low:
        return 0, top
    few, floor = len(values), _SMALLEST_RATIO * top
    left = (trust / (2 * eps)) ** 2 * few
    for value in reversed(values):
        if not value > floor:
            break
        left -= (top / value) ** 2
        if left < 0:
            break
        few -= 1
    return few, top + 0.0 * low


def double_polar(w: Tensor, zero: float) -> tuple[Tensor, Tensor] | None:
    """The same as `split_polar` for float32 matrices, ``(*batch, m, n)``, by a Gram matrix in float64.

    That keeps singular values down to 1e-7 sigma_1, so all that count up to dimensions of 1e5, and needs no split.

    >>> double_polar(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), 1e-6)
    (tensor([[0., 1.],
            [0., 0.]]), tensor([0., 2.]))
    """
    tall = w.shape[-2] >= w.shape[-1]
    work = w.double()
    try:
        lam, v = torch.linalg.eigh(symmetric_product(work.mT if tall else work))
    except LinAlgError:
        return None
    if lam.ndim == 1:
        values = lam.tolist()
        z, s, amplified = _inverse_root(values, v, max(values[-1], 0.0) * zero**2)
        s, error = w.new_tensor(s), (values[-1] * amplified / len(values)) ** 0.5
    else:
        inverse = torch.where(lam > lam[..., -1:] * zero**2, lam, torch.inf).reciprocal_()
        error = float((lam[..., -1] * inverse.mean(-1)).max()) ** 0.5
        half = v.mul_(inverse.pow_(0.25)[..., None, :])
        z, s = half @ half.mT, lam.clamp_min_(0).sqrt_().to(w.dtype)
    if torch.finfo(w.dtype).eps * error <= _TRUST_PRODUCT:
        z = z.to(w.dtype)
        return (w @ z if tall else z @ w), s
    return (work @ z if tall else z @ work).to(w.dtype), s


def svd_polar(w: Tensor, zero: float) -> tuple[Tensor, Tensor]:
    """The same as `split_polar`, by the singular value decomposition, for ``(*batch, m, n)`` of moderate scale.

    >>> svd_polar(torch.tensor([[0.0], [2.0]]), 1e-6)
    (tensor([[0.],
            [1.]]), tensor([2.]))
    """
    wide = w.shape[-2] < w.shape[-1]
    tall = w.mT if wide else w  # LAPACK takes half the time for a tall matrix that it takes for a wide one
    try:
        u, s, vh = torch.linalg.svd(tall, full_matrices=False)
    except LinAlgError:
        u, s, vh = svd(tall)
    u = u * (s > zero * s[..., :1])[..., None, :]
    return (vh.mT @ u.mT if wide else u @ vh), s


def pivots(gram: Tensor) -> list[float]:
    """Squares of the diagonal of the Cholesky factor of a Gram matrix plus a hundredth of what counts as small.

    A pivot is the squared distance of a column of W from the span of those before it. So those of half of the columns
    are alike where the singular values are, and small ones show up where more than half of the singular values are.
    The addition keeps rounding from ending the factorization, which would ask for another. Only the lower triangle is
    read.

    >>> [round(x, 2) for x in pivots(torch.tensor([[4.0, 2.0], [2.0, 2.0]]))]
    [4.0, 1.0]
    """
    diagonal = gram.diagonal()
    before = diagonal.clone()
    most = float(before.max())
    diagonal.add_(0.01 * _PIVOT * most)
    factor, failed = torch.linalg.cholesky_ex(gram)
    diagonal.copy_(before)
    if int(failed):
        return [most, *[0.0] * (len(gram) - 1)]
    return [x * x for x in factor.diagonal().tolist()]


def small_share(found: list[float], ratio: float = _PIVOT) -> float:
    """Returns the share of `pivots` that are below a ratio times the largest.

    >>> small_share([4.0, 1.0, 1e-9, 2.0])
    0.25
    """
    least = ratio * max(found)
    return sum(pivot < least for pivot in found) / len(found)

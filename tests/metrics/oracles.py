"""The slow way to every number: explicit masks, explicit kernel matrices with the N^3 product, loops, float64."""

import torch


def hsic(p, q):
    """Song et al. 2012, equation 5, word for word."""
    n = len(p)
    p, q = p.clone().fill_diagonal_(0), q.clone().fill_diagonal_(0)
    total = (p * q.T).sum() + p.sum() * q.sum() / ((n - 1) * (n - 2)) - 2 * (p @ q).sum() / (n - 2)
    return float(total / (n * (n - 3)))


def biased_hsic(p, q):
    """`tr(P H Q H)` entry by entry: P without the mean of each row times Q' without that of each of its rows."""
    p, q = p.tolist(), q.tolist()
    n, total = len(p), 0.0
    for i in range(n):
        for j in range(n):
            total += (p[i][j] - sum(p[i]) / n) * (q[j][i] - sum(q[j]) / n)
    return total


def masks(kernel, k, itself=False):
    """`m[i, j]` for the k largest of row i off the diagonal, the first of equals, by sorting in Python."""
    n = len(kernel)
    mask = torch.zeros_like(kernel)
    for i in range(n):
        order = sorted((j for j in range(n) if itself or j != i), key=lambda j, i=i: (-float(kernel[i, j]), j))
        mask[i, order[:k]] = 1
    return mask


def cknna(a, b, k, unbiased=True, normalize_rows=True, eps=0.0):
    a, b = a.double(), b.double()
    if normalize_rows:
        a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    kernel, other = a @ a.T, b @ b.T
    m_a, m_b = masks(kernel, k, not unbiased), masks(other, k, not unbiased)
    m, measure = m_a * m_b, hsic if unbiased else biased_hsic
    own = measure(m_a * kernel, m_a * kernel) * measure(m_b * other, m_b * other)
    return measure(m * kernel, m * other) / (own**0.5 + eps)


def cka(a, b, unbiased):
    kernel, other = a.double() @ a.double().T, b.double() @ b.double().T
    if unbiased:
        measure = hsic
    else:
        h = torch.eye(len(a), dtype=torch.float64) - 1 / len(a)

        def measure(p, q):
            return float(torch.trace(p @ h @ q @ h))

    return measure(kernel, other) / (measure(kernel, kernel) * measure(other, other)) ** 0.5


def precision_recall(real, generated, k):
    """Kynkäänniemi et al. 2019 by loops over pairs."""

    def radii(points):
        return [
            sorted(float((p - q).norm()) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)
        ]

    def share(points, centres):
        r = radii(centres)
        inside = [any(float((p - c).norm()) <= r[j] for j, c in enumerate(centres)) for p in points]
        return sum(inside) / len(inside)

    return share(generated, real), share(real, generated)

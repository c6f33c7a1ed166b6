"""CKNNA from the N k nearest pairs, against full matrices with the product of two N x N ones.

The peer has the structure of the published code of Huh et al. 2024: for each of three HSIC terms both masks are made
anew as N x N matrices, and the sum over the product of two matrices is taken of the product itself (N^3). It runs in
float32, as it is used; ours is measured in float32 and in its default (float64 up to 2000 rows). The constant in the
peer's denominator is left out, so that the numbers are the same.
"""

import argparse
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.common import interleaved, median, report
from diffusers_repr.metrics import cknna


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=384, help="of one representation; the other has twice as many")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(args.rows, args.dim, generator=generator)
    b = torch.cat([a + torch.randn(a.shape, generator=generator), torch.randn(a.shape, generator=generator)], 1)
    a, b = a.to(args.device), b.to(args.device)
    runs = {
        "ours": partial(cknna, a, b, args.k),
        "ours_float32": partial(cknna, a, b, args.k, dtype=torch.float32),
        "peer": partial(whole_matrices, a, b, args.k),
    }
    times = {name: median(values) for name, values in interleaved(runs, args.repeats).items()}
    one_way = cknna(a, b, args.k, symmetric=False)
    report(
        "cknna",
        rows=args.rows,
        k=args.k,
        device=args.device,
        ours_s=times["ours"],
        ours_float32_s=times["ours_float32"],
        peer_s=times["peer"],
        ratio=times["peer"] / times["ours"],
        ratio_float32=times["peer"] / times["ours_float32"],
        difference=abs(one_way - whole_matrices(a, b, args.k)),
        repeats=args.repeats,
    )


def whole_matrices(a: Tensor, b: Tensor, k: int) -> float:
    kernels = [x @ x.T for x in (normalize(a), normalize(b))]

    def term(p: Tensor, q: Tensor) -> Tensor:
        mask = neighbours(p, k) * neighbours(q, k)
        return hsic(mask * p, mask * q)

    first, second = kernels
    shared = term(first, second).item()
    return shared / torch.sqrt(term(first, first) * term(second, second)).item()


def neighbours(kernel: Tensor, k: int) -> Tensor:
    nearest = kernel.clone().fill_diagonal_(-torch.inf).topk(k, dim=1).indices
    return torch.zeros_like(kernel).scatter_(1, nearest, 1)


def hsic(p: Tensor, q: Tensor) -> Tensor:
    n = len(p)
    p, q = p.clone().fill_diagonal_(0), q.clone().fill_diagonal_(0)
    total = (p * q.T).sum() + p.sum() * q.sum() / ((n - 1) * (n - 2)) - 2 * (p @ q).sum() / (n - 2)
    return total / (n * (n - 3))


if __name__ == "__main__":
    main()

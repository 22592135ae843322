"""Distances between two sets of pictures, of their features: Fréchet, polynomial kernel, Gaussian kernel.

N, M pictures, D width of a feature. All sums are in float64.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn


class _Given(nn.Module):
    """Stands where torchmetrics expects a network: the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, drawn: Tensor) -> float:
    """Measure the Fréchet distance between the normal distributions fitted to two sets of features.

    Heusel et al. (arXiv:1706.08500) Eq. 6:  d² = ‖μ_1 - μ_2‖² + Tr(Σ_1 + Σ_2 - 2 (Σ_1 Σ_2)^½), covariances over N - 1.
    It is biased: few pictures give a larger distance than many of the same kind (Chong and Forsyth, arXiv:1911.07023).

    Args:
        real, drawn: (N, D) and (M, D), N and M at least 2. Over Inception's features this is FID.
    """
    metric = frechet_metric(real.shape[1], sync_on_compute=False)  # others may not be asked
    metric.update(real.double(), real=True)
    metric.update(drawn.double(), real=False)
    return float(metric.compute())


def frechet_metric(num_features: int, **options: Any) -> Any:
    """Return torchmetrics' accumulator of `frechet_distance`: `update(features, real=…)` takes (N, D) in float64.

    It keeps sums, of N pictures the same as of two, and `compute` adds up those of all ranks unless options say
    otherwise.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    return FrechetInceptionDistance(feature=_Given(num_features), **options)


def kernel_distance(
    real: Tensor, drawn: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Measure the squared maximum mean discrepancy with a cubic kernel, over random subsets.

    Bińkowski et al. (arXiv:1801.01401) section 4:  k(x, y) = (xᵀy / D + 1)³, the unbiased estimate over each subset.

    Args:
        real, drawn: (N, D) and (M, D), N and M at least 2. Over Inception's features this is KID.
        subsets: how many; one where a subset would be everything.
        subset_size: pictures of each, no more than there are.
        seed: decides the subsets.

    Returns:
        Mean and standard deviation over the subsets.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(subset_size, len(real), len(drawn))
    subsets = 1 if size == len(real) == len(drawn) else subsets
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer.*")
        metric = KernelInceptionDistance(
            feature=_Given(real.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False
        )
    metric.update(real.double(), real=True)
    metric.update(drawn.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return float(mean), float(std) if subsets > 1 else 0.0


def cmmd(real: Tensor, drawn: Tensor, sigma: float = 10.0) -> float:
    """Measure the CLIP maximum mean discrepancy: squared, with a Gaussian kernel, times 1000.

    Jayasumana et al. (arXiv:2401.09603) section 4:  k(x, y) = exp(-‖x - y‖² / 2σ²), σ = 10, and the unbiased estimate

        mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean_{i,j} k(x_i, y_j)

    of embeddings of length 1. The code published with it keeps the terms i = j, which adds about 2 (1 - mean k) / N;
    without them two sets of one kind differ by 0 on average, now and then by a little less.

    Args:
        real, drawn: (N, D) and (M, D) CLIP embeddings of pictures, of any length; N and M at least 2.
    """
    real, drawn = (nn.functional.normalize(features.double(), dim=1) for features in (real, drawn))
    within = (_mean_kernel(real, real, sigma), _mean_kernel(drawn, drawn, sigma))
    counts = (len(real), len(drawn))
    own = sum((mean * n - 1) / (n - 1) for mean, n in zip(within, counts, strict=True))  # k(x, x) = 1 left out
    return 1000 * (own - 2 * _mean_kernel(real, drawn, sigma))


def _mean_kernel(a: Tensor, b: Tensor, sigma: float) -> float:
    """Return the mean Gaussian kernel of all pairs of (N, D) and (M, D) unit vectors, some rows at a time."""
    sums = [torch.exp(-(2 - 2 * part @ b.T) / (2 * sigma**2)).sum() for part in a.split(1024)]
    return float(torch.stack(sums).sum()) / (len(a) * len(b))

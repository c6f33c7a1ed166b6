"""`KMeansAssigner`: the nearest of K centres, the pseudo-labels of self-guided diffusion."""

from __future__ import annotations

import warnings
from typing import Any, Literal, cast

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffusers_repr.assign.base import Assigner, register_assigner
from diffusers_repr.assign.inverted_lists import has_faiss, require_faiss
from diffusers_repr.hub.checks import check_sizes, check_whole

Backend = Literal["faiss", "sklearn"]
_SEEDING = 20  # rows a centre, among which first centres are drawn
_APART = 1e-3  # how far the halves of a split cluster start from its centre
_SPLITS = 20
_VALUES = 1 << 24  # of distances that are held at a time


@register_assigner("kmeans")
class KMeansAssigner(Assigner):
    """Clusters of the training images (Hu et al. 2023, arXiv 2210.06462, section 3.2); the null id is K.

    Lloyd's algorithm on Euclidean distances; with `normalize` features are scaled to length 1 first, at fit and at
    assign alike, and centres are plain means of them. An empty cluster takes half of the largest one.

    Args:
        in_features: D of the features.
        num_clusters: K.
        normalize: Go by the cosine; False: by Euclidean distance.
        iterations: Of Lloyd's algorithm at most; it ends where nothing changes.
        init: First centres: `k-means++`, or `random` rows, as the paper's code.
        rows_per_cluster: It is fitted on at most K times as many rows, drawn at random.
        backend: `faiss` (the extra of this name) or `sklearn`; faiss where it is installed if None. The config says
            which it was. What is assigned depends on the centres alone.

    Example:
        >>> features = torch.tensor([[0.0, 0.1], [0.1, 0.0], [5.0, 5.0], [5.1, 5.0]])
        >>> ids = KMeansAssigner(2, 2, normalize=False).fit(features).assign(features)
        >>> (bool(ids[0] == ids[1]), bool(ids[2] == ids[3]), bool(ids[0] == ids[2]))
        (True, True, False)
    """

    gives = "class"

    centers: Tensor

    @register_to_config
    def __init__(
        self,
        in_features: int,
        num_clusters: int,
        normalize: bool = True,
        iterations: int = 30,
        init: str = "k-means++",
        rows_per_cluster: int = 256,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.make_state(in_features, normalize)
        check_sizes(num_clusters=num_clusters)
        check_whole("iterations", iterations)
        check_whole("rows_per_cluster", rows_per_cluster)
        if init not in ("k-means++", "random"):
            raise ValueError(f"init is 'k-means++' or 'random'; got {init!r}.")
        if backend not in (None, "faiss", "sklearn"):
            raise ValueError(f"backend is 'faiss' or 'sklearn'; got {backend!r}.")
        self.num_clusters, self.backend = num_clusters, backend or ("faiss" if has_faiss() else "sklearn")
        self.register_to_config(backend=self.backend)
        self.most_rows = num_clusters * rows_per_cluster
        self.register_buffer("centers", torch.zeros(num_clusters, in_features))

    def fit_prepared(self, features: Tensor, generator: torch.Generator) -> None:
        """See `Assigner`.

        Raises:
            ValueError: For fewer images than clusters, or fewer different ones.
        """
        count, most = self.num_clusters, self.num_clusters * self.config["rows_per_cluster"]
        if len(features) < count:
            raise ValueError(f"{count} clusters of {len(features)} images; ask for at most as many clusters.")
        if len(features) > most:
            features = features[torch.randperm(len(features), generator=generator)[:most].sort().values]
        features = features.cpu()
        if self.config["init"] == "random":
            centers = features[torch.randperm(len(features), generator=generator)[:count]]
        else:
            some = torch.randperm(len(features), generator=generator)[: _SEEDING * count]
            centers = spread_centers(features[some], count, generator)
        seed = int(torch.randint(2**31, (1,), generator=generator))
        fit = _fit_faiss if self.backend == "faiss" else _fit_sklearn
        for _ in range(_SPLITS):
            centers = fit(features, centers, self.config["iterations"], seed)
            held = torch.bincount(nearest_centers(features, centers), minlength=count)
            if bool((held > 0).all()):
                self.centers.copy_(centers)
                return
            centers = split_largest(centers, held, generator)
        different = len(features.unique(dim=0))
        raise ValueError(
            f"{int((held == 0).sum())} of {count} clusters stay empty: of {len(features)} features {different} are "
            "different. Ask for fewer clusters."
        )

    def assign_prepared(self, features: Tensor) -> Tensor:
        """Ids `(B,)`, int64; of equally near centres the lower id."""
        return nearest_centers(features, self.centers.float())

    @property
    def null(self) -> Tensor:
        """K."""
        return torch.tensor(self.num_clusters)


def nearest_centers(features: Tensor, centers: Tensor) -> Tensor:
    """Ids of the nearest centres `(B,)` of features `(B, D)`, a part of them at a time.

    The two nearest by float32 are compared in float64, so that an id does not depend on the batch around it.
    """
    offsets, ids = centers.square().sum(1), []
    for part in features.split(max(1, _VALUES // len(centers))):
        two = torch.addmm(offsets, part, centers.T, alpha=-2).topk(min(2, len(centers)), largest=False).indices
        two = two.sort(dim=1).values
        distances = (part[:, None].double() - centers[two].double()).square().sum(-1)
        ids.append(two.gather(1, distances.argmin(1, keepdim=True))[:, 0])
    return torch.cat(ids)


def spread_centers(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """First centres `(count, D)`: rows, each drawn by its squared distance to those before (k-means++).

    Arthur and Vassilvitskii 2007, section 2.2.
    """
    chosen = [int(torch.randint(len(features), (1,), generator=generator))]
    squares = features.square().sum(1)
    nearest = torch.full((len(features),), torch.inf)
    while len(chosen) < count:
        new = chosen[-1]
        distances = (squares + squares[new] - 2 * features @ features[new]).clamp(min=0)
        nearest = torch.minimum(nearest, distances)
        nearest[new] = 0
        weights = nearest if bool(nearest.sum() > 0) else torch.ones_like(nearest)
        at = torch.rand(1, generator=generator, dtype=torch.float64) * weights.double().sum()
        chosen.append(int(torch.searchsorted(weights.double().cumsum(0), at).clamp(max=len(features) - 1)))
    return features[chosen]


def split_largest(centers: Tensor, held: Tensor, generator: torch.Generator) -> Tensor:
    """Centres of which every empty one has become a half of the largest cluster left, a little apart from the other.

    Args:
        centers: `(K, D)`.
        held: `(K,)`, rows of each.
        generator: Of the direction of the split.
    """
    centers, left = centers.clone(), held.clone()
    for empty in (held == 0).nonzero()[:, 0].tolist():
        largest = int(left.argmax())
        step = torch.randn(centers.shape[1], generator=generator)
        step *= _APART * centers[largest].norm().clamp(min=_APART) / step.norm()
        centers[empty], centers[largest] = centers[largest] - step, centers[largest] + step
        left[empty] = left[largest] // 2
        left[largest] -= left[empty]
    return centers


def _fit_sklearn(features: Tensor, centers: Tensor, iterations: int, seed: int) -> Tensor:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    first = cast(Any, centers.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # empty clusters: told by the caller
        fitted = KMeans(len(centers), init=first, n_init=1, max_iter=iterations, tol=0, random_state=seed).fit(
            features
        )
    return torch.from_numpy(fitted.cluster_centers_).float()


def _fit_faiss(features: Tensor, centers: Tensor, iterations: int, seed: int) -> Tensor:
    faiss = require_faiss('KMeansAssigner(backend="faiss")')
    points = {"min_points_per_centroid": 1, "max_points_per_centroid": len(features)}
    kmeans = faiss.Kmeans(features.shape[1], len(centers), niter=iterations, seed=seed, verbose=False, **points)
    kmeans.train(features.contiguous().numpy(), init_centroids=centers.contiguous().numpy())
    return torch.from_numpy(kmeans.centroids.copy())


__all__ = ["KMeansAssigner", "nearest_centers", "split_largest", "spread_centers"]

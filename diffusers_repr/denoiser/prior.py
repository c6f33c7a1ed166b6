"""`Prior`: how conditions are drawn at sampling, where none are given."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from diffusers_repr.hub.checks import check_whole
from diffusers_repr.hub.files import atomic_files, json_text, read_json
from diffusers_repr.hub.schema import boolean, listing, number, one_of, record

Generators = torch.Generator | Sequence[torch.Generator] | None
FILE, TENSORS = "prior.json", "prior.safetensors"
_SCHEMAS = {
    "histogram": record({"kind": one_of("histogram"), "frequencies": listing(number(0), 1)}),
    "stored": record({"kind": one_of("stored"), "in_order": boolean()}),
}


class Prior(ABC):
    """How conditions are drawn at sampling: `pipe(batch_size=8, prior=prior)`. A subclass makes `sample`.

    Attributes:
        kind: Name in its file; None of one that is no data, and cannot be saved.
    """

    kind: ClassVar[str | None] = None

    @abstractmethod
    def sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        """`count` conditions: class ids `(count,)`, vectors `(count, D)`, tokens or maps."""

    def draw(self, count: int, generator: Generators = None) -> Tensor:
        """Conditions, one a sample.

        Args:
            count: How many.
            generator: One, or one a sample, which makes a condition independent of its batch.

        Raises:
            ValueError: If the prior gives another number of them.
        """
        check_whole("count", count)
        if isinstance(generator, (list, tuple)):
            if len(generator) != count:
                raise ValueError(f"{len(generator)} generators for {count} conditions.")
            return torch.cat([self.draw(1, one).cpu() for one in generator])
        values = self.sample(count, generator)  # type: ignore[arg-type]
        if len(values) != count:
            raise ValueError(f"{type(self).__name__} gave {len(values)} conditions; {count} were asked for.")
        return values

    def files(self) -> dict[str, bytes | str]:
        """What is saved, by file name.

        Raises:
            TypeError: For a prior that is code.
        """
        raise TypeError(f"A {type(self).__name__} is code, which is not saved; save what it is made of.")

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `prior.json`, and the tensors beside it.

        Args:
            folder: Made where it is missing; may be that of the model.
        """
        atomic_files(folder, self.files())


class HistogramPrior(Prior):
    """Class ids by their frequency in a data set.

    Args:
        frequencies: Of each class, any scale: counts will do.

    Example:
        >>> HistogramPrior.uniform(10).draw(3, torch.Generator().manual_seed(0))
        tensor([4, 9, 3])
    """

    kind = "histogram"

    def __init__(self, frequencies: Sequence[float] | Tensor) -> None:
        self.frequencies = torch.as_tensor(frequencies, dtype=torch.float64).cpu()
        if self.frequencies.ndim != 1 or not bool(self.frequencies.isfinite().all()) or not self.frequencies.sum() > 0:
            raise ValueError(f"frequencies are one number a class, of a sum above 0; got {frequencies!r}.")
        if bool((self.frequencies < 0).any()):
            raise ValueError(f"frequencies are 0 or more; got {float(self.frequencies.min())}.")

    @classmethod
    def uniform(cls, classes: int) -> HistogramPrior:
        """All classes alike."""
        return cls([1.0] * check_whole("classes", classes))

    @classmethod
    def of_labels(cls, labels: Any, classes: int) -> HistogramPrior:
        """Of a data set's class ids; those below 0 are none.

        Args:
            labels: Whole numbers, such as the `class_id` of a store of assignments.
            classes: K.

        Raises:
            ValueError: For what are no ids, and ids of K and more.
        """
        ids = torch.as_tensor(labels).reshape(-1)
        if ids.is_floating_point() or ids.is_complex():
            raise ValueError(f"labels are whole numbers; got {ids.dtype}.")
        if len(ids) and int(ids.max()) >= classes:
            raise ValueError(f"labels go up to {int(ids.max())}; of {classes} classes the last is {classes - 1}.")
        return cls(torch.bincount(ids[ids >= 0], minlength=classes))

    def sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        """See `Prior`."""
        device = "cpu" if generator is None else generator.device
        if bool((self.frequencies == self.frequencies[0]).all()):
            return torch.randint(len(self.frequencies), (count,), generator=generator, device=device)
        weights = self.frequencies.to(device, torch.float32)
        return torch.multinomial(weights, count, replacement=True, generator=generator)

    def files(self) -> dict[str, bytes | str]:
        """See `Prior`."""
        return {FILE: json_text({"kind": self.kind, "frequencies": self.frequencies.tolist()}, FILE)}


class StoredPrior(Prior):
    """Rows of what was stored: the conditions of a training or held-out set.

    Args:
        values: `(N, ...)`: class ids, vectors, tokens or maps.
        in_order: One after the other, from the first on, going on where the last call ended; else at random, with
            replacement.
    """

    kind = "stored"

    def __init__(self, values: Tensor, in_order: bool = False) -> None:
        if not isinstance(values, Tensor) or not values.ndim or not len(values):
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"values are a tensor (N, ...) with N of 1 or more; got {found}.")
        self.values, self.in_order, self._next = values, in_order, 0

    def sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        """See `Prior`."""
        if self.in_order:
            rows = (self._next + torch.arange(count)) % len(self.values)
            self._next = (self._next + count) % len(self.values)
        else:
            device = "cpu" if generator is None else generator.device
            rows = torch.randint(len(self.values), (count,), generator=generator, device=device)
        return self.values[rows.to(self.values.device)]

    def files(self) -> dict[str, bytes | str]:
        """See `Prior`."""
        values = save({"values": self.values.detach().cpu().contiguous()})
        return {FILE: json_text({"kind": self.kind, "in_order": self.in_order}, FILE), TENSORS: values}


class GeneratorPrior(Prior):
    """Conditions from a learned generator, such as a diffusion model of vectors (RCG).

    Args:
        generate: `(count, generator) -> conditions`; of a pipeline `lambda n, g: pipe(batch_size=n, generator=g)[0]`.
    """

    def __init__(self, generate: Callable[[int, torch.Generator | None], Tensor]) -> None:
        self.generate = generate

    def sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        """See `Prior`."""
        return self.generate(count, generator)


class QueryPrior(Prior):
    """Conditions by a query: texts or images, through whatever finds what they stand for.

    Args:
        queries: Texts, images, ...; with more samples than queries they come in turn, from the first in each call.
        find: Queries -> one condition each: an encoder, an index of neighbours.
    """

    def __init__(self, queries: Sequence[Any], find: Callable[[Sequence[Any]], Tensor]) -> None:
        if isinstance(queries, str) or not len(queries):
            raise ValueError(f"queries are a list of one or more; got {queries!r}.")
        self.queries, self.find = queries, find

    def draw(self, count: int, generator: Generators = None) -> Tensor:
        """See `Prior`; nothing is random."""
        return super().draw(count)

    def sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        """See `Prior`."""
        found = self.find(self.queries)
        if len(found) != len(self.queries):
            raise ValueError(f"{len(self.queries)} queries gave {len(found)} conditions; one each is needed.")
        return found[torch.arange(count) % len(found)]


def load_prior(folder: str | os.PathLike[str]) -> Prior:
    """A prior that `save_pretrained` wrote: data alone, of the kinds `histogram` and `stored`.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: For a file of another kind, or a damaged one.
    """
    path = Path(folder) / FILE
    found = read_json(path)
    kind = found.get("kind") if isinstance(found, Mapping) else None
    if not isinstance(kind, str) or kind not in _SCHEMAS:
        raise ValueError(f"{path}: kind is one of {', '.join(_SCHEMAS)}; got {kind!r}.")
    data = _SCHEMAS[kind](found, str(path))
    if kind == "histogram":
        try:
            return HistogramPrior(data["frequencies"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    tensors = Path(folder) / TENSORS
    try:
        return StoredPrior(load_file(tensors)["values"], data["in_order"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{tensors} is no file of a stored prior: {error}.") from error


__all__ = ["GeneratorPrior", "HistogramPrior", "Prior", "QueryPrior", "StoredPrior", "load_prior"]

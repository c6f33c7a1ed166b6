"""What two processes do for `test_gather.py`: every metric on 23 samples, a prime number."""

import warnings

import pytest
import torch
from accelerate import Accelerator

from diffusers_repr.metrics import cka, cknna, frechet_distance, gather_rows, measure_generation, own_rows
from diffusers_repr.metrics.gather import failing_together
from diffusers_repr.sweep import knn_probe, measure_alignment, select_features
from tests.metrics.models import images, rows_denoiser, rows_encoder

COUNT = 23


class Indexed(torch.utils.data.Dataset):
    def __init__(self, features):
        self.features = features

    def __len__(self):
        return len(self.features)

    def __getitem__(self, index):
        return {"features": self.features[index], "index": index}


def padded(accelerator, features):
    """Rows and places as accelerate's loader deals them: the last batches are filled up with the first samples."""
    loader = accelerator.prepare(torch.utils.data.DataLoader(Indexed(features), batch_size=4))
    batches = list(loader)
    return torch.cat([b["features"] for b in batches]), torch.cat([b["index"] for b in batches])


def features():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(COUNT, 3, generator=generator)
    b = a + torch.randn(COUNT, 3, generator=generator)
    return torch.cat([a, b, torch.arange(COUNT)[:, None] % 2], 1)


def measure(whole):
    """Every metric; what is not of `whole` is shared between the processes inside."""
    x, y, labels = whole[:, :3], whole[:, 3:6], whole[:, 6].long()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        a, b = images(COUNT), images(COUNT, seed=1)
        settings = {"metrics": ("cknna", "cka"), "k": 3, "batch_size": 5}
        sweep = measure_alignment(rows_denoiser(), rows_encoder(), a, [50, 400], **settings)
        grid = ([50, 400], None, "neg_brier")
        selection = select_features(
            rows_denoiser(), (a, labels), (b, labels), *grid, batch_size=5, seeds=(0, 1), progress=False
        ).to_dict()
        selection["recipe"].pop("forwards")  # smaller shares fill fewer batches
        generation = measure_generation(rows_encoder(), a, b, batch_size=5)
    return {
        "cknna": cknna(x, y, 3),
        "cka": cka(x, y),
        "frechet": frechet_distance(x, y),
        "knn": knn_probe(x, labels, y, labels, k=3).accuracy,
        "sweep": sweep.to_dict(),
        "selection": selection,
        "generation": {name: record.to_dict() for name, record in generation.items()},
    }


def break_the_first(accelerator):
    with failing_together():
        if accelerator.is_main_process:
            raise KeyError("broken image")


def run():
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2, accelerator.num_processes
    expected = features()
    rows, index = padded(accelerator, expected)
    assert int(accelerator.reduce(torch.tensor(len(index)), "sum")) == 24  # one sample came twice
    whole = gather_rows(rows, index, COUNT)
    assert torch.equal(whole, expected)
    mine = own_rows(COUNT)
    assert len(mine) in (11, 12)
    assert torch.equal(gather_rows(expected[mine], torch.tensor(mine), COUNT), expected)
    lone = expected if accelerator.is_main_process else expected[:0]  # a process without rows
    assert torch.equal(gather_rows(lone, torch.arange(len(lone)), COUNT), expected)
    error = KeyError if accelerator.is_main_process else RuntimeError
    with pytest.raises(error, match="broken image"):
        break_the_first(accelerator)
    return measure(whole)

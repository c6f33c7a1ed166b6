"""Latents of REPA's preprocessing against its own way of reading them, written out."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from diffusers_repr.data.config import DataConfig
from diffusers_repr.data.loading import load_train_data
from diffusers_repr.denoiser.vae import draw_latents
from tests.data.latent_cases import load, make, make_vae
from tests.data.test_edm_folder import write

CLASSES = [3, 0, 0, 1, 3]
NAME = "img-mean-std-{:08d}.npy"


@pytest.fixture(scope="module")
def vae():
    return make_vae(shift_factor=None, scaling_factor=0.18215)


@pytest.fixture
def folder(tmp_path, vae):
    """`images` and `vae-sd`, made as the paper's tool makes them."""
    images, pairs = write(tmp_path / "images", CLASSES), []
    for name, label in images:
        at = int(name[-12:-4])
        pixels = torch.full((1, 3, 8, 8), float(at)) / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        file = name.split("/")[0] + "/" + NAME.format(at)
        (tmp_path / "vae-sd" / file).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "vae-sd" / file, torch.cat([posterior.mean, posterior.std], 1)[0].numpy())
        pairs.append([file, label])
    (tmp_path / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return tmp_path


def opened(folder, vae, **settings):
    config = DataConfig(str(folder), latents_dir=str(folder / "vae-sd"), **settings)
    return load_train_data(config, 3, 8, vae=vae)


def test_what_a_step_sees_is_what_the_papers_code_gives(folder, vae):
    data = opened(folder, vae)
    assert (len(data), data.num_classes) == (5, 4)
    rows = [4, 0, 2]
    batch = data.on_device(default_collate([data[row] for row in rows]))
    assert batch["class_labels"].tolist() == [CLASSES[row] for row in rows]
    assert "pixel_values" not in batch
    latents = draw_latents(batch["moments"], vae, torch.Generator().manual_seed(3))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    for at, row in enumerate(rows):
        held = torch.from_numpy(np.load(folder / "vae-sd" / f"{row // 2:05d}" / NAME.format(row)))
        mean, std = held.chunk(2)
        assert torch.allclose(latents[at], (mean + std * noise[at]) * 0.18215, atol=1e-6)
    assert data.fingerprint() == opened(folder, vae).fingerprint()
    (folder / "vae-sd" / "00000" / NAME.format(0)).write_bytes(
        (folder / "vae-sd" / "00000" / NAME.format(1)).read_bytes()
    )
    assert data.fingerprint() != opened(folder, make_vae(shift_factor=None, scaling_factor=0.18215)).fingerprint()


def test_what_does_not_fit(folder, vae):
    with pytest.raises(FileExistsError, match="write the cache elsewhere"):
        make(folder / "vae-sd", load(), vae)
    with pytest.raises(ValueError, match="no mirrored images"):
        opened(folder, vae, random_flip=True)
    with pytest.raises(ValueError, match="not what the run's VAE gives of its image"):
        opened(folder, make_vae(7, shift_factor=None))
    with pytest.raises(ValueError, match=r"are \(8, 4, 4\); this VAE gives \(6, 4, 4\)"):
        opened(folder, make_vae(latent_channels=3))
    with pytest.raises(ValueError, match="11 images of the run have none by shard and number"):
        load(None, 8, vae, latents_dir=str(folder / "vae-sd"))
    labels = json.loads((folder / "vae-sd" / "dataset.json").read_text())
    labels["labels"][2][1] = 1
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps(labels))
    with pytest.raises(ValueError, match=r"gives '00001/img-mean-std-00000002\.npy' the class 1, .* has 0"):
        opened(folder, vae)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (np.zeros((8, 2, 2)), r"are \(8, 2, 2\)"),
        (np.full((8, 4, 4), np.nan), "not finite"),
        (np.array([object()]), "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_damaged_is_named(folder, vae, held, message):
    file = folder / "vae-sd" / "00001" / NAME.format(3)
    data = opened(folder, vae)
    if held is None:
        file.write_bytes(b"damaged")
    else:
        np.save(file, held, allow_pickle=True)
    with pytest.raises(ValueError, match=rf"img-mean-std-00000003\.npy'.*{message}"):
        data[3]

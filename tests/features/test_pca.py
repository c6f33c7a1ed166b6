"""Principal components of features as colours, beside the images."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

from diffusers_repr import Denoiser, FeatureExtractor
from diffusers_repr.features import FeatureOutput
from diffusers_repr.features.pca import pca_rgb
from diffusers_repr.noise import NoiseLevel


def by_svd(maps: np.ndarray) -> np.ndarray:
    """`(B, h, w, 3)` by the singular value decomposition of the centred cells."""
    cells = maps.transpose(0, 2, 3, 1).reshape(-1, maps.shape[1]).astype(np.float64)
    cells = cells - cells.mean(0)
    u, s, vt = np.linalg.svd(cells, full_matrices=False)
    scores = (u * s)[:, :3]
    for k in range(3):
        scores[:, k] *= np.sign(vt[k][np.abs(vt[k]).argmax()])
    low, high = np.quantile(scores, 0.01, axis=0), np.quantile(scores, 0.99, axis=0)
    return np.clip((scores - low) / (high - low), 0, 1).reshape(len(maps), *maps.shape[2:], 3)


@pytest.mark.parametrize("shape", [(3, 7, 4, 6), (1, 40, 3, 5), (2, 3, 8, 8)])
def test_equal_to_an_svd(shape):
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 3
    np.testing.assert_allclose(pca_rgb(maps).numpy(), by_svd(maps.numpy()), atol=1e-5)


def test_signs_do_not_depend_on_the_order_of_images():
    maps = torch.randn(4, 9, 5, 5, generator=torch.Generator().manual_seed(2))
    turned = [2, 0, 3, 1]
    torch.testing.assert_close(pca_rgb(maps[turned]), pca_rgb(maps)[turned], atol=1e-6, rtol=0)
    assert torch.equal(pca_rgb(maps.requires_grad_()), pca_rgb(maps))


def test_a_component_that_is_not_there_is_grey():
    maps = torch.zeros(1, 5, 4, 4)
    maps[0, 1] = torch.arange(16.0).reshape(4, 4)
    found = pca_rgb(maps)
    assert (found[..., 1:] == 0.5).all()
    assert found[0, 0, 0, 0] == 0
    assert found[0, 3, 3, 0] == 1


def test_too_few_channels_or_no_map():
    with pytest.raises(ValueError, match="16 cells of 2 channels"):
        pca_rgb(torch.rand(1, 2, 4, 4))
    with pytest.raises(ValueError, match=r"maps \(B, C, h, w\)"):
        pca_rgb(torch.rand(2, 8))


class TestFigure:
    level = NoiseLevel(timestep=30)

    def output(self, count=3, **changes):
        tokens = torch.randn(2, count, 5 + 12, 8, generator=torch.Generator().manual_seed(0))
        levels = [NoiseLevel(timestep=30), NoiseLevel(timestep=400)]
        images = [Image.new("RGB", size, "blue") for size in ((60, 45), (40, 40), (45, 60))][:count]
        return FeatureOutput({"blocks.1": tokens}, levels, {"blocks.1": ((3, 4), 5)}, **{"images": images, **changes})

    def test_a_column_for_each_level_over_the_extent_of_each_image(self):
        output = self.output()
        figure = output.plot_pca("blocks.1")
        axes = np.array(figure.axes).reshape(3, 3)
        assert [axis.get_title() for axis in axes[0]] == ["image", "timestep 30", "timestep 400"]
        for row, (width, height) in enumerate(((60, 45), (40, 40), (45, 60))):
            (shown,) = axes[row][0].get_images()
            np.testing.assert_array_equal(shown.get_array(), np.full((height, width, 3), (0, 0, 1)))
            for level in (0, 1):
                (drawn,) = axes[row][1 + level].get_images()
                assert drawn.get_extent() == [0, width, height, 0]
                assert axes[row][1 + level].get_aspect() == 1  # a pixel is as high as it is wide
                maps = output.features["blocks.1"][level][:, 5:].transpose(1, 2).unflatten(2, (3, 4))
                np.testing.assert_allclose(drawn.get_array(), by_svd(maps.numpy())[row], atol=1e-5)

    def test_images_of_the_extractor_are_kept_and_the_first_are_shown(self, tmp_path):
        unet = UNet2DModel(
            8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )  # fmt: skip
        photographs = [Image.new("L", (24, 16), 10 * shade) for shade in range(3)]
        extractor = FeatureExtractor(Denoiser(unet, DDPMScheduler()), "mid_block", 200, image_size=(16, 24))
        figure = extractor(photographs).plot_pca("mid_block", limit=2)
        assert "(2 of 3 images)" in figure.get_suptitle()
        assert len(figure.axes) == 4
        assert figure.axes[2].get_images()[0].get_array().shape == (16, 24, 3)
        figure.savefig(tmp_path / "pca.png")
        with Image.open(tmp_path / "pca.png") as picture:
            assert picture.width > picture.height > 100
        pooled = extractor.replace(pooling="mean")(photographs)
        assert pooled.images is None
        with pytest.raises(ValueError, match="Features were pooled"):
            pooled.plot_pca("mid_block")

    def test_other_images_may_be_shown_if_they_are_as_many(self):
        larger = torch.rand(3, 3, 90, 120)
        figure = self.output().plot_pca("blocks.1", larger)
        assert figure.axes[1].get_images()[0].get_extent() == [0, 120, 90, 0]
        with pytest.raises(ValueError, match="2 images for the features of 3"):
            self.output().plot_pca("blocks.1", larger[:2])
        with pytest.raises(ValueError, match="came without their images"):
            self.output(images=None).plot_pca("blocks.1")
        with pytest.raises(KeyError, match=r"'blocks\.2' was not extracted"):
            self.output().plot_pca("blocks.2")
        with pytest.raises(ValueError, match="limit"):
            self.output().plot_pca("blocks.1", limit=0)

    def test_videos_are_refused(self):
        values = torch.rand(1, 4, 2, 3, 3)
        output = FeatureOutput({"x": values.flatten(2).transpose(1, 2)}, self.level, {"x": ((2, 3, 3), 0)})
        with pytest.raises(ValueError, match="of videos"):
            output.plot_pca("x", torch.rand(1, 3, 8, 8))

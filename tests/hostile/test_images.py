"""Image files of others: read right, or refused by name, by every reader alike."""

import io
import struct
import warnings
import zlib

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from PIL import Image, ImageCms

from diffusers_repr import Denoiser, FeatureExtractor
from diffusers_repr.data.image_column import ImagePixels
from diffusers_repr.data.image_data import from_dataset
from diffusers_repr.data.image_files import MAX_PIXELS_VARIABLE, UnreadableImage, read_image
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.encoders import Encoder
from diffusers_repr.features.extraction import extract_to_store
from diffusers_repr.sweep import measure_alignment, select_features
from diffusers_repr.tasks import Probe
from tests.sweep.selection_models import Rows, planted, striped
from tests.testers.models import build

SIDE = 8
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)


def encoded(image, kind="PNG", **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def huge(width, height):
    """A PNG of a few bytes that says it is enormous."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def turned():
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn clockwise to be seen upright
    return encoded(Image.fromarray(COLOUR), exif=exif)


def palette():
    image = Image.fromarray(GREY % 4, "L").convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0, 7, 7, 7])
    return image


def over_white(colour, alpha):
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


def palette_on_white():
    colours = np.array([[10, 20, 30], [200, 100, 50], [0, 255, 0], [7, 7, 7]])[GREY % 4]
    return np.where((GREY % 4 == 1)[..., None], 255, colours)


SRGB = ImageCms.createProfile("sRGB")
SIXTEEN = RNG.integers(0, 65536, (SIDE, SIDE), dtype=np.uint16)
CMYK = RNG.integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
FRAMES = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
RIGHT = {  # bytes of a file, and (H, W, 3) in 0..255 that it shows
    "grey": (encoded(Image.fromarray(GREY)), np.repeat(GREY[..., None], 3, 2)),
    "16 bits": (encoded(Image.fromarray(SIXTEEN)), np.repeat(SIXTEEN[..., None] / 257, 3, 2)),
    "16 bits, TIFF": (encoded(Image.fromarray(SIXTEEN), "TIFF"), np.repeat(SIXTEEN[..., None] / 257, 3, 2)),
    "transparent": (
        encoded(Image.fromarray(np.dstack([COLOUR, ALPHA]), "RGBA")),
        over_white(COLOUR, ALPHA),
    ),
    "transparent grey": (
        encoded(Image.fromarray(np.dstack([GREY, ALPHA]), "LA")),
        over_white(np.repeat(GREY[..., None], 3, 2), ALPHA),
    ),
    "palette": (encoded(palette(), transparency=1), palette_on_white()),
    "CMYK": (
        encoded(Image.fromarray(CMYK, "CMYK"), "TIFF"),
        (255 - CMYK[..., :3].astype(float)) * (255 - CMYK[..., 3:].astype(float)) / 255,
    ),
    "turned": (turned(), np.rot90(COLOUR, -1)),
    "moving GIF": (
        encoded(palette(), "GIF", save_all=True, append_images=[palette().rotate(90)], duration=9),
        np.array([[10, 20, 30], [200, 100, 50], [0, 255, 0], [7, 7, 7]])[GREY % 4],
    ),
    "moving PNG": (encoded(FRAMES[0], save_all=True, append_images=FRAMES[1:], duration=9), COLOUR),
    "black and white": (
        encoded(Image.fromarray(GREY > 99)),
        np.repeat(np.where(GREY > 99, 255, 0)[..., None], 3, 2),
    ),
    "another ending": (encoded(Image.fromarray(COLOUR), "BMP"), COLOUR),
}
WRONG = {
    "empty": (b"", "cannot be read: it is no image of a format that PIL knows, or empty"),
    "text": (b"no image", "cannot be read: it is no image of a format"),
    "cut": (encoded(Image.fromarray(COLOUR))[:-60], "cannot be read: "),
    "cut JPEG": (encoded(Image.fromarray(np.tile(COLOUR, (9, 9, 1))), "JPEG")[:-600], "cannot be read: .*truncated"),
    "huge": (huge(60_000, 60_000), f"cannot be read: .*3600000000 pixels.*set {MAX_PIXELS_VARIABLE}"),
    "huger": (huge(2**31 - 1, 2**31 - 1), "cannot be read: "),
    "no pixels": (huge(0, 8), "cannot be read: "),
    "32 bits": (encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "cannot be used: .*'I' has no known range"),
    "floats": (encoded(Image.fromarray(GREY / 255.0).convert("F"), "TIFF"), ".*mode 'F' has no known range"),
    "Lab": (
        encoded(
            ImageCms.profileToProfile(Image.fromarray(COLOUR), SRGB, ImageCms.createProfile("LAB"), outputMode="LAB"),
            "TIFF",
        ),
        ".*mode 'LAB' has no known range",
    ),
}


def column(files, mode=None):
    rows = {"image": [{"bytes": data, "path": f"photo{i}.png"} for i, data in enumerate(files)]}
    return Dataset.from_dict(rows, features=Features({"image": datasets.Image(mode=mode)}))


@pytest.mark.parametrize("case", RIGHT)
def test_what_an_image_shows_reaches_every_reader(tmp_path, case):
    data, shown = RIGHT[case]
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    (batch,) = [images for images, _ in from_dataset(column([data])).batches(2)]
    for image in (read_image(path, "The image"), batch[0]):
        found = (to_pixels(image)[0].permute(1, 2, 0).numpy() + 1) / 2 * 255
        np.testing.assert_allclose(found, shown, atol=1.01)  # PIL rounds
    trained = ImagePixels(column([data]), "image", 3, SIDE, cache=False)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(trained, shown, atol=1.01)


def test_a_declared_mode_does_not_clip_16_bits():
    data, shown = RIGHT["16 bits"]
    ((images, _),) = from_dataset(column([data], "RGB")).batches(1)
    assert images[0].mode == "RGB"
    np.testing.assert_allclose(np.asarray(images[0]), shown, atol=0.51)


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_broken_image_is_named_by_every_reader(tmp_path, case):
    data, message = WRONG[case]
    path = tmp_path / "photo1.png"
    path.write_bytes(data)
    both = column([RIGHT["grey"][0], data])
    readers = {
        r"The image \(.*photo1\.png\) ": lambda: read_image(path, "The image"),
        r"Row 1 of dataset \(split 'train'\) \(photo1.png\) ": lambda: list(from_dataset(both).batches(2)),
        r"The image of row 1 \(photo1.png\) ": lambda: ImagePixels(both, "image", 1, SIDE, cache=False)[1],
    }
    for name, read in readers.items():
        with pytest.raises(UnreadableImage, match=name + message):
            read()


def test_one_pixel_and_other_sizes_are_no_fault():
    one = encoded(Image.fromarray(COLOUR[:1, :1]))
    assert to_pixels(read_image({"bytes": one, "path": None}, "x"), 3, SIDE).shape == (1, 3, SIDE, SIDE)


def test_the_bound_on_pixels_is_set_by_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "photo.png"
    path.write_bytes(RIGHT["grey"][0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "31")
    with pytest.raises(UnreadableImage, match="photo.png.*64 pixels"):
        read_image(path, "The image")
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "64")
    assert read_image(path, "The image").size == (SIDE, SIDE)
    for wrong in ("0", "-1", "many", ""):
        monkeypatch.setenv(MAX_PIXELS_VARIABLE, wrong)
        with pytest.raises(ValueError, match=f"{MAX_PIXELS_VARIABLE}='{wrong}'; it is a whole number"):
            read_image(path, "The image")


def test_extraction_selection_probe_and_alignment_name_the_row(tmp_path):
    files = [encoded(Image.fromarray(GREY + i)) for i in range(6)]
    rows = column(files).add_column("label", [0, 1] * 3)
    broken = column([*files[:4], WRONG["cut"][0], files[5]]).add_column("label", [0, 1] * 3)
    ddpm = Denoiser.from_pipe(build("ddpm"))
    read = FeatureExtractor(ddpm, "mid_block", 7, pooling="mean", batch_size=3)
    quick = {"progress": False, "max_layers": 1, "max_levels": 1, "seeds": (0,)}
    encoder = Encoder.from_module(torch.nn.Conv2d(1, 4, 4, 4), patch_size=4, channels=1)
    one = planted(layer=Rows((0,)))
    uses = [
        lambda: extract_to_store(read, from_dataset(broken), tmp_path / "out", progress=False),
        lambda: select_features(one, from_dataset(rows), from_dataset(broken), [7], **quick),
        lambda: select_features(one, from_dataset(broken), from_dataset(rows), [7], **quick),
        lambda: Probe.fit(read, from_dataset(broken)),
        lambda: measure_alignment(ddpm, encoder, from_dataset(broken), [7], ["mid_block"], k=2, batch_size=2),
    ]
    for use in uses:
        with pytest.raises(UnreadableImage, match=r"Row 4 of dataset \(split 'train'\) \(photo4.png\) cannot be read"):
            use()
    assert not list((tmp_path / "out").rglob("*.parquet"))


# The same images in both splits


def test_images_that_stand_in_both_splits():
    model, quick = planted(layer=Rows((0,))), {"progress": False, "max_layers": 1, "max_levels": 1, "seeds": (0,)}
    (x, y), (z, w) = striped(24, 0), striped(12, 1)
    read = FeatureExtractor(model, "layer", 7, pooling="mean")

    def fits(held):
        encoder = Encoder.from_module(torch.nn.Conv2d(1, 4, 4, 4), patch_size=4, channels=1)
        yield lambda: select_features(model, (x, y), held, [7, 9], batch_size=5, **quick)
        yield lambda: Probe.fit(read, (x, y), held, protocol="ridge", batch_size=5)
        yield lambda: measure_alignment(model, encoder, (x, y), [7], "layer", metrics="knn", test=held, knn_k=3)

    copies = [Image.fromarray((255 * image[0].numpy()).round().astype(np.uint8)) for image in x]
    pixels = torch.stack([torch.from_numpy(np.array(p)) for p in copies])[:, None]
    x = pixels
    for same in ((copies, y), (pixels.clone(), y), (pixels.flip(0), y.flip(0)), (pixels[:8], y[:8])):
        for fit in fits(same):
            with pytest.raises(ValueError, match=rf"All {len(same[1])} images of .* are among the 24 of .*pixel for"):
                fit()
    z = (z * 255).round().to(torch.uint8)
    for fit in fits((torch.cat([z, pixels[:2]]), torch.cat([w, y[:2]]))):
        with pytest.warns(UserWarning, match="2 of 14 images of .* are in .* too, pixel for pixel") as told:
            fit()
        assert sum("pixel for pixel" in str(w.message) for w in told) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*pixel for pixel")
        for fit in fits((z, w)):
            fit()


def test_a_validation_split_of_one_class_is_refused_before_the_first_forward():
    model = planted(layer=Rows((0,)))
    (x, y), (z, _) = striped(24, 0), striped(6, 1)
    held = (z, torch.full((6,), 2))
    with pytest.raises(ValueError, match=r"All 6 images of .*validation.* are of class 2; .*one class tells nothing"):
        select_features(model, (x, y), held, [7], progress=False)
    with pytest.raises(ValueError, match=r"All 6 images of .*validation.* are of class 2"):
        Probe.fit(FeatureExtractor(model, "layer", 7, pooling="mean"), (x, y), held)
    assert model.model.forwards == 0

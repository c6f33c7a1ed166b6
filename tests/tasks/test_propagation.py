"""Labels carried through a video against loops; planes by homographies; both on tiny folders of the real layouts."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffusers_repr.data.davis import load_davis
from diffusers_repr.data.hpatches import load_hpatches
from diffusers_repr.metrics.corner_error import warp_points
from diffusers_repr.tasks import propagation
from diffusers_repr.tasks.homography import find_homography
from diffusers_repr.tasks.planes import evaluate_planes, harris_points
from diffusers_repr.tasks.propagation import (
    DAVIS_SETTINGS,
    PropagationConfig,
    evaluate_videos,
    propagate_labels,
    propagate_masks,
    video_size,
)
from tests.tasks.correspondence_cases import photo, shifted, task

CONFIG = PropagationConfig(temperature=0.3, top_k=4, context=2, radius=2)


def loop(maps, first, config):
    """The reference's words, cell by cell, float64."""
    maps = [F.normalize(m.double(), dim=0) for m in maps]
    labels, h, w = [first.double()], *first.shape[1:]
    for t in range(1, len(maps)):
        context = [0, *range(max(1, t - config.context), t)]
        found = torch.zeros(first.shape[0], h, w, dtype=torch.float64)
        for y in range(h):
            for x in range(w):
                weights, sources = [], []
                for frame in context:
                    for v in range(h):
                        for u in range(w):
                            near = config.radius is None or max(abs(v - y), abs(u - x)) <= config.radius
                            like = math.exp(float(maps[t][:, y, x] @ maps[frame][:, v, u]) / config.temperature)
                            weights.append(like if near else 0.0)
                            sources.append(labels[frame][:, v, u])
                least = sorted(weights)[-config.top_k]
                kept = [value if value >= least else 0.0 for value in weights]
                total = sum(kept)
                found[:, y, x] = sum(value / total * s for value, s in zip(kept, sources, strict=True) if value)
        labels.append(found)
    return labels[1:]


@pytest.mark.parametrize("radius", [2, None])
def test_labels_equal_a_loop(radius, monkeypatch):
    monkeypatch.setattr(propagation, "_BLOCK", 3)  # several blocks, whose windows meet the edges
    config = PropagationConfig(0.3, 4, 2, radius)
    maps = torch.randn(4, 5, 5, 6, generator=torch.Generator().manual_seed(0))
    maps[2] = maps[1]  # equal cells: all that equal the smallest of the best are kept
    first = F.one_hot(torch.arange(30).reshape(5, 6) % 3, 3).movedim(-1, 0)
    got = list(propagate_labels(list(maps), first, config))
    assert len(got) == 3
    for a, b in zip(got, loop(list(maps), first, config), strict=True):
        assert (a - b).abs().max() < 1e-5
        assert torch.allclose(a.sum(0), torch.ones(5, 6))


def test_a_low_temperature_takes_the_nearest_label():
    """`exp(cosine / T)` itself is infinite in float32 from T = 0.011 down."""
    maps = torch.randn(3, 8, 5, 6, generator=torch.Generator().manual_seed(0))
    first = F.one_hot(torch.arange(30).reshape(5, 6) % 3, 3).movedim(-1, 0).float()
    found = next(propagate_labels(maps, first, PropagationConfig(1e-5, 4, 1, None)))
    cosines = F.normalize(maps[1].flatten(1), dim=0).T @ F.normalize(maps[0].flatten(1), dim=0)
    assert torch.allclose(found.flatten(1), first.flatten(1)[:, cosines.argmax(1)], atol=1e-3)
    with pytest.raises(ValueError, match="no frames"):
        list(propagate_labels([], first))


def moving(folder=None):
    """A video whose second object moves by a cell a frame, as frames and true masks."""
    frames, masks = [], []
    thing = np.asarray(photo(12, 16, seed=5))
    for t in range(5):
        frame, mask = np.array(photo(40, 56)), np.zeros((40, 56), dtype=np.uint8)
        frame[8:20, 8 + 4 * t : 24 + 4 * t], mask[8:20, 8 + 4 * t : 24 + 4 * t] = thing, 2
        mask[28:36, 4:20] = 1
        frames.append(Image.fromarray(frame))
        masks.append(mask)
    return frames, masks


def test_masks_follow_what_moves():
    frames, masks = moving()
    got = propagate_masks(task(image_size=(40, 56)), frames, masks[0], PropagationConfig(0.05, 3, 3, 3))
    assert got.dtype == torch.uint8
    assert torch.equal(got[0], torch.from_numpy(masks[0]))
    for found, want in zip(got, masks, strict=True):
        for number in (1, 2):
            both = (found.numpy() == number) & (want == number)
            assert both.sum() / ((found.numpy() == number) | (want == number)).sum() > 0.8
    for mask, message in (
        (masks[0][:-1], r"The mask is \(39, 56\), the first frame \(40, 56\)"),
        (masks[0] * 0, "shows no object"),
    ):
        with pytest.raises(ValueError, match=message):
            propagate_masks(task(), frames, mask)
    with pytest.raises(ValueError, match="1 frames"):
        propagate_masks(task(), frames[:1], masks[0])
    with pytest.raises(ValueError, match=r"Labels must be \(K, 5, 6\)"):
        list(propagate_labels([torch.rand(3, 5, 6)] * 2, torch.ones(2, 4, 6)))
    with pytest.raises(ValueError, match="all must have one size"):
        list(propagate_labels([torch.rand(3, 5, 6), torch.rand(3, 5, 7)], torch.ones(2, 5, 6)))


def test_settings_of_the_paper_and_sizes():
    assert DAVIS_SETTINGS["sd"] == PropagationConfig(0.2, 15, 28, 15)
    assert DAVIS_SETTINGS["adm-256"] == PropagationConfig(0.1, 10, 28, 15)
    assert [video_size(size) for size in ((480, 854), (854, 480), (480, 480))] == [(480, 832), (832, 480), (480, 480)]
    for wrong in ({"temperature": 0}, {"top_k": 0}, {"context": 0}, {"radius": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PropagationConfig(**wrong)


def davis(root):
    frames, masks = moving()
    for name in ("JPEGImages/480p/thing", "Annotations/480p/thing", "ImageSets/2017"):
        (root / name).mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("thing\n\n")
    for at, (frame, mask) in enumerate(zip(frames, masks, strict=True)):
        frame.save(root / "JPEGImages" / "480p" / "thing" / f"{at:05d}.jpg", quality=100, subsampling=0)
        image = Image.fromarray(mask).convert("P")
        image.putdata(mask.flatten().tolist())
        image.save(root / "Annotations" / "480p" / "thing" / f"{at:05d}.png")
    return frames, masks


def test_davis_from_a_folder(tmp_path):
    _, masks = davis(tmp_path / "DAVIS")
    (video,) = load_davis(tmp_path)
    assert (video.name, len(video)) == ("thing", 5)
    assert np.array_equal(video.mask(3), masks[3])
    Image.fromarray(masks[3] > 0).save(tmp_path / "one.png")  # one bit a pixel: object 1, and not 255, which is void
    assert np.array_equal(dataclasses.replace(video, masks=(tmp_path / "one.png",)).mask(0), masks[3] > 0)
    scores = evaluate_videos(task(image_size=(40, 56)), [video], PropagationConfig(0.05, 3, 3, 3))
    assert scores["all"].j_mean > 0.85
    assert scores["all"].j_mean == scores["thing"].j_mean
    assert len(scores["all"].f) == 2
    (tmp_path / "DAVIS" / "Annotations" / "480p" / "thing" / "00002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"00002.png' is missing. Get DAVIS-2017-trainval-480p.zip"):
        load_davis(tmp_path / "DAVIS")
    with pytest.raises(FileNotFoundError, match=r"No DAVIS 2017 in .*https://davischallenge.org"):
        load_davis(tmp_path / "DAVIS", "test-dev")


def planes(root):
    """Two sequences in the layout of the release: shifts by whole cells."""
    (root / "points").mkdir(parents=True)
    for name, seed in (("i_light", 1), ("v_view", 2)):
        (root / name).mkdir()
        image = photo(seed=seed)
        x, y = np.meshgrid(np.arange(9, 40, 8), np.arange(9, 30, 8))
        points = np.stack([x.ravel(), y.ravel()], 1)
        for number in range(1, 7):
            step = 0 if number == 1 else 4
            shifted(image, step, 0).save(root / name / f"{number}.ppm")
            np.savetxt(root / "points" / f"{name}-{number}.kp", np.concatenate([points, points[:2]]) + [step, 0])
            if number > 1:
                np.savetxt(root / name / f"H_1_{number}", np.array([[1, 0, step], [0, 1, 0], [0, 0, 1.0]]))
    return root


def test_hpatches_from_a_folder(tmp_path):
    root = planes(tmp_path / "hpatches")
    sequences = load_hpatches(root, root / "points")
    assert [s.name for s in sequences] == ["i_light", "v_view"]
    assert len(sequences[0].points[0]) == 12  # points that stand twice are taken once
    for settings in ({"method": "lmeds"}, {"method": "ransac", "likeness": "l2"}):
        report = evaluate_planes(task(), sequences, trials=30, **settings)
        assert report.accuracy["all"] == {1.0: 1.0, 3.0: 1.0, 5.0: 1.0}
        assert len(report.errors["v_view"]) == 5
        assert max(report.errors["v_view"]) < 0.01
    (plain,) = load_hpatches(root, leave_out=["v_view"])
    with pytest.raises(ValueError, match="i_light has no key points"):
        evaluate_planes(task(), [plain])
    found = harris_points(photo(), 20)
    assert found.shape[1] == 2
    assert 4 <= len(found) <= 20
    detected = evaluate_planes(task(), [plain], detect=harris_points, trials=30)
    assert detected.accuracy["illumination"][5.0] > 0
    for text, told in (("", "0 lines"), ("7\n8\n", "2 lines of 1 numbers")):
        (root / "points" / "i_light-2.kp").write_text(text)
        with pytest.raises(ValueError, match=f"i_light-2.kp' holds no numbers of shape .*{told}"):
            load_hpatches(root, root / "points")
    (root / "v_view" / "H_1_4").write_text("1 2 3")
    with pytest.raises(ValueError, match="H_1_4' holds no numbers of shape"):
        load_hpatches(root)
    (root / "v_view" / "3.ppm").unlink()
    with pytest.raises(FileNotFoundError, match=r"3.ppm' is missing. Get hpatches-sequences-release"):
        load_hpatches(root)
    with pytest.raises(FileNotFoundError, match="No HPatches sequences"):
        load_hpatches(tmp_path / "nowhere")


@pytest.mark.parametrize("method", ["ransac", "lmeds"])
def test_a_homography_among_wrong_matches(method):
    rng = torch.Generator().manual_seed(0)
    truth = torch.tensor([[1.05, 0.1, 12.0], [-0.08, 0.95, 7.0], [3e-4, -2e-4, 1.0]], dtype=torch.float64)
    points = 200 * torch.rand(40, 2, generator=rng, dtype=torch.float64)
    matches = warp_points(truth, points)
    matches[:15] = 200 * torch.rand(15, 2, generator=rng, dtype=torch.float64)
    found = find_homography(points, matches, method, trials=300)
    assert torch.allclose(found.matrix / found.matrix[2, 2], truth, atol=1e-6)
    assert found.inliers.tolist() == [False] * 15 + [True] * 25
    assert torch.equal(find_homography(points, matches, method, trials=300).matrix, found.matrix)


@pytest.mark.parametrize("method", ["ransac", "lmeds"])
@pytest.mark.parametrize("points", [torch.rand(3, 2), torch.ones(9, 2), torch.zeros(0, 2)])
def test_no_homography_is_no_error(method, points):
    found = find_homography(points, points + 1, method, trials=20)
    assert found.matrix is None
    assert not found.inliers.any()
    assert repr(found) == f"Homography(none found, method='{method}')"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dlt"}, "'ransac' or 'lmeds'"),
        ({"threshold": 0}, "threshold is a distance"),
        ({"trials": 0}, "trials must be"),
        ({"matches": torch.rand(4, 2)}, r"must be \(N, 2\)"),
        ({"matches": torch.full((5, 2), torch.nan)}, "must be finite"),
    ],
)
def test_what_a_homography_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        find_homography(**{"points": torch.rand(5, 2), "matches": torch.rand(5, 2), **settings})

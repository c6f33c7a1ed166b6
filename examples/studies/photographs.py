"""What a layer knows of photographs: the principal components of its features as colours, beside the photographs.

    python examples/studies/photographs.py --output_dir outputs/photographs

The two photographs come with scikit-learn; `--images` takes others. The model is `cars-ddpm`, a network of 1.8 M
parameters that was trained on 5,000 car pictures of 32 x 32 pixels and is asked here about larger photographs of what
it never saw. Writes `pca.jpg`.
"""

import argparse
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images

from diffusers_repr import Denoiser, FeatureExtractor

MODEL = Path(__file__).parents[1] / "models" / "cars-ddpm"
SIZE = (256, 384)  # H, W that the network sees; it was trained on 32 x 32


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/photographs"))
    parser.add_argument("--model", default=str(MODEL), help="pipeline folder or Hub id")
    parser.add_argument("--images", nargs="*", type=Path, help="photographs; the two of scikit-learn if not given")
    parser.add_argument("--layer", default="up_blocks.1")
    parser.add_argument("--timesteps", nargs="+", type=float, default=[50, 300], help="larger is noisier")
    parser.add_argument("--image_size", nargs=2, type=int, default=SIZE, metavar=("H", "W"))
    args = parser.parse_args(argv)

    opened = [Image.open(path).convert("RGB") for path in args.images or ()]
    photographs = opened or [Image.fromarray(pixels) for pixels in load_sample_images().images]
    denoiser = Denoiser.from_pretrained(args.model)
    size = tuple(args.image_size)
    extractor = FeatureExtractor(denoiser, args.layer, args.timesteps, ensemble_size=4, batch_size=2, image_size=size)
    features = extractor(photographs)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    figure = features.plot_pca(args.layer)
    figure.savefig(args.output_dir / "pca.jpg", pil_kwargs={"quality": 88})
    print(args.output_dir / "pca.jpg")


if __name__ == "__main__":
    main()

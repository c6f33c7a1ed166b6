"""Generated images against real ones: Fréchet distance, precision and recall, each as a record."""

from __future__ import annotations

from typing import Any

from diffusers_repr.encoders import Encoder
from diffusers_repr.metrics.encoding import Encoded, Which, encode_images
from diffusers_repr.metrics.frechet import frechet_backend, frechet_distance
from diffusers_repr.metrics.precision_recall import precision_recall
from diffusers_repr.metrics.record import MetricRecord


def measure_generation(
    encoder: Encoder,
    real: Any,
    generated: Any,
    *,
    features: Which = "global",
    k: int = 3,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 64,
    seed: int | None = None,
    subject: str | None = None,
) -> dict[str, MetricRecord]:
    """Fréchet distance, precision and recall of generated images, in the features of any encoder.

    Under `accelerate launch` each process encodes a share of the images, and every process gets the records.

    Args:
        encoder: What makes the features.
        real: Images to compare with, or what `encode_images` made of them, so that they are encoded once for many
            generators.
        generated: Images to judge; see `open_images` for what images may be.
        features: `global`, or the mean of the `tokens`.
        k: Of precision and recall.
        image_size: Resize all images before the encoder does.
        batch_size: Images a forward.
        seed: With which the images were generated; goes into the records.
        subject: What generated them; goes into the records and may differ between those compared.

    Returns:
        `frechet_distance`, `precision` and `recall`.

    Raises:
        ImportError: Without torchmetrics, before anything is encoded.
        ValueError: For images that differ in size, real ones among themselves or from generated ones; too few of
            them, or k out of range.
    """
    backend = frechet_backend()
    settings: dict[str, Any] = {"batch_size": batch_size, "image_size": image_size}
    if not isinstance(real, Encoded):
        real = encode_images(encoder, real, features, role="real images", **settings)
    made = encode_images(encoder, generated, features, role="generated images", like=real, **settings)
    fingerprint = encoder.fingerprint()
    shared: dict[str, Any] = {
        "encoder": fingerprint,
        "features": features,
        "counts": {"real": len(real.features), "generated": len(made.features)},
        "reference": real.images_hash,
        "resize": f"real {_resize(encoder, real)}, generated {_resize(encoder, made)}",
        "weights": fingerprint.get("weights"),
        "seed": seed,
        "subject": subject,
    }
    ours = {"name": "diffusers-repr", "version": _our_version()}
    shares = precision_recall(real.features, made.features, k)
    return {
        "frechet_distance": MetricRecord(
            "frechet_distance", frechet_distance(real.features, made.features), backend=backend, **shared
        ),
        "precision": MetricRecord("precision", shares.precision, backend=ours, k=k, **shared),
        "recall": MetricRecord("recall", shares.recall, backend=ours, k=k, **shared),
    }


def _resize(encoder: Encoder, encoded: Encoded) -> str:
    """How images came to the encoder's size, in words."""
    h, w = encoded.image_size
    to_h, to_w = encoder.source.size((h, w))
    return f"{h}x{w}" if (h, w) == (to_h, to_w) else f"{h}x{w} to {to_h}x{to_w} by the encoder"


def _our_version() -> str:
    from diffusers_repr import __version__

    return __version__

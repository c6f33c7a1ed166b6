"""`check_encoder`: can a network of one's own stand where an `Encoder` stands?"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from diffusers_repr.encoders import AttentionEncoder, Encoder, EncoderOutput, ImageEncoder
from diffusers_repr.testing.checks import expect, expect_close, leaving_alone


def check_encoder(encoder: ImageEncoder, images: Tensor) -> None:
    """Hold an encoder to the protocol `ImageEncoder`, and to `AttentionEncoder` where it tells its blocks.

    Args:
        encoder: An `Encoder`, or any class with its methods.
        images: `(B, C, H, W)` float32 in [-1, 1] of at least two images, of a size that it takes.

    Raises:
        AssertionError: With what was found and what is expected.
    """
    name = type(encoder).__name__
    members = [m for m in ("name", "dim", "channels", "device", "grid_for", "fingerprint", "to", "encode_pixels")
               if getattr(encoder, m, None) is None]  # fmt: skip
    expect(not members, f"{name} lacks {', '.join(members)}.")
    expect(isinstance(encoder, ImageEncoder), f"{name} does not follow the protocol ImageEncoder.")
    given, size = images.clone(), (images.shape[2], images.shape[3])
    network = [encoder.module] if isinstance(encoder, Encoder) else []
    with leaving_alone(f"encode_pixels of {name}", *network):
        found = encoder.encode_pixels(images)
    expect(torch.equal(images, given), f"encode_pixels of {name} changes the images it is given.")
    _check_output(name, encoder, found, len(images), size)
    alone = encoder.encode_pixels(images[1:2])
    expect_close(alone.tokens, found.tokens[1:2], "Tokens of an image alone and among others")
    expect_close(alone.global_features, found.global_features[1:2], "Global features alone and among others")
    split = encoder.encode_pixels(images, batch_size=1)
    expect_close(split.tokens, found.tokens, "Tokens with batch_size=1")
    mark = encoder.fingerprint()
    expect(json.loads(json.dumps(mark)) == mark, f"The fingerprint of {name} does not survive JSON: {mark}.")
    expect(encoder.fingerprint() == mark, f"The fingerprint of {name} changes from call to call.")
    if isinstance(encoder, AttentionEncoder) and encoder.num_blocks:
        _check_attention(name, encoder, images, found)


def _check_output(name: str, encoder: ImageEncoder, found: EncoderOutput, rows: int, size: tuple[int, int]) -> None:
    expect(isinstance(found, EncoderOutput), f"{name} gives a {type(found).__name__}; expected an EncoderOutput.")
    height, width = found.grid
    shape = (rows, height * width, encoder.dim)
    expect(tuple(found.tokens.shape) == shape, f"{name}: tokens {tuple(found.tokens.shape)}, expected {shape}.")
    flat = tuple(found.global_features.shape)
    expect(flat[0] == rows and len(flat) == 2, f"{name}: global features {flat}, expected ({rows}, D).")
    grid = tuple(encoder.grid_for(size))
    expect(grid == found.grid, f"{name}: grid_for says {grid}, the output has {found.grid}.")
    for what, value in (("tokens", found.tokens), ("global features", found.global_features)):
        expect(value.dtype == torch.float32, f"{name}: {what} are {value.dtype}, expected torch.float32.")
        expect(not value.requires_grad, f"{name}: {what} carry a graph; a frozen network has none.")
        expect(bool(value.isfinite().all()), f"{name}: {what} hold values that are not finite.")


def _check_attention(name: str, encoder: AttentionEncoder, images: Tensor, found: EncoderOutput) -> None:
    layer = -1 if not isinstance(encoder, Encoder) else 0  # the first block is run whatever layer is read
    try:
        output, (attention,) = encoder.encode_with_attention(images, [layer])
    except TypeError as error:
        known = not isinstance(encoder, Encoder)  # of an Encoder's network it may not be, which only a call tells
        expect(not known, f"{name} tells its num_blocks, but encode_with_attention(pixels, [{layer}]) fails: {error}")
        return
    expect_close(output.tokens, found.tokens, "Tokens beside attention")
    count = found.tokens.shape[1]
    shape = tuple(attention.shape)
    expect(len(shape) == 4 and shape[2:] == (count, count), f"{name}: attention {shape}, expected (B, heads, N, N).")
    expect_close(attention.sum(-1), torch.ones_like(attention[..., 0]), "Sums of the attention's rows")


__all__ = ["check_encoder"]

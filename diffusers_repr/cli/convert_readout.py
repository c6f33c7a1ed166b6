"""`diffusers-repr convert` of the published heads of Readout Guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def save_readout(
    checkpoint: Mapping[str, Any], file: str, out: str, base: str | None, kind: str | None, *, overwrite: bool
) -> None:
    """Write a head with its config, the record of its base, and a card.

    Args:
        checkpoint: As read.
        file: Its name, for messages.
        out: Folder to write.
        base: Folder or Hub id of the model it was trained on.
        kind: Of the head, where the file does not tell.
        overwrite: Replace the folder if it exists.

    Raises:
        ValueError: Without a base; as `convert_readout`.
        FileNotFoundError, OSError: If the base cannot be loaded.
    """
    from diffusers_repr.cli.converted_head import base_of, write_head
    from diffusers_repr.heads.convert import convert_readout
    from diffusers_repr.hub.places import without_places

    what = "a head of Readout Guidance, which takes over the time embedding of its base"
    denoiser = base_of(checkpoint, file, what, base)
    try:
        head, notes = convert_readout(checkpoint, denoiser, kind)
    except ValueError as error:
        raise ValueError(f"{file!r}: {error}") from error
    config = head.config
    kind, layers = config["kind"], config["layers"]
    reads = config["target"] or kind
    text = f"""A `ReadoutHead` ({kind}) converted from a published checkpoint of Readout Guidance (Luo et al. 2024,
[arXiv 2312.02150](https://arxiv.org/abs/2312.02150)). It reads {reads} from the features of
`{without_places(str(config["base_model"]))}`, in the layers {", ".join(f"`{path}`" for path in layers)}.

`ReadoutHead.from_pretrained` of `diffusers_repr.heads` loads it, and `ReadoutGuidance(head, ...)` guides by it; with
`published=True` as the published code does. The license is that of the checkpoint."""
    told = (
        f"Wrote a {kind} head to {out}: it reads {reads} from {len(layers)} maps of {base!r}, "
        f"{sum(p.numel() for p in head.parameters()) / 1e6:.1f} M parameters. ReadoutHead.from_pretrained({out!r}) "
        "loads it, for ReadoutGuidance."
    )
    write_head(head, out, text, ["readout-guidance", kind], notes, told, overwrite=overwrite)

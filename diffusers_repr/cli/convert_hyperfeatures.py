"""`diffusers-repr convert` of the published networks of Diffusion Hyperfeatures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def save_hyperfeatures(
    checkpoint: Mapping[str, Any], file: str, out: str, base: str | None, *, overwrite: bool
) -> None:
    """Write a head with its config, the record of its base, and a card.

    Args:
        checkpoint: As read.
        file: Its name, for messages.
        out: Folder to write.
        base: Folder or Hub id of the model it was trained on.
        overwrite: Replace the folder if it exists.

    Raises:
        ValueError: Without a base; as `convert_hyperfeatures`.
        FileNotFoundError, OSError: If the base cannot be loaded.
    """
    from diffusers_repr.cli.convert_readout import load_network, trained_on
    from diffusers_repr.heads.convert_hyperfeatures import convert_hyperfeatures
    from diffusers_repr.hub.files import atomic_folder, atomic_write

    if base is None:
        raise ValueError(
            f"{file!r} is the network of Diffusion Hyperfeatures, which reads the layers of a base: give --base, a "
            f"folder or Hub id{trained_on(checkpoint)}."
        )
    try:
        head, notes = convert_hyperfeatures(checkpoint, load_network(base))
    except ValueError as error:
        raise ValueError(f"{file!r}: {error}") from error
    with atomic_folder(out, overwrite=overwrite) as folder:
        head.save_pretrained(folder)
        atomic_write(folder / "README.md", card(head, Path(out).name, notes))
    config = head.config
    print(
        f"Wrote a head of Hyperfeatures to {out}: {len(config['layers'])} layers of {base!r} at {len(head.reads)} of "
        f"{config['steps']} steps, {sum(p.numel() for p in head.parameters()) / 1e6:.1f} M parameters. "
        f"Hyperfeatures.from_pretrained({out!r}) reads images with it."
    )
    for note in notes:
        print(note)


def card(head: Any, title: str, notes: tuple[str, ...]) -> str:
    """README.md of a converted head."""
    from diffusers_repr.hub import is_repo_id, model_card
    from diffusers_repr.hub.places import without_places

    config = head.config
    base = str(config["base_model"])
    lines = "".join(f"\n- {note}" for note in notes)
    text = f"""A `HyperfeaturesHead` converted from a published checkpoint of Diffusion Hyperfeatures (Luo et al. 2023,
[arXiv 2305.14334](https://arxiv.org/abs/2305.14334)). It mixes {len(config["layers"])} layers of
`{without_places(base)}` at {len(head.reads)} of {config["steps"]} steps of a DDIM inversion.

`Hyperfeatures.from_pretrained` of `diffusers_repr.heads` loads it with its base; every task that reads features takes
it. The license is that of the checkpoint.
{lines}
"""
    public = is_repo_id(base) and not Path(base).is_dir()
    return model_card(
        title=title,
        text=text,
        tags=["hyperfeatures", "feature-extraction"],
        base_model=base if public else None,
        license="other",
    )

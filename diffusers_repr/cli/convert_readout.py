"""`diffusers-repr convert` of the published heads of Readout Guidance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers_repr.denoiser import Denoiser


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
    from diffusers_repr.heads.convert import convert_readout
    from diffusers_repr.hub.files import atomic_folder, atomic_write

    if base is None:
        raise ValueError(
            f"{file!r} is a head of Readout Guidance, which takes over the time embedding of its base: "
            f"give --base, a folder or Hub id{trained_on(checkpoint)}."
        )
    try:
        head, notes = convert_readout(checkpoint, load_network(base), kind)
    except ValueError as error:
        raise ValueError(f"{file!r}: {error}") from error
    with atomic_folder(out, overwrite=overwrite) as folder:
        head.save_pretrained(folder)
        atomic_write(folder / "README.md", card(head, Path(out).name, notes))
    config = head.config
    print(
        f"Wrote a {config['kind']} head to {out}: it reads {config['target'] or config['kind']} from "
        f"{len(config['layers'])} maps of {base!r}, {sum(p.numel() for p in head.parameters()) / 1e6:.1f} M "
        f"parameters. ReadoutHead.from_pretrained({out!r}) loads it, for ReadoutGuidance."
    )
    for note in notes:
        print(note)


def trained_on(checkpoint: Mapping[str, Any]) -> str:
    """What a checkpoint's settings name as its base, in brackets."""
    settings = checkpoint.get("config")
    named = settings.get("model_id") if isinstance(settings, Mapping) else None
    return f" (it was trained on {str(named)!r})" if named else ""


def load_network(id_or_folder: str) -> Denoiser:
    """Network and scheduler of a pipeline; encoders and VAE are not loaded.

    Raises:
        FileNotFoundError, ValueError, OSError: As `Denoiser.from_pretrained`.
    """
    from diffusers_repr.denoiser import Denoiser
    from diffusers_repr.hub.components import is_component
    from diffusers_repr.hub.load import load_json_config

    index = load_json_config(id_or_folder, "model_index.json")
    parts = [name for name, value in index.items() if is_component(value) and name[0] != "_"]
    left_out = [name for name in parts if name not in ("unet", "transformer", "scheduler")]
    return Denoiser.from_pretrained(id_or_folder, **dict.fromkeys(left_out))


def card(head: Any, title: str, notes: tuple[str, ...]) -> str:
    """README.md of a converted head."""
    from diffusers_repr.hub import is_repo_id, model_card
    from diffusers_repr.hub.places import without_places

    config = head.config
    base, kind = str(config["base_model"]), config["kind"]
    layers = ", ".join(f"`{path}`" for path in config["layers"])
    lines = "".join(f"\n- {note}" for note in notes)
    text = f"""A `ReadoutHead` ({kind}) converted from a published checkpoint of Readout Guidance (Luo et al. 2024,
[arXiv 2312.02150](https://arxiv.org/abs/2312.02150)). It reads {config["target"] or kind} from the features of
`{without_places(base)}`, in the layers {layers}.

`ReadoutHead.from_pretrained` of `diffusers_repr.heads` loads it, and `ReadoutGuidance(head, ...)` guides by it; with
`published=True` as the published code does. The license is that of the checkpoint.
{lines}
"""
    public = is_repo_id(base) and not Path(base).is_dir()
    return model_card(
        title=title,
        text=text,
        tags=["readout-guidance", kind],
        base_model=base if public else None,
        license="other",
    )

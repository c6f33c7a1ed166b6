"""What `diffusers-repr convert` of published heads shares: the base, the folder and the card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers_repr.denoiser import Denoiser


def base_of(checkpoint: Mapping[str, Any], file: str, what: str, base: str | None) -> Denoiser:
    """The model that a checkpoint's head reads; see `load_network`.

    Args:
        checkpoint: As read.
        file: Its name, for messages.
        what: It is, and why it needs a base.
        base: Folder or Hub id.

    Raises:
        ValueError: Without a base.
        FileNotFoundError, OSError: If it cannot be loaded.
    """
    if base is None:
        raise ValueError(f"{file!r} is {what}: give --base, a folder or Hub id{trained_on(checkpoint)}.")
    return load_network(base)


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


def write_head(
    head: Any, out: str, text: str, tags: Sequence[str], notes: Sequence[str], told: str, *, overwrite: bool
) -> None:
    """Write a converted head with its card, and tell of it.

    Args:
        head: With its config and the record of its base.
        out: Folder to write.
        text: Of the card.
        tags: Of the card.
        notes: What is to be known of the conversion.
        told: What is printed, before the notes.
        overwrite: Replace the folder if it exists.
    """
    from diffusers_repr.hub import is_repo_id, model_card
    from diffusers_repr.hub.files import atomic_folder, atomic_write

    base, lines = str(head.config["base_model"]), "".join(f"\n- {note}" for note in notes)
    public = is_repo_id(base) and not Path(base).is_dir()
    card = model_card(
        title=Path(out).name,
        text=f"{text}\n{lines}\n",
        tags=list(tags),
        base_model=base if public else None,
        license="other",
    )
    with atomic_folder(out, overwrite=overwrite) as folder:
        head.save_pretrained(folder)
        atomic_write(folder / "README.md", card)
    for line in (told, *notes):
        print(line)

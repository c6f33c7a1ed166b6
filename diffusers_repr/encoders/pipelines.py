"""Encoders that are a part of a pipeline: the folder that generates images recognises them too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor, nn

from diffusers_repr.encoders.module import ModuleSource
from diffusers_repr.encoders.own import load_own, refuse_options
from diffusers_repr.encoders.source import Source
from diffusers_repr.hub.checked_loading import INDEX
from diffusers_repr.hub.components import check_component_files, check_index
from diffusers_repr.hub.errors import HubError
from diffusers_repr.hub.load import load_json_config, resolve_folder
from diffusers_repr.models.masked_token_model import MaskedTokenModel
from diffusers_repr.models.maskgit_vq import MaskGITVQModel
from diffusers_repr.models.pixel_token_model import PixelTokenModel
from diffusers_repr.models.vq_tokens import check_vocabulary, encode_tokens, token_stride


class TokenEncoder(nn.Module):
    """Images to their tokens, and these to what MAGE's encoder makes of them.

    Args:
        vqvae: The tokenizer; its weights get no gradient, for tokens have none.
        transformer: The masked token model.
    """

    def __init__(self, vqvae: Any, transformer: MaskedTokenModel) -> None:
        super().__init__()
        self.vqvae, self.transformer = vqvae.requires_grad_(False), transformer

    def forward(self, pixels: Tensor) -> Tensor:
        """`(B, 1 + N, D)` of images `(B, C, H, W)` in [-1, 1]; a network on vectors is given its null vector."""
        return self.transformer.encode(encode_tokens(self.vqvae, pixels))


def _part(
    folder: Path, components: dict[str, tuple[str, str]], name: str, dtype: torch.dtype, classes: tuple[Any, ...]
) -> Any:
    """A component of a pipeline's folder, of one of some classes."""
    found = components.get(name, ("", "nothing"))[1]
    cls = next((cls for cls in classes if cls.__name__ == found), None)
    if cls is None:
        names = " or ".join(one.__name__ for one in classes)
        raise ValueError(f"{str(folder)!r} has {found} as {name}; the encoder is of a {names}.")
    return cls.from_pretrained(folder / name, torch_dtype=dtype)


def _tokens(
    folder: Path, components: dict[str, tuple[str, str]], dtype: torch.dtype, image_size: Any, pooling: str | None
) -> ModuleSource:
    """Of a `TokenGenerationPipeline`: the encoder half of its network."""
    vqvae = _part(folder, components, "vqvae", dtype, (VQModel, MaskGITVQModel))
    network = _part(folder, components, "transformer", dtype, (MaskedTokenModel, PixelTokenModel))
    network.requires_grad_(False).eval()
    check_vocabulary(network, vqvae)
    patch = token_stride(vqvae)
    size = tuple(patch * side for side in network.grid)
    if image_size not in (None, size) and not (isinstance(image_size, int) and size == (image_size, image_size)):
        raise ValueError(f"This network has positions for images of {size[0]} x {size[1]} alone; got {image_size!r}.")
    settings: dict[str, Any] = {
        "patch_size": patch,
        "prefix_tokens": 1,
        "pooling": pooling or "mean",
        "channels": vqvae.config["in_channels"],
        "image_size": size,
    }
    if isinstance(network, PixelTokenModel):
        return ModuleSource(network, forward=network.encode, **settings)
    return ModuleSource(TokenEncoder(vqvae.eval(), network), **settings)


def _codes(
    folder: Path, components: dict[str, tuple[str, str]], dtype: torch.dtype, image_size: Any, pooling: str | None
) -> Source:
    """Of a `DiffusionAutoencoderPipeline`: what gives its codes."""
    refuse_options(pooling=pooling)
    found = load_own(folder / "encoder", None, None, dtype, image_size)
    assert found is not None
    return found[0]


# Class of a pipeline -> the components that its encoder is made of, and what reads it.
_READERS: dict[str, tuple[tuple[str, ...], Callable[..., Source]]] = {
    "DiffusionAutoencoderPipeline": (("encoder",), _codes),
    "TokenGenerationPipeline": (("vqvae", "transformer"), _tokens),
}


def is_encoder_pipeline(id_or_folder: str | Path, revision: str | None = None, token: str | None = None) -> bool:
    """Whether a folder or Hub id is a pipeline of a class that has an encoder.

    Args:
        id_or_folder: Folder or Hub id.
        revision: On the Hub.
        token: Hub token.
    """
    try:
        index = load_json_config(id_or_folder, INDEX, revision, token)
    except (FileNotFoundError, HubError):
        return False
    return index.get("_class_name") in _READERS


def load_pipeline_encoder(
    id_or_folder: str | Path,
    revision: str | None,
    token: str | None,
    dtype: torch.dtype,
    image_size: int | tuple[int, int] | None,
    pooling: str | None,
    **others: Any,
) -> tuple[Source, str | None]:
    """The encoder of a pipeline, and the revision that was loaded.

    Args:
        id_or_folder: A pipeline for which `is_encoder_pipeline` holds.
        revision: On the Hub.
        token: Hub token.
        dtype: Of the network.
        image_size: As `Encoder.from_pretrained`.
        pooling: As `Encoder.from_pretrained`; the mean of the tokens if None.
        **others: Of networks of transformers; refused where they are set.

    Raises:
        ValueError: For what is refused, another size than the network's, and files that do not fit together.
    """
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise ValueError(f"The encoder of the pipeline {str(id_or_folder)!r} has no {', '.join(given)}; leave it out.")
    index = load_json_config(id_or_folder, INDEX, revision, token)
    components = check_index(index, f"{INDEX} of {str(id_or_folder)!r}")
    parts, read = _READERS[str(index["_class_name"])]
    folder = resolve_folder(id_or_folder, revision, token, [INDEX, *(f"{name}/*" for name in parts)])
    check_component_files(folder, {name: components[name] for name in parts if name in components})
    source = read(folder, components, dtype, image_size, pooling)
    commit = folder.name if folder.parent.name == "snapshots" else None
    return source, commit or revision


__all__ = ["TokenEncoder", "is_encoder_pipeline", "load_pipeline_encoder"]

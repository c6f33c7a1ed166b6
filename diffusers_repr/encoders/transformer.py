"""Vision transformers of the transformers library as sources of features: loading them, and reading them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.capture import capture
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.denoiser.feature_map import FeatureMap
from diffusers_repr.encoders.attention import recording_attention
from diffusers_repr.encoders.backbone import BackboneSource
from diffusers_repr.encoders.family import BackboneFamily, EncoderFamily, encoder_family, families_with_positions
from diffusers_repr.encoders.positions import Positions, check_positions, use_repa_positions
from diffusers_repr.encoders.preprocessing import (
    Statistics,
    check_planes,
    check_processor,
    chosen_statistics,
    statistics_from_processor,
)
from diffusers_repr.encoders.source import Source, by_short_side, check_pooling, fresh_module, pair
from diffusers_repr.hub import schema
from diffusers_repr.hub.components import check_config, check_weight_files, refuse_adapter
from diffusers_repr.hub.files import read_json
from diffusers_repr.hub.identity import config_hash
from diffusers_repr.hub.load import load_json_config, resolve_folder

_FILES = [
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
]
REPA_CELL = 16  # pixels of an image a token of a latent model: stride 8 of the autoencoder, patch 2


class TransformerSource(Source):
    """A network of transformers with its adapter.

    Args:
        model: The network, on its device.
        family: Its adapter.
        statistics: Of pixels.
        layer: Block whose output is read, from 0 or from the end; None: the family's last tokens.
        image_size: (H, W) or a side to resize to; None: the default rule.
        pooling: `cls`, `mean`, or None for the family's own global features.
        config: `config.json` as it was loaded.
        positions: How position embeddings are resampled; `repa` changes the network's method for it.

    Raises:
        ValueError: For a layer, size or pooling that the network does not have, and positions that REPA's code does
            not resample.
    """

    def __init__(
        self,
        model: Any,
        family: EncoderFamily,
        statistics: Statistics,
        layer: int | None,
        image_size: int | tuple[int, int] | None,
        pooling: str | None,
        config: Mapping[str, Any],
        positions: Positions = "transformers",
    ) -> None:
        self.module, self.family = model, family
        self.positions = self._resampling(positions)
        self.mean, self.std = statistics.mean, statistics.std
        self.channels, self.dim = int(model.config.num_channels), int(model.config.hidden_size)
        check_planes(statistics, self.channels)
        self.patch = family.patch(model.config)
        self.side = statistics.side or family.side(model.config)
        self.image_size = pair(image_size, self.patch)
        self.pooling = check_pooling(pooling, family.class_token)
        blocks = family.block_list(model)
        self.paths = [f"{blocks}.{at}" for at in range(len(model.get_submodule(blocks)))]
        self.layer = None if layer is None else self._block(layer)
        self._config = config_hash(config)

    @property
    def num_blocks(self) -> int:
        """All of them."""
        return len(self.paths)

    def _resampling(self, positions: Positions) -> Positions:
        if check_positions(positions) == "repa":
            if self.family.positions is None:
                raise ValueError(
                    f"REPA's code resamples no positions of a {type(self.module).__name__}: positions='repa' is for "
                    f"{', '.join(families_with_positions())}. Leave it out."
                )
            use_repa_positions(self.module.get_submodule(self.family.positions))
        return positions

    def _block(self, layer: int) -> int:
        count = len(self.paths)
        if isinstance(layer, bool) or not isinstance(layer, int) or not -count <= layer < count:
            raise ValueError(
                f"layer={layer!r}; {type(self.module).__name__} has blocks 0 to {count - 1} (or -{count} to -1 from "
                "the end); None reads its last tokens."
            )
        return layer % count

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """As given; else a patch of it for every 16 x 16 pixels, or the network's own size for small images."""
        if self.image_size is not None:
            return self.image_size
        if min(size) >= 256 and self.patch in (14, 16) and (self.side is None or self.side >= 224):
            return self.patch * (size[0] // REPA_CELL), self.patch * (size[1] // REPA_CELL)
        if self.side is None:
            raise ValueError(
                f"{type(self.module).__name__} has no size of its own for images of {size[0]} x {size[1]}; pass "
                "image_size=(H, W)."
            )
        return by_short_side(size, self.side, self.patch)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """In patches."""
        return size[0] // self.patch, size[1] // self.patch

    def read(self, pixels: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """One forward; it ends at the block that is read."""
        inputs = self.family.inputs(self.module, pixels.to(floating_dtype(self.module)))
        whole = self.layer is None
        pooled = None
        if whole and self.family.final_norm:
            output = self.module(**inputs)
            sequence = output.last_hidden_state
        else:
            path = self.paths[-1 if self.layer is None else self.layer]
            with capture(self.module, path, stop_early=not whole) as tape:
                output = self.module(**inputs)
            sequence = tape[path]
        grid, prefix = self.grid((pixels.shape[2], pixels.shape[3])), self.family.prefix(self.module.config)
        tokens = FeatureMap(sequence, grid, prefix).tokens()
        if whole and self.pooling is None:
            pooled = self.family.global_features(output)
        if pooled is None:
            cls = self.family.class_token and self.pooling != "mean"
            pooled = sequence[:, 0] if cls else tokens.float().mean(1)
        return pooled, tokens, grid

    def with_module(self, module: nn.Module) -> TransformerSource:
        """With its positions resampled as here."""
        made = super().with_module(module)
        assert isinstance(made, TransformerSource)
        made._resampling(self.positions)
        return made

    def untrained(self, seed: int) -> TransformerSource:
        """With the arguments of the class that loading passes beside the config."""
        module: Any = self.module
        known = inspect.signature(type(module).__init__).parameters
        given = self.family.loading(module.config.to_dict())
        arguments = {name: value for name, value in given.items() if name in known}
        return self.with_module(fresh_module(module, seed, **arguments))

    def recording_attention(self, layers: Sequence[int]) -> AbstractContextManager[list[Tensor]]:
        """Recomputed from queries and keys; see `recording_attention` of the module."""
        paths = [self.paths[self._block(layer)] for layer in layers]
        return recording_attention(self.module, paths, self.family.prefix(self.module.config))

    def describe(self) -> dict[str, Any]:
        """Class, config, layer, pooling and size; positions where they are not those of transformers."""
        # Left out by default, so that what was made before there was a choice is still what it was made with.
        resampled = {} if self.positions == "transformers" else {"positions": self.positions}
        return {
            "model": type(self.module).__name__,
            "config": self._config,
            "layer": self.layer,
            "pooling": self.pooling,
            "image_size": None if self.image_size is None else list(self.image_size),
            "side": self.side,
            **resampled,
        }


def load_transformer(
    id_or_folder: str | Path,
    revision: str | None,
    token: str | None,
    dtype: torch.dtype,
    layer: int | None,
    image_size: int | tuple[int, int] | None,
    pooling: str | None,
    positions: Positions = "transformers",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> tuple[TransformerSource | BackboneSource, str | None]:
    """Load a vision network of transformers; gives the source and the revision that was loaded.

    Raises:
        TypeError: If its `model_type` has no adapter.
        ValueError: If the files lack weights of the network, or describe what cannot be built.
    """
    config = load_json_config(id_or_folder, "config.json", revision, token)
    check_config(config, f"config.json of {str(id_or_folder)!r}")
    model_type = schema.optional(schema.text(200))(
        config.get("model_type"), f"config.json of {str(id_or_folder)!r}: model_type"
    )
    family = encoder_family(model_type)
    folder = resolve_folder(id_or_folder, revision, token, _FILES)
    processor: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not processor and (folder / name).is_file():
            processor = check_processor(read_json(folder / name), str(folder / name))
    check_weight_files(folder)
    refuse_adapter(folder)
    try:
        # Transformers 4 draws weights that it then replaces by those of the file.
        with _quiet(), torch.random.fork_rng(devices=[]):
            model, info = _class_of(family).from_pretrained(
                folder,
                dtype=dtype,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
                **family.loading(config),
            )
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever transformers makes of files of others
        raise ValueError(
            f"Could not load {str(id_or_folder)!r} ({type(error).__name__}: {schema.printable(str(error))}). Its "
            "config and weights do not fit together, or are of another version of transformers."
        ) from error
    missing = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if missing:
        raise ValueError(
            f"{str(id_or_folder)!r} lacks {len(missing)} weights of {type(model).__name__}, among them "
            f"{missing[:3]}: the file is incomplete, or of another network than config.json says."
        )
    wild = [name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())]
    if wild:
        raise ValueError(
            f"{str(id_or_folder)!r} has weights that are not finite (NaN, infinite), among them {wild[:3]}: the file "
            "is damaged, or its training diverged. Take it from its source again."
        )
    model.requires_grad_(False).eval()
    statistics = chosen_statistics(statistics_from_processor(processor, family.statistics), mean, std)
    settings = (model, family, statistics, layer, image_size, pooling, config)
    source: TransformerSource | BackboneSource
    if isinstance(family, BackboneFamily):
        if check_positions(positions) != "transformers":
            raise ValueError(f"A {type(model).__name__} has no positions that REPA's code resamples; leave it out.")
        source = BackboneSource(model, family, *settings[2:])
    else:
        source = TransformerSource(*settings, positions)
    commit = folder.name if folder.parent.name == "snapshots" else None
    return source, commit or revision


def _class_of(family: EncoderFamily) -> Any:
    if isinstance(family.model_class, str):
        import transformers

        return getattr(transformers, family.model_class)
    return family.model_class


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and the report on weights of other parts, such as the text half of CLIP."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

"""Which classes a pipeline folder of others may name, and how large its configs may be; nothing is imported here.

A name in a file never becomes an import: a library is one of a fixed table, or the user consents to remote code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers_repr.hub import schema
from diffusers_repr.hub.files import read_json

# Class of ours that a pipeline may have as a component -> its module; of heads, all that are registered.
OWN_COMPONENTS = {
    "AttentionHead": "diffusers_repr.heads.attention",
    "ClassTokenHead": "diffusers_repr.models.class_token",
    "ConvolutionHead": "diffusers_repr.heads.convolution",
    "DepthHead": "diffusers_repr.heads.dense.depth",
    "FeedbackHead": "diffusers_repr.heads.feedback",
    "FiLM": "diffusers_repr.models.film",
    "FlowMatchODEScheduler": "diffusers_repr.schedulers_ext.scheduling_flow_match_ode",
    "FlowMatchSDEScheduler": "diffusers_repr.schedulers_ext.scheduling_flow_match_sde",
    "GradientUNet": "diffusers_repr.models.gradient_unet",
    "HintEncoder": "diffusers_repr.models.hint_encoder",
    "HyperfeaturesHead": "diffusers_repr.heads.hyperfeatures",
    "JointHead": "diffusers_repr.heads.joint",
    "JointViTModel": "diffusers_repr.models.joint_vit",
    "KNNHead": "diffusers_repr.heads.pooled.knn",
    "LinearHead": "diffusers_repr.heads.pooled.linear",
    "MLPHead": "diffusers_repr.heads.pooled.mlp",
    "MaskGITVQModel": "diffusers_repr.models.maskgit_vq",
    "MaskedTokenModel": "diffusers_repr.models.masked_token_model",
    "NoisyClassifier": "diffusers_repr.models.noisy_classifier",
    "NullTokens": "diffusers_repr.models.null_tokens",
    "OdiseHead": "diffusers_repr.heads.odise.head",
    "PatchMaskScheduler": "diffusers_repr.schedulers_ext.scheduling_patch_mask",
    "PixelEnsembleHead": "diffusers_repr.heads.pixel_ensemble",
    "PixelTokenModel": "diffusers_repr.models.pixel_token_model",
    "Projector": "diffusers_repr.heads.projector",
    "ReadoutHead": "diffusers_repr.heads.dense.readout",
    "RepresentationMLPModel": "diffusers_repr.models.representation_mlp",
    "SemanticEncoder": "diffusers_repr.models.semantic_encoder",
    "SiTTransformer2DModel": "diffusers_repr.models.sit",
    "UViTTransformer2DModel": "diffusers_repr.models.uvit",
    "VectorEmbedding": "diffusers_repr.models.vector_embedding",
}
# Module in which a class of ours lay when older folders were saved -> where it lies now.
MOVED_MODULES = {
    "diffusers_repr.heads.depth": "diffusers_repr.heads.dense.depth",
    "diffusers_repr.heads.knn": "diffusers_repr.heads.pooled.knn",
    "diffusers_repr.heads.linear": "diffusers_repr.heads.pooled.linear",
    "diffusers_repr.heads.mlp": "diffusers_repr.heads.pooled.mlp",
    "diffusers_repr.heads.readout": "diffusers_repr.heads.dense.readout",
}
LIBRARIES = ("diffusers", "transformers")
CONSENT = "trust_remote_code=True"

_IDENTIFIER = "[A-Za-z_][A-Za-z0-9_]{0,199}"
_INDEX = schema.mapping(schema.anything(8, 20_000), 1, 200, keys=schema.text(200, pattern=_IDENTIFIER))
_CONFIG = schema.mapping(schema.anything(12, 300_000), 0, 1000)
_WEIGHT_INDEX = schema.record(
    {"weight_map": schema.mapping(schema.file_name(".safetensors", ".bin"), 1)},
    {"metadata": schema.anything(4)},
    others=True,
)

# What may be asked for, far above any published network and far below what takes minutes to build.
MAX_SIDE, MAX_DEPTH, MAX_WIDTH, MAX_TIMESTEPS = 8192, 512, 1 << 24, 100_000
_MAX_MODULES = 500
_MAX_POSITIONS = 1 << 29  # values of a table of position embeddings
_SIDES = re.compile(r"sample_(size|height|width|frames)|image_size|pos_embed_max_size|resolution")
_DEPTHS = re.compile(r"(\w*_)?(layers|depth|depths|blocks|num_hidden_layers)(_per_\w+)?")
_TIMES = re.compile(r"num_train_timesteps|trained_betas|num_diffusion_steps")
_POSITIVE = ("patch_size", "hidden_size", "num_attention_heads", "num_channels", "in_channels")
_NUMBERS = re.compile(r"(\w*_)?eps(ilon)?")  # torch takes any value for them, and fails at the first call
_FREE = re.compile(r"\w*token_id|max_position_embeddings|model_max_length|seed|id2label|label2id")

# Quantised weights that diffusers reads as data; others unpickle objects or fetch code.
_QUANTISED = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "gguf", "quanto", "torchao")


def is_component(entry: Any) -> bool:
    """Whether an entry of `model_index.json` is a component that is there: `[library, class]`."""
    return isinstance(entry, (list, tuple)) and len(entry) == 2 and all(isinstance(part, str) for part in entry)


def check_index(index: Any, at: str, pipelines: Sequence[str] = ()) -> dict[str, tuple[str, str]]:
    """The components of a `model_index.json`, name -> (library, class), each of a library of the table.

    A class of ours that has moved since the file was written is given where it lies now.

    Args:
        index: The parsed file.
        at: What it is called in messages.
        pipelines: Further names of libraries: modules of `diffusers.pipelines`.

    Raises:
        ValueError: If it is no pipeline's index, or names a library that is not of the table.

    Example:
        >>> check_index({"_class_name": "DDPMPipeline", "unet": ["subprocess", "Popen"]}, "model_index.json")
        Traceback (most recent call last):
        ...
        ValueError: model_index.json: unet is 'Popen' of the library 'subprocess'; ...
    """
    index = _INDEX(index, at)
    listed = {name: entry for name, entry in index.items() if is_component(entry) and name[0] != "_"}
    found = {name: (MOVED_MODULES.get(entry[0], entry[0]), entry[1]) for name, entry in listed.items()}
    for name, (library, cls) in found.items():
        known = library in (*LIBRARIES, *pipelines) or OWN_COMPONENTS.get(cls) == library
        if not known or re.fullmatch(_IDENTIFIER, cls) is None or cls[0] == "_":
            raise ValueError(
                f"{at}: {name} is {schema.shown(cls)} of the library {schema.shown(library)}; a file may name classes "
                f"of {', '.join(LIBRARIES)} and diffusers-repr alone, and no other library is imported because a file "
                f"says so. Where you trust its authors, load it by diffusers with {CONSENT} and pass the pipeline: "
                "Denoiser.from_pipe(pipe)."
            )
    return found


def check_config(config: Any, at: str) -> dict[str, Any]:
    """The config of a network, scheduler or encoder: plain values, of sizes that can be built.

    Args:
        config: The parsed file.
        at: What it is called in messages.

    Raises:
        ValueError: For a size, depth or width beyond the limits, and for weights in a form that may run code.

    Example:
        >>> check_config({"sample_size": 10**9}, "unet/config.json")
        Traceback (most recent call last):
        ...
        ValueError: unet/config.json: sample_size is 1000000000; allowed is a whole number from 0 to 8192.
    """
    config = _CONFIG(config, at)
    for key, value in config.items():
        _check_value(key, value, _place(at, key))
    _check_product(config, at)
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        schema.one_of(*_QUANTISED)(method, f"{at}: quantization_config.quant_method")
    return config


def check_component_files(folder: Path, components: Mapping[str, tuple[str, str]]) -> None:
    """Check the files of a pipeline folder's components before a loader reads them.

    Args:
        folder: With a subfolder a component.
        components: As `check_index` gives them.

    Raises:
        ValueError: For code beside a component, configs beyond the limits, weights that an index looks for outside of
            the folder, and adapters that would be fetched from elsewhere.
    """
    refuse_code(folder, components)
    for name, (library, _) in components.items():
        place = folder / name if (folder / name).is_dir() else folder  # some keep a component at the top
        for file in ("config.json", "scheduler_config.json"):
            if (place / file).is_file():
                check_config(read_json(place / file), str(place / file))
        check_weight_files(place)
        if library == "transformers":
            refuse_adapter(place)


def refuse_code(folder: Path, components: Mapping[str, Sequence[str]]) -> None:
    """Refuse code that lies beside a component; diffusers before 0.38 would run it, later versions ask for consent.

    Args:
        folder: With a subfolder a component.
        components: Name -> (library, class).

    Raises:
        ValueError: With the file.
    """
    for name, (library, _) in components.items():
        file = folder / name / f"{library}.py"
        if file.exists():
            raise ValueError(
                f"{str(file)!r} is code for {name}, which is not run. Where you trust its authors, pass {CONSENT}."
            )


def check_weight_files(folder: Path) -> None:
    """Refuse an index of sharded weights (`*.index.json`) that names files outside of its folder.

    Raises:
        ValueError: With the index and the name.
    """
    for index in sorted(folder.glob("*.index*.json")):
        files = _WEIGHT_INDEX(read_json(index), str(index))["weight_map"]
        for file in sorted(set(files.values())):
            schema.inside(folder, file, f"{index}: weight_map")


def refuse_adapter(folder: Path) -> None:
    """Refuse an `adapter_config.json`, for which transformers loads another network, from where the file says.

    Raises:
        ValueError: If there is one.
    """
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{str(folder)!r} holds an adapter (adapter_config.json), for which its base would be loaded from the "
            "place that the file names. Merge it into the base and save that."
        )


def _check_kernels(value: Any, at: str) -> None:
    """Refuse the name of an attention or an expert layer, of all or of a part, for which transformers fetches code."""
    if isinstance(value, Mapping):
        for part, name in value.items():
            _check_kernels(name, _place(at, part))
    elif isinstance(value, str) and "/" in value:
        raise ValueError(
            f"{at} is {schema.shown(value)}, code that would be fetched from the Hub and run; allowed are names "
            "without '/', such as 'sdpa'."
        )
    else:
        schema.optional(schema.text(200))(value, at)


def _check_value(key: str, value: Any, at: str) -> None:
    """One entry of a config; lists of numbers count number by number."""
    if key.endswith(("attn_implementation", "experts_implementation")):
        _check_kernels(value, at)
        return
    if isinstance(value, str):
        if _NUMBERS.fullmatch(key):
            schema.number(0, 1)(value, at)
        return
    if isinstance(value, Mapping):
        for inner, part in value.items():
            if _FREE.fullmatch(key) is None:
                _check_value(str(inner), part, _place(at, inner))
        return
    high = MAX_WIDTH
    if _SIDES.fullmatch(key):
        high = MAX_SIDE
    elif _TIMES.fullmatch(key):
        high = MAX_TIMESTEPS
    elif _DEPTHS.fullmatch(key):
        high = MAX_DEPTH
    if isinstance(value, (list, tuple)):
        schema.listing(schema.anything(10), 0, MAX_TIMESTEPS if key == "trained_betas" else 10_000)(value, at)
        if key.endswith(("block_types", "block_out_channels")) and len(value) > 64:
            raise ValueError(f"{at} is a list of {len(value)}; allowed are at most 64 blocks.")
    for part in _flat(value):
        if isinstance(part, int) and not isinstance(part, bool) and _FREE.fullmatch(key) is None:
            low = 1 if key in _POSITIVE else 0 if high != MAX_WIDTH else -MAX_WIDTH
            schema.integer(low, high)(part, at)
        elif isinstance(part, float) and high != MAX_WIDTH:
            schema.number(0, high)(part, at)


def _check_product(config: Mapping[str, Any], at: str) -> None:
    """What is small one by one and huge together: layers in layers, positions times width."""
    modules = 1.0
    for key in ("layers_per_block", "transformer_layers_per_block"):
        modules *= max([1, *(part for part in _flat(config.get(key)) if isinstance(part, int))])
    modules *= max(1, len(_flat(config.get("block_out_channels"))))
    if modules > _MAX_MODULES:
        raise ValueError(f"{at} describes {modules:.0f} layers in its blocks; allowed are {_MAX_MODULES}.")
    patch = [part for part in _flat(config.get("patch_size")) if isinstance(part, int) and part > 0]
    if not patch:
        return
    sides = [p for key in ("sample_size", "pos_embed_max_size", "image_size") for p in _flat(config.get(key))]
    side = max([0, *(p for p in sides if isinstance(p, (int, float)))]) // min(patch)
    heads, each = config.get("num_attention_heads"), config.get("attention_head_dim")
    width = config.get("hidden_size")
    if not isinstance(width, int):
        width = heads * each if isinstance(heads, int) and isinstance(each, int) else 1
    if side * side * max(width, 1) > _MAX_POSITIONS:
        raise ValueError(
            f"{at} describes {side} x {side} tokens of {width} channels; allowed are {_MAX_POSITIONS} values of "
            "position embeddings."
        )


def _place(at: str, key: Any) -> str:
    joint = "." if ": " in at else ": "
    return f"{at}{joint}{schema.printable(str(key))[:60]}"


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [part for inner in value for part in _flat(inner)]
    return [] if value is None else [value]

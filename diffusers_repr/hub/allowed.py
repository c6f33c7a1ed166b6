"""What may be uploaded: of each kind of artefact a list of file names. What is not on it stays here."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_repr.hub.files import read_json
from diffusers_repr.hub.schema import listing, text

_CARD = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
_WEIGHTS = (
    "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.safetensors.index*.json",
    "model*.safetensors", "model*.safetensors.index*.json",
)  # fmt: skip
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip
_MEASURED = ("loss.jsonl", "evaluation.json", "evaluation.jsonl", "samples.png", "mixing_weights.png")
_MODEL = ("config.json", *_WEIGHTS)
_SOURCE = tuple(f"source/{name}" for name in _MODEL)  # of features, with weights of its own
_COMPONENT = (*_MODEL, "scheduler_config.json", "generation_config.json", *_PROCESSOR, *_TOKENIZER)
ARTIFACTS = "artifacts.json"  # of a training result: the files that a method saved in folders of their own
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


@dataclass(frozen=True)
class Kind:
    """One kind of artefact.

    Attributes:
        repo_type: `model` or `dataset`.
        files: Paths in the folder; `*` stands for letters, digits, `.`, `_` and `-`.
        pipeline: Whether the components that `model_index.json` names are part of it.
    """

    repo_type: str
    files: tuple[str, ...]
    pipeline: bool = False


_STORE = Kind("dataset", (*_CARD, "manifest.json", "data/*.parquet"))
KINDS: Mapping[str, Kind] = {
    "probe": Kind("model", (*_CARD, "probe.json", *_MODEL, *_SOURCE)),
    "matcher": Kind("model", (*_CARD, "correspondence.json", *_SOURCE)),
    "segmenter": Kind("model", (*_CARD, "segmentation.json", *_MODEL, *_SOURCE)),
    "open-vocabulary segmenter": Kind("model", (*_CARD, "panoptic.json", *_MODEL, *_MEASURED)),
    "zero-shot classifier": Kind("model", (*_CARD, "zero_shot.json")),
    "representation probe": Kind("model", (*_CARD, "representation.json", *(f"head/{name}" for name in _MODEL))),
    "store of features": _STORE,
    "store of images": _STORE,
    "store of assignments": _STORE,
    "cache of latents": Kind("dataset", (*_CARD, "manifest.json", "data/*.safetensors")),
    "training result": Kind(
        "model",
        (
            *_CARD,
            *_MODEL,
            *_PROCESSOR,
            *_MEASURED,
            "recipe.yaml",
            "model_index.json",
            "cleandift.json",
            "panoptic.json",
            "probe.json",
            "pytorch_lora_weights.safetensors",
            ARTIFACTS,
            *(f"heads/*/{name}" for name in _MODEL),
            *(f"weak/{name}" for name in _MODEL),
        ),
        pipeline=True,
    ),  # fmt: skip
    "pipeline": Kind(
        "model",
        (
            *_CARD,
            *_MEASURED,
            "model_index.json",
            "cleandift.json",
            "pipeline.py",
            *(f"heads/*/{name}" for name in _MODEL),
        ),
        pipeline=True,
    ),
    "custom pipeline": Kind("model", (*_CARD, "pipeline.py", "__init__.py")),
    "scheduler": Kind("model", (*_CARD, "scheduler_config.json", "scheduling_*.py")),
    "encoder": Kind("model", (*_CARD, *_MODEL, *_PROCESSOR, *_TOKENIZER, *_MEASURED)),
    "head": Kind("model", (*_CARD, *_MODEL, *_MEASURED, *(f"weak/{name}" for name in _MODEL))),
    "model": Kind("model", (*_CARD, *_MODEL, *_PROCESSOR, *_MEASURED)),
}

# What a run, a command, Python and the Hub's client leave beside a result: it stays here, and nothing is said of it.
_LEFT_BEHIND = (
    "checkpoint-*", ".checkpoint-*", "logs", "samples", "__pycache__", "*/__pycache__", ".*.tmp", "*/.*.tmp",
    ".DS_Store", "*/.DS_Store", ".git", ".gitattributes", ".gitignore", ".cache", "recipe.yaml",
)  # fmt: skip
_NEVER = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack", ".onnx")


def kind_of(folder: Path) -> str:
    """What a folder holds, told by its files; one of `KINDS`.

    Raises:
        ValueError: If it is none of them, or the file that tells is damaged.
    """

    def has(name: str) -> bool:
        return (folder / name).is_file()

    if has("probe.json"):
        return "probe"
    if has("segmentation.json"):
        return "segmenter"
    if has("correspondence.json"):
        return "matcher"
    if has("panoptic.json"):
        return "open-vocabulary segmenter"
    if has("zero_shot.json"):
        return "zero-shot classifier"
    if has("representation.json"):
        return "representation probe"
    if has("manifest.json"):
        manifest = read_json(folder / "manifest.json")
        layout = manifest.get("layout") if isinstance(manifest, dict) else None
        if layout is None:
            return "store of features"
        kind = layout.get("kind") if isinstance(layout, dict) else None
        return f"store of {kind}" if kind in ("images", "assignments") else "cache of latents"
    if has("recipe.yaml") and (has("model_index.json") or has("config.json")):
        return "training result"
    if has("model_index.json"):
        return "pipeline"
    if has("pipeline.py"):
        return "custom pipeline"
    if has("config.json"):
        config = read_json(folder / "config.json")
        return "encoder" if isinstance(config, dict) and "model_type" in config else "model"
    if has("scheduler_config.json"):
        return "scheduler"
    raise ValueError(
        f"Cannot tell what {str(folder)!r} is: it has none of probe.json (probe), segmentation.json (segmenter), "
        "panoptic.json (open-vocabulary segmenter), correspondence.json (matcher), zero_shot.json (zero-shot "
        "classifier), representation.json (representation probe), manifest.json (store of features), "
        "model_index.json (pipeline), pipeline.py (custom pipeline), "
        "config.json (model or head) and scheduler_config.json (scheduler)."
    )


def allowed_names(folder: Path, kind: str, include: Iterable[str] = ()) -> AllowList:
    """The list of an artefact: that of its kind, of its components, and the pictures that its card shows.

    Args:
        folder: The artefact.
        kind: One of `KINDS`.
        include: Further paths in the folder, as in `Kind.files`.

    Raises:
        ValueError: For an unknown kind, a damaged `model_index.json` or `artifacts.json`, or an `include` that is
            never uploaded.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}; allowed are {', '.join(map(repr, KINDS))}.")
    chosen = KINDS[kind]
    files = [*chosen.files, *_checked(include)]
    if ARTIFACTS in chosen.files and (folder / ARTIFACTS).is_file():
        files += _recorded(folder / ARTIFACTS)
    if chosen.pipeline and (folder / "model_index.json").is_file():
        files += _components(read_json(folder / "model_index.json"))
    configs = {name for name in files if name.split("/")[-1] == "config.json"}
    for path in sorted(path for name in configs for path in folder.glob(name)):
        if path.is_file() and not path.is_symlink():  # of links the upload says more
            beside = path.parent.relative_to(folder)
            files += [(beside / code).as_posix() for code in _own_code(read_json(path))]
    return AllowList(kind, tuple(dict.fromkeys(files)), _shown(folder))


@dataclass(frozen=True)
class AllowList:
    """The names that one upload may hold.

    Attributes:
        kind: Of the artefact.
        files: Paths, with `*` as in `Kind.files`.
        pictures: Paths of pictures.
    """

    kind: str
    files: tuple[str, ...]
    pictures: frozenset[str]

    def allows(self, path: str) -> bool:
        """Whether a file of this path (with `/`) may be uploaded."""
        return path in self.pictures or any(_pattern(name).fullmatch(path) for name in self.files)

    def enters(self, path: str) -> bool:
        """Whether a folder of this path can hold such a file."""
        depth = path.count("/") + 1
        inside = (name.split("/")[:depth] for name in (*self.files, *self.pictures) if name.count("/") >= depth)
        return any(_pattern("/".join(pieces)).fullmatch(path) for pieces in inside)

    def left_behind(self, path: str) -> bool:
        """Whether a path is not on the list, and of those that every run leaves and nobody needs to be told of."""
        return not self.allows(path) and any(_pattern(name).fullmatch(path) for name in _LEFT_BEHIND)


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile("[A-Za-z0-9._-]*".join(map(re.escape, name.split("*"))))


def _checked(include: Iterable[str]) -> list[str]:
    names = [include] if isinstance(include, str) else list(include)
    for name in names:
        pieces = name.split("/")
        if name.endswith(_NEVER) or any(piece == "" or piece.startswith((".", "*")) for piece in pieces[:-1]):
            raise ValueError(f"include={name!r} is never uploaded: pickles, hidden and foreign folders stay here.")
        if pieces[-1] == "" or pieces[-1].startswith("."):
            raise ValueError(f"include={name!r} is never uploaded: a file name is needed, and hidden files stay here.")
    return names


def _recorded(path: Path) -> list[str]:
    """Files that a run wrote into folders that its method chose."""
    names = listing(text(1000, pattern=r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)+", what="a file in a folder"))
    try:
        found = _checked(names(read_json(path), ARTIFACTS))
        left = [name for name in found if any(_pattern(one).fullmatch(name.split("/")[0]) for one in _LEFT_BEHIND)]
        if left:
            raise ValueError(f"{left[0]!r} is of a run's own and stays here")
        return found
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({error}). Delete it, or run the training's last step anew."
        ) from error


def _components(index: Any) -> list[str]:
    """Files of the components that a `model_index.json` names, and of the code it names."""
    if not isinstance(index, dict):
        raise ValueError(f"model_index.json holds a JSON {type(index).__name__}; it is an object ({{...}}).")
    files = []
    for name, value in index.items():
        if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
            continue
        code = f"{value[0]}.py" if value[0].isidentifier() else None
        if name == "_class_name":  # a pipeline class of its own file
            files += [code] if code else []
        elif re.fullmatch(r"[A-Za-z0-9_]+", name):
            files += [f"{name}/{file}" for file in (*_COMPONENT, *([code] if code else []))]
    return files


def _own_code(config: Any) -> list[str]:
    """Files of code that a config names in `auto_map` and that lie beside it."""
    named = config.get("auto_map") if isinstance(config, dict) else None
    if not isinstance(named, dict):
        return []
    modules = [str(value).split(".")[0] for value in named.values() if "--" not in str(value)]
    return [f"{module}.py" for module in modules if module.isidentifier()]


def _shown(folder: Path) -> frozenset[str]:
    """Pictures in the folder that README.md shows."""
    card = folder / "README.md"
    if card.is_symlink() or not card.is_file():
        return frozenset()
    found = re.findall(r"!\[[^\]]*\]\(([^)\s]+)|<img[^>]*\ssrc=[\"']([^\"']+)", card.read_text("utf-8", "replace"))
    names = (name.removeprefix("./") for pair in found for name in pair if name)
    return frozenset(
        name
        for name in names
        if name.lower().endswith(_PICTURES) and re.fullmatch(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)*", name)
    )

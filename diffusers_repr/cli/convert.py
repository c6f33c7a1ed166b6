"""`diffusers-repr convert CHECKPOINT --out FOLDER`: official checkpoints of REPA, REG, SiT and DiT to a pipeline."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers_repr.models.convert import ConvertedCheckpoint


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("checkpoint", help="a .pt file (read without running code in it) or .safetensors")
    parser.add_argument("--out", required=True, help="folder to write; `SiTPipeline.from_pretrained` loads it")
    parser.add_argument(
        "--weights",
        choices=("ema", "model", "state_dict"),
        help="which of those in the file; ema if there, else model",
    )
    parser.add_argument(
        "--architecture",
        choices=("sit", "dit"),
        help="what the network predicts: a velocity (REPA too), or noise; needed where the file does not tell",
    )
    parser.add_argument(
        "--config",
        help="arguments of SiTTransformer2DModel that shapes do not tell, JSON or a file with JSON or YAML: "
        "'{\"num_attention_heads\": 6}'",
    )
    parser.add_argument("--path", choices=("linear", "cosine"), default="linear", help="of a sit")
    parser.add_argument("--sampler", choices=("sde", "ode"), default="sde", help="of a sit; dit gets DDIM")
    parser.add_argument(
        "--vae", help="folder or Hub id of an AutoencoderKL to put beside, such as stabilityai/sd-vae-ft-ema"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was written."""
    from diffusers_repr.hub.files import atomic_folder
    from diffusers_repr.models.convert import convert_state_dict, read_checkpoint, select_weights

    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise ValueError(f"{args.out!r} exists already; give another folder, or --overwrite.")
    overrides = read_config(args.config)
    weights, name = select_weights(read_checkpoint(args.checkpoint), args.weights)
    converted = convert_state_dict(weights, args.architecture, overrides)
    pipe = _pipeline(converted, args)
    with atomic_folder(out, overwrite=args.overwrite) as folder:
        pipe.save_pretrained(folder)
        _save_projectors(converted, folder)
    _report(converted, name, out)
    return 0


def read_config(given: str | None) -> dict[str, Any]:
    """Arguments of `SiTTransformer2DModel`, from JSON text or a file with JSON or YAML.

    Raises:
        FileNotFoundError: If it is neither JSON text nor a file.
        ValueError: For text that is no JSON or YAML object, and for unknown arguments.
    """
    import inspect

    import yaml

    from diffusers_repr.models import SiTTransformer2DModel

    if given is None:
        return {}
    text = given.lstrip()
    if not text.startswith("{"):
        path = Path(given)
        if not path.is_file():
            raise FileNotFoundError(f"--config {given!r} is no file, and no JSON object either ({{...}}).")
        text = path.read_text(encoding="utf-8")
    try:
        config = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {given!r} is no JSON or YAML ({error}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"--config {given!r} holds a {type(config).__name__}; an object of arguments is needed.")
    known = set(inspect.signature(SiTTransformer2DModel.__init__).parameters) - {"self"}
    config = {key: value for key, value in config.items() if not str(key).startswith("_")}
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(f"--config has {', '.join(unknown)}; SiTTransformer2DModel takes {', '.join(sorted(known))}.")
    return config


def _pipeline(converted: ConvertedCheckpoint, args: argparse.Namespace) -> Any:
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, DDIMScheduler

    from diffusers_repr.models import ClassTokenHead, SiTTransformer2DModel
    from diffusers_repr.pipelines.sit.pipeline import SiTPipeline
    from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
    from diffusers_repr.schedulers_ext.scheduling_flow_match_sde import FlowMatchSDEScheduler

    with init_empty_weights(include_buffers=False):  # nothing is drawn, and nothing held twice
        model = SiTTransformer2DModel(**converted.config)
    model.load_state_dict(converted.transformer, assign=True)
    model.eval()
    scheduler: Any
    if converted.architecture == "dit":
        scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    else:
        cls = FlowMatchSDEScheduler if args.sampler == "sde" else FlowMatchODEScheduler
        scheduler = cls(path=args.path)
    vae = None if args.vae is None else AutoencoderKL.from_pretrained(args.vae)
    head = None
    if converted.class_token is not None:
        head = ClassTokenHead(*converted.class_token["embed.weight"].shape).to(
            converted.class_token["embed.weight"].dtype
        )
        head.load_state_dict(converted.class_token)
    return SiTPipeline(model, scheduler, vae, class_token=head)


def _save_projectors(converted: ConvertedCheckpoint, folder: Path) -> None:
    from diffusers_repr.heads.projector import Projector

    for at, state in enumerate(converted.projectors):
        (hidden, width), out = state["0.weight"].shape, state["4.weight"].shape[0]
        projector = Projector(width, out, hidden_dim=hidden).to(state["0.weight"].dtype)
        projector.load_state_dict({f"layers.{name}": value for name, value in state.items()})
        projector.save_pretrained(folder / "heads" / f"projector-{at}")


def _report(converted: ConvertedCheckpoint, name: str, out: Path) -> None:
    config = converted.config
    count = sum(value.numel() for value in converted.transformer.values())
    source = f"the weights {name!r}" if name else "the weights"
    print(
        f"Wrote {source} to {out}: {converted.architecture}, {config['num_layers']} blocks of width "
        f"{config['hidden_size']} with {config['num_attention_heads']} heads, patch {config['patch_size']}, "
        f"{config['num_classes']} classes, {count / 1e6:.1f} M parameters, {len(converted.projectors)} projectors."
    )
    for note in converted.notes:
        print(note)

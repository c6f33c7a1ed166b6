"""`diffusers-repr convert CHECKPOINT --out FOLDER`: papers' checkpoints to pipelines, encoders and heads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffusers_repr.cli import options
from diffusers_repr.config.recipe import REQUIRED, read_recipe, setting

if TYPE_CHECKING:
    from torch import Tensor

    from diffusers_repr.models.convert import ConvertedCheckpoint


OUT = options.Out(
    "converted pipeline, encoder or head", ("model_index.json", "config.json"), replaced=True, again="refused"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("checkpoint",)

    checkpoint: str = setting(
        REQUIRED, "a .pt, .pth or .pth.tar file (read without running code in it) or .safetensors"
    )
    out: str = setting(
        REQUIRED,
        "folder to write; `SiTPipeline` loads it (of HybViT `JointDiffusionPipeline`, of MoCo v3 "
        "`Encoder.from_pretrained`, of RCG `RCGPipeline`, of MAGE `TokenGenerationPipeline`, of a readout "
        "`ReadoutHead`, "
        "of Hyperfeatures `Hyperfeatures.from_pretrained`)",
    )
    weights: Literal["ema", "model", "state_dict", "model_state_dict"] | None = setting(
        None, "which of those in the file; default: ema if there, else model"
    )
    architecture: Literal["sit", "dit", "hybvit", "uvit"] | None = setting(
        None,
        "what the network predicts: a velocity (REPA too), noise, noise and classes, or noise with long skips; needed "
        "where the file does not tell",
    )
    model_config: str | None = setting(
        None,
        "arguments of the network that shapes do not tell, JSON or a file with JSON or YAML: "
        "'{\"num_attention_heads\": 6}'",
    )
    path: Literal["linear", "cosine"] | None = setting(None, "of a sit; default: linear")
    sampler: Literal["sde", "ode"] | None = setting(None, "of a sit; default: sde; dit gets DDIM")
    process: Literal["continuous", "discrete"] | None = setting(
        None, "of a uvit: beta from 0.1 to 20, or the steps of Stable Diffusion; default: as published for its size"
    )
    vae: str | None = setting(
        None,
        "folder or Hub id of an AutoencoderKL to put beside, such as stabilityai/sd-vae-ft-ema; of MAGE of a VQModel",
    )
    base: str | None = setting(
        None, "of a readout head or of Hyperfeatures: folder or Hub id of the model it was trained on"
    )
    kind: Literal["spatial", "appearance", "correspondence"] | None = setting(
        None, "of a readout head, where the file does not tell"
    )
    overwrite: bool = setting(False, "replace the folder if it exists")

    @classmethod
    def refuse_config(cls, given: str) -> None:
        """Tell who means the network's arguments that these are `--model_config`.

        Raises:
            ValueError: If `--config` is given JSON text, or a file with arguments of a network.
        """
        from diffusers_repr.hub.schema import shown

        if not given.lstrip().startswith("{"):
            held = read_recipe(given) if Path(given).is_file() else {}
            settings = {field.name for field in dataclasses.fields(cls)}
            if not held or settings & set(held) or not (network_arguments() | {"_class_name"}) & set(held):
                return
        raise ValueError(
            f"--config is the recipe of the command, a YAML file with its settings (checkpoint, out, ...); "
            f"{shown(given)} holds arguments of the network: give them as --model_config."
        )


def network_arguments() -> set[str]:
    """Names of the arguments of all networks that are converted to."""
    from diffusers_repr.models import JointViTModel, SiTTransformer2DModel, UViTTransformer2DModel

    return set().union(*map(_arguments, (SiTTransformer2DModel, JointViTModel, UViTTransformer2DModel)))


def _arguments(model: type) -> set[str]:
    import inspect

    return set(inspect.signature(model.__init__).parameters) - {"self"}  # type: ignore[misc]


def run(args: Settings) -> int:
    """Convert, and print what was written."""
    from diffusers_repr.cli.convert_hyperfeatures import save_hyperfeatures
    from diffusers_repr.cli.convert_mage import save_mage
    from diffusers_repr.cli.convert_readout import save_readout
    from diffusers_repr.cli.convert_representation import save_representation
    from diffusers_repr.heads.convert import is_published_readout
    from diffusers_repr.heads.convert_hyperfeatures import is_published_hyperfeatures
    from diffusers_repr.models.checkpoint import read_checkpoint, select_weights
    from diffusers_repr.models.convert_mage import is_mage
    from diffusers_repr.models.convert_moco import is_moco_v3
    from diffusers_repr.models.convert_representation import is_representation_model

    held = read_checkpoint(args.checkpoint)
    others: tuple[str, ...] = ("weights", "architecture", "model_config", "path", "sampler", "process", "vae")
    if is_published_hyperfeatures(held):
        _refuse(args, (*others, "kind"), "This is the network of Diffusion Hyperfeatures, a head on a U-Net")
        save_hyperfeatures(held, args.checkpoint, args.out, args.base, overwrite=args.overwrite)
        return 0
    if is_published_readout(held):
        _refuse(args, others, "A readout head is no network by itself")
        save_readout(held, args.checkpoint, args.out, args.base, args.kind, overwrite=args.overwrite)
        return 0
    _refuse(args, ("base", "kind"), "This is no checkpoint of a readout head or of Hyperfeatures")
    overrides = read_config(args.model_config)
    weights, name = select_weights(held, args.weights)
    if is_moco_v3(weights):
        _refuse(args, ("architecture", "vae", "path", "sampler", "process"), "MoCo v3 is an encoder, no pipeline")
        _save_encoder(args, weights, overrides)
    elif is_mage(weights):
        _refuse(args, ("architecture", "path", "sampler", "process"), "MAGE is a model of tokens")
        save_mage(weights, args.checkpoint, args.out, overrides, args.vae, overwrite=args.overwrite)
    elif is_representation_model(weights):
        own = ("architecture", "vae", "path", "sampler", "model_config")
        _refuse(args, own, "A representation diffusion model of RCG tells all of it")
        save_representation(weights, args.checkpoint, args.out, overwrite=args.overwrite)
    else:
        _save_pipeline(args, weights, overrides, name, _form(args, weights), held.get("vae"))
    return 0


def _form(args: Settings, weights: dict[str, Tensor]) -> Literal["joint", "uvit", "sit"]:
    """Whose code the weights are of, by what is asked for or by their names."""
    from diffusers_repr.models.convert_joint import is_joint_vit
    from diffusers_repr.models.convert_uvit import is_uvit

    asked = args.architecture
    if asked == "hybvit" or (asked is None and is_joint_vit(weights)):
        _refuse(args, ("vae", "path", "sampler", "process"), "A HybViT is a network of pixels with a DDPM")
        return "joint"
    if asked == "uvit" or (asked is None and is_uvit(weights)):
        _refuse(args, ("path", "sampler"), "A U-ViT gets DDIM")
        return "uvit"
    _refuse(args, ("process",), "Only a U-ViT was trained by one process or the other")
    return "sit"


def _save_pipeline(
    args: Settings,
    weights: dict[str, Tensor],
    overrides: dict[str, Any],
    name: str,
    form: Literal["joint", "uvit", "sit"],
    vae: Any,
) -> None:
    """A diffusion model, its projectors and its scheduler."""
    from diffusers_repr.hub.files import atomic_folder
    from diffusers_repr.models import JointViTModel, SiTTransformer2DModel, UViTTransformer2DModel
    from diffusers_repr.models.convert import convert_state_dict
    from diffusers_repr.models.convert_joint import convert_joint_vit
    from diffusers_repr.models.convert_uvit import convert_uvit

    model: Any = {"joint": JointViTModel, "uvit": UViTTransformer2DModel, "sit": SiTTransformer2DModel}[form]
    overrides = checked(overrides, model)
    try:
        if form == "joint":
            converted = convert_joint_vit(weights, overrides)
        elif form == "uvit":
            converted = convert_uvit(weights, args.process, overrides)
        else:
            converted = convert_state_dict(weights, args.architecture, overrides)
    except ValueError as error:
        raise ValueError(f"{args.checkpoint!r}: {error}") from error
    pipe = _joint_pipeline(converted) if form == "joint" else _pipeline(converted, args, vae)
    with atomic_folder(Path(args.out), overwrite=args.overwrite) as folder:
        pipe.save_pretrained(folder)
        _save_projectors(converted, folder)
    _report(converted, name, Path(args.out), getattr(pipe, "vae", None) is not None)


def _save_encoder(args: Settings, weights: dict[str, Tensor], overrides: dict[str, Any]) -> None:
    """A vision transformer as transformers keeps it."""
    from safetensors.torch import save_file

    from diffusers_repr.hub.files import atomic_folder, write_json
    from diffusers_repr.models.convert_moco import convert_moco_v3

    unknown = sorted(set(overrides) - {"num_attention_heads"})
    if unknown:
        raise ValueError(f"--model_config has {', '.join(unknown)}; of a MoCo v3 it takes num_attention_heads alone.")
    try:
        converted = convert_moco_v3(weights, overrides.get("num_attention_heads"))
    except ValueError as error:
        raise ValueError(f"{args.checkpoint!r}: {error}") from error
    out = Path(args.out)
    with atomic_folder(out, overwrite=args.overwrite) as folder:
        save_file(converted.weights, folder / "model.safetensors", {"format": "pt"})
        write_json(folder / "config.json", converted.config)
        write_json(folder / "preprocessor_config.json", converted.processor)
    config = converted.config
    print(
        f"Wrote the encoder of a MoCo v3 to {out}: {config['num_hidden_layers']} blocks of width "
        f"{config['hidden_size']} with {config['num_attention_heads']} heads, patch {config['patch_size']}, made for "
        f"{config['image_size']} pixels. Encoder.from_pretrained({str(out)!r}) reads it."
    )
    for note in converted.notes:
        print(note)


def _refuse(args: Settings, names: tuple[str, ...], why: str) -> None:
    """Arguments that would do nothing for this network."""
    given = [f"--{name}" for name in names if getattr(args, name) is not None]
    if given:
        raise ValueError(f"{why}; drop {', '.join(given)}.")


def read_config(given: str | None) -> dict[str, Any]:
    """Arguments of the network, from JSON text or a file with JSON or YAML.

    Raises:
        FileNotFoundError: If it is neither JSON text nor a file.
        ValueError: For text that is no JSON or YAML object, or values of another kind.
    """
    from diffusers_repr.hub.schema import boolean, either, integer, listing, mapping, number, optional, shown
    from diffusers_repr.hub.schema import text as schema_text
    from diffusers_repr.hub.yaml_text import parse_yaml, read_text

    if given is None:
        return {}
    text, at = given, "--model_config"
    if not given.lstrip().startswith("{"):
        path = Path(given)
        if len(given) > 4096 or not path.is_file():
            raise FileNotFoundError(f"--model_config {shown(given)} is no file, and no JSON object either ({{...}}).")
        text, at = read_text(path), str(path)
    try:
        config = json.loads(text) if text.lstrip().startswith("{") else parse_yaml(text, at)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"--model_config {shown(given)} is no JSON or YAML ({error}).") from error
    if not isinstance(config, dict):
        kind = type(config).__name__
        raise ValueError(f"--model_config {shown(given)} holds a {kind}; an object of arguments is needed.")
    config = {key: value for key, value in config.items() if not str(key).startswith("_")}
    names = listing(schema_text(1000), 1), mapping(schema_text(1000), 1)
    sizes = listing(integer(1, 1_000_000), 1, 8)
    argument = either(boolean(), integer(-1, 1_000_000), number(-1e6, 1e6), schema_text(200), *names, sizes)
    return mapping(optional(argument))(config, at)


def checked(config: dict[str, Any], model: type) -> dict[str, Any]:
    """The arguments, if a model takes all of them.

    Raises:
        ValueError: For unknown ones.
    """
    known = _arguments(model)
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(
            f"--model_config has {', '.join(unknown)}; {model.__name__} takes {', '.join(sorted(known))}."
        )
    return config


def _pipeline(converted: ConvertedCheckpoint, args: Settings, own_vae: Any) -> Any:
    from diffusers import DDIMScheduler

    from diffusers_repr.models import ClassTokenHead, SiTTransformer2DModel, UViTTransformer2DModel
    from diffusers_repr.pipelines.sit import SiTPipeline
    from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
    from diffusers_repr.schedulers_ext.scheduling_flow_match_sde import FlowMatchSDEScheduler

    model = _network(UViTTransformer2DModel if converted.architecture == "uvit" else SiTTransformer2DModel, converted)
    scheduler: Any
    if converted.architecture == "dit":
        _refuse(args, ("path", "sampler"), "A DiT gets DDIM")
        scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    elif converted.architecture == "uvit":
        scheduler = DDIMScheduler(**converted.scheduler)
    else:
        cls = FlowMatchODEScheduler if args.sampler == "ode" else FlowMatchSDEScheduler
        scheduler = cls(path=args.path or "linear")
    vae = _autoencoder(converted, args, own_vae)
    head = None
    if converted.class_token is not None:
        embed = converted.class_token["embed.weight"]
        head = ClassTokenHead(*embed.shape).to(embed.dtype)
        head.load_state_dict(converted.class_token)
    return SiTPipeline(model, scheduler, vae, class_token=head)


def _autoencoder(converted: ConvertedCheckpoint, args: Settings, own: Any) -> Any:
    """The VAE that is put beside: the one named, or REPA-E's own, with the statistics of its latents in it."""
    from diffusers_repr.denoiser.loading import load_autoencoder
    from diffusers_repr.models.convert_autoencoder import convert_autoencoder
    from diffusers_repr.objectives.repa.vae_statistics import write_statistics
    from diffusers_repr.pipelines.sit import SiTPipeline

    mean, var = converted.relatives.latent_mean, converted.relatives.latent_var
    if isinstance(own, dict) and mean is not None:  # REPA-E
        _refuse(args, ("vae",), "This checkpoint brings the VAE that was trained with it")
        try:
            vae = convert_autoencoder(own)
        except ValueError as error:
            raise ValueError(f"{args.checkpoint!r}, its 'vae': {error}") from error
    else:
        vae = None if args.vae is None else load_autoencoder(args.vae)
    if vae is not None and mean is not None and var is not None:
        if len(mean) != vae.config["latent_channels"]:
            raise ValueError(
                f"{args.checkpoint!r} is of latents of {len(mean)} channels, the VAE's have "
                f"{vae.config['latent_channels']}."
            )
        write_statistics(vae, mean.double(), var.double().sqrt(), SiTPipeline)
    return vae


def _joint_pipeline(converted: ConvertedCheckpoint) -> Any:
    from diffusers import DDPMScheduler

    from diffusers_repr.models import JointViTModel
    from diffusers_repr.pipelines.joint_diffusion import JointDiffusionPipeline

    return JointDiffusionPipeline(_network(JointViTModel, converted), DDPMScheduler(**converted.scheduler))


def _network(model: Any, converted: ConvertedCheckpoint) -> Any:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):  # nothing is drawn, and nothing held twice
        network = model(**converted.config)
    network.load_state_dict(converted.transformer, assign=True)
    return network.eval()


def _save_projectors(converted: ConvertedCheckpoint, folder: Path) -> None:
    heads = {f"projector-{at}": state for at, state in enumerate(converted.projectors)}
    if converted.relatives.self_head is not None:
        heads["projector-self-alignment"] = converted.relatives.self_head
    for name, state in heads.items():
        _projector(state).save_pretrained(folder / "heads" / name)


def _projector(state: dict[str, Tensor]) -> Any:
    """A projector of one linear layer or convolution (`weight`, `bias`), or of several layers (`0.weight`, ...)."""
    from diffusers_repr.heads.projector import Projector

    settings: dict[str, Any]
    if "weight" in state:
        out, width, *kernel = state["weight"].shape
        settings = {"kind": "conv", "kernel_size": kernel[0]} if kernel else {"num_layers": 1}
        prefix = "layers." if kernel else "layers.0."
    else:
        hidden, width = state["0.weight"].shape
        last = max(int(key.partition(".")[0]) for key in state)
        out, prefix = state[f"{last}.weight"].shape[0], "layers."
        settings = {"hidden_dim": hidden, "num_layers": last // 2 + 1}
    projector = Projector(width, out, **settings).to(next(iter(state.values())).dtype)
    projector.load_state_dict({f"{prefix}{key}": value for key, value in state.items()})
    return projector


_NORMALIZED = "REPA-E normalises its latents: mean and variance are written into the weights of the VAE."
_NO_VAE = (
    "REPA-E normalises its latents, and no VAE was put beside: give the one it was trained with by --vae, or take "
    "(z - mean) / std by the file's bn.running_mean and bn.running_var."
)


def _report(converted: ConvertedCheckpoint, name: str, out: Path, has_vae: bool) -> None:
    config = converted.config
    count = sum(value.numel() for value in converted.transformer.values())
    source = f"the weights {name!r}" if name else "the weights"
    print(
        f"Wrote {source} to {out}: {converted.architecture}, {config['num_layers']} blocks of width "
        f"{config['hidden_size']} with {config['num_attention_heads']} heads, patch {config['patch_size']}, "
        f"{config['num_classes']} classes, {count / 1e6:.1f} M parameters, {len(converted.projectors)} projectors."
    )
    relatives = converted.relatives
    if relatives.self_head is not None:
        print("The projector of SRA is in heads/projector-self-alignment.")
    if relatives.latent_mean is not None:
        print(_NORMALIZED if has_vae else _NO_VAE)
    for note in converted.notes:
        print(note)

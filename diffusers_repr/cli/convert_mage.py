"""`diffusers-repr convert` of MAGE, and of RCG's generator of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_OWN = ("num_attention_heads", "decoder_num_attention_heads")


def save_mage(
    weights: Mapping[str, Tensor],
    file: str,
    out: str,
    overrides: Mapping[str, Any],
    tokenizer: str | None,
    *,
    overwrite: bool,
) -> None:
    """Write a `TokenGenerationPipeline`; a `MaskedTokenModel` alone where there is no tokenizer.

    Args:
        weights: As selected from the checkpoint.
        file: Its name, for messages.
        out: Folder to write.
        overrides: Of the network's arguments, its heads.
        tokenizer: Folder or Hub id of a `VQModel` of the same codes, in place of that in the file.
        overwrite: Replace the folder if it exists.

    Raises:
        ValueError: As `convert_mage`, for other overrides, and a tokenizer of another vocabulary.
    """
    from diffusers import VQModel

    from diffusers_repr.hub.files import atomic_folder
    from diffusers_repr.models import MaskedTokenModel, MaskGITVQModel
    from diffusers_repr.models.convert_mage import convert_mage
    from diffusers_repr.pipelines.token_generation import TokenGenerationPipeline

    unknown = sorted(set(overrides) - set(_OWN))
    if unknown:
        raise ValueError(f"--model_config has {', '.join(unknown)}; of MAGE it takes {', '.join(_OWN)} alone.")
    try:
        converted = convert_mage(weights, overrides)
    except ValueError as error:
        raise ValueError(f"{file!r}: {error}") from error
    network = MaskedTokenModel(**converted.config).eval()
    network.load_state_dict(converted.weights)
    made: Any = network
    if tokenizer is not None:
        made = TokenGenerationPipeline(VQModel.from_pretrained(tokenizer), network)
    elif converted.tokenizer is not None:
        vqvae = MaskGITVQModel(**converted.tokenizer[0]).eval()
        found = vqvae.state_dict()
        wrong = {k: v for k, v in converted.tokenizer[1].items() if k not in found or found[k].shape != v.shape}
        if wrong or len(found) != len(converted.tokenizer[1]):
            names = sorted(wrong) or sorted(found.keys() - converted.tokenizer[1].keys())
            raise ValueError(f"{file!r}: its tokenizer (vqgan) is not quite MaskGIT's: {names[:3]}.")
        vqvae.load_state_dict(converted.tokenizer[1])
        made = TokenGenerationPipeline(vqvae, network)
    with atomic_folder(Path(out), overwrite=overwrite) as folder:
        made.save_pretrained(folder)
    config = converted.config
    count = sum(value.numel() for value in converted.weights.values())
    vectors = f"vectors of {config['condition_dim']} channels" if config["condition_dim"] else "no condition"
    print(
        f"Wrote MAGE to {out}: {config['vocab_size']} tokens in {config['sample_size']} x {config['sample_size']} "
        f"places, {config['num_layers']} and {config['decoder_num_layers']} blocks of width {config['hidden_size']}, "
        f"{vectors}, {count / 1e6:.1f} M parameters. {type(made).__name__}.from_pretrained({out!r}) loads it."
    )
    if made is network:
        print("It is the network alone: the file holds no tokenizer; --vae puts a VQModel of the same codes beside.")
    for note in converted.notes:
        print(note)

"""Run by `test_loading.py`: loads each folder of ours with `custom_pipeline=`, in a process of its own.

Guided ones are compared with `guide` on the stock pipeline, saved, loaded again with and without the folder; SiT and
joint diffusion with what the test, whose folder is the argument, has sampled; features with the plain extractor.
"""

import multiprocessing
import sys
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline

from diffusers_repr import PAG, Denoiser, FeatureExtractor, guide
from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.tasks.correspondence import Correspondence
from tests.pipelines.guided_cases import GUIDED, arguments, run
from tests.pipelines.load_custom import check_all
from tests.testers.hosts import before
from tests.testers.models import saved

FEW = ("sd", "dit")  # one with text, one with classes by name


def consent(folder: str) -> dict:
    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()
    return {"custom_pipeline": str(Path(__file__).parents[2] / "pipelines" / folder), "trust_remote_code": True}


def load_guided(folder: str, name: str, class_name: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(saved(name), **consent(folder))
    stock = DiffusionPipeline.from_pretrained(saved(name))
    assert type(pipe).__name__ == class_name
    assert type(pipe).__module__.startswith("diffusers_modules.local")
    kept = [{k for k, c in p.components.items() if c is not None} for p in (pipe, stock)]
    assert kept[0] == kept[1]
    assert {k: v for k, v in pipe.config.items() if k[0] != "_"} == {
        k: v for k, v in stock.config.items() if k[0] != "_"
    }
    settings = arguments(name) | {"num_inference_steps": 2}
    guided = run(pipe, **settings, guidance=PAG(2.0))
    assert pipe.guidance_stats.lanes > len(pipe.guidance_stats.steps)
    if name == "dit":  # of the others test_guided.py tells, which imports them
        plain = run(stock, **settings)
        assert np.array_equal(run(pipe, **settings), plain)
        with guide(stock, PAG(2.0)):
            assert np.array_equal(run(stock, **settings), guided)
        assert np.abs(guided - plain).max() > 1e-4
    with tempfile.TemporaryDirectory() as root:
        pipe.save_pretrained(root)
        assert type(DiffusionPipeline.from_pretrained(root)) is type(stock)
        again = DiffusionPipeline.from_pretrained(root, **consent(folder))
        assert type(again).__name__ == class_name
        if name in ("dit", "class_unet"):
            again.enable_model_cpu_offload(device="cpu")
        assert np.array_equal(run(again, **settings, guidance=PAG(2.0)), guided)
    print(f"{folder} is good", flush=True)


def load_sit(place: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(place / "sit", **consent("sit"))
    assert type(pipe).__module__.startswith("diffusers_modules.local")
    call = {"num_inference_steps": 2, "output_type": "np"}
    images = pipe("goldfish", generator=torch.Generator().manual_seed(0), **call).images
    assert np.array_equal(images, np.load(place / "sit.npy"))
    pipe.save_pretrained(place / "sit-again")
    assert type(DiffusionPipeline.from_pretrained(place / "sit-again", **consent("sit"))).__name__ == "SiTPipeline"
    assert DiffusionPipeline.from_pretrained(place / "sit-pixels", **consent("sit")).vae is None
    print("sit is good", flush=True)


def load_joint(place: Path) -> None:
    for kind in ("unet", "vit"):
        pipe = DiffusionPipeline.from_pretrained(place / kind, **consent("joint_diffusion"))
        assert type(pipe).__module__.startswith("diffusers_modules.local")
        pipe.set_progress_bar_config(disable=True)
        call = {"class_labels": "owl", "guidance_scale": 5.0, "num_inference_steps": 2, "output_type": "np"}
        want = np.load(place / f"{kind}.npy")

        def far(pipe=pipe, call=call, want=want) -> float:
            return np.abs(pipe(**call, generator=torch.Generator().manual_seed(0)).images - want).max()

        assert far() < 5e-5
        pipe.enable_model_cpu_offload(device="cpu")
        assert far() < 5e-5
        pipe.classify(torch.from_numpy(want).permute(0, 3, 1, 2))
        pipe.remove_all_hooks()
        cpu_offload(pipe.unet, torch.device("cpu"))  # the sequential one, whose "cpu:0" accelerate cannot handle
        assert far() < 5e-5
    print("joint is good", flush=True)


def load_rcg(place: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(place / "rcg", **consent("rcg"))
    assert type(pipe).__module__.startswith("diffusers_modules.local")
    pipe.set_progress_bar_config(disable=True)
    call = {"class_labels": [0, 2], "guidance_scale": 2.0, "num_inference_steps": 2, "prior_num_inference_steps": 2}

    def sampled(pipe=pipe):
        return pipe(**call, output_type="np", generator=torch.Generator().manual_seed(0)).images

    assert np.array_equal(sampled(), np.load(place / "rcg.npy"))
    pipe.save_pretrained(place / "rcg-again")
    again = DiffusionPipeline.from_pretrained(place / "rcg-again", **consent("rcg"))
    assert type(again).__name__ == "RCGPipeline"
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.abs(sampled() - np.load(place / "rcg.npy")).max() < 5e-5
    pipe.remove_all_hooks()
    cpu_offload(pipe.prior, torch.device("cpu"))  # the sequential one, whose "cpu:0" accelerate cannot handle
    assert np.abs(sampled() - np.load(place / "rcg.npy")).max() < 5e-5
    print("rcg is good", flush=True)


def load_tokens(place: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(place / "tokens", **consent("token_generation"))
    assert type(pipe).__module__.startswith("diffusers_modules.local")
    pipe.set_progress_bar_config(disable=True)
    call = {"batch_size": 2, "num_inference_steps": 3, "output_type": "np"}

    def far(pipe=pipe) -> float:
        images = pipe(**call, generator=torch.Generator().manual_seed(0)).images
        return np.abs(images - np.load(place / "tokens.npy")).max()

    assert far() < 5e-5
    pipe.save_pretrained(place / "tokens-again")
    again = DiffusionPipeline.from_pretrained(place / "tokens-again", **consent("token_generation"))
    assert type(again).__name__ == "TokenGenerationPipeline"
    pipe.enable_model_cpu_offload(device="cpu")
    assert far() < 5e-5
    pipe.remove_all_hooks()
    for part in (pipe.transformer, pipe.vqvae):
        cpu_offload(part, torch.device("cpu"))  # the sequential one, whose "cpu:0" accelerate cannot handle
    assert far() < 5e-5
    print("tokens is good", flush=True)


def load_features(*names: str) -> None:
    errors = check_all(list(names))
    if not before("diffusers", "0.38"):  # older loaders run a folder's code without asking
        assert "trust_remote_code=True" in errors.pop("no consent")
    assert errors == dict.fromkeys(names), errors
    print("feature_extraction is good", flush=True)


def load_segmentation() -> None:
    from tests.tasks.planted_masks import QUICK, annotated

    pipe = DiffusionPipeline.from_pretrained(saved("ddpm"), **consent("few_shot_segmentation"))
    pipe.set_progress_bar_config(disable=True)
    settings = {"members": 2, "protocol": QUICK.replace(max_epochs=1)}
    output = pipe(annotated(1)[0], examples=annotated(2), **settings)
    assert output.masks[0].shape == (16, 16)
    print("few_shot_segmentation is good", flush=True)


def load_correspondence() -> None:
    pipe = DiffusionPipeline.from_pretrained(saved("short_sd"), **consent("correspondence"))
    assert type(pipe).__module__.startswith("diffusers_modules.local")
    source = FeatureExtractor(Denoiser.from_pretrained(saved("short_sd")), "up_blocks.1", 261, image_size=32)
    image, points = torch.rand(3, 40, 30, generator=torch.Generator().manual_seed(0)), [[4, 5], [20, 33]]
    want = Correspondence(source)(image, image.flip(2), points, prompt="a cat").scores
    call = {"layer": "up_blocks.1", "timestep": 261, "image_size": 32, "ensemble_size": 1, "prompt": "a cat"}
    assert (pipe(image, image.flip(2), points, **call).scores - want).abs().max() < 1e-4
    with tempfile.TemporaryDirectory() as root:
        pipe.save_pretrained(root)
        again = DiffusionPipeline.from_pretrained(root, **consent("correspondence"))
        assert (again(image, image.flip(2), points, **call).scores - want).abs().max() < 1e-4
    print("correspondence is good", flush=True)


def load_open_vocabulary(place: Path) -> None:
    from tests.heads.odise_cases import save_clip, segmenter_of, tiny_head, tiny_towers

    save_clip(tiny_towers(grow=4), place / "clip")
    towers = ImageTextEncoder.from_pretrained(place / "clip")
    plain = Denoiser.from_pretrained(saved("sd"))
    task = segmenter_of(tiny_head(plain, towers), plain, towers)
    task.save_pretrained(place / "segmenter")
    pipe = DiffusionPipeline.from_pretrained(saved("sd"), **consent("open_vocabulary_segmentation"))
    assert type(pipe).__module__.startswith("diffusers_modules.local")
    image, names = torch.rand(3, 40, 32, generator=torch.Generator().manual_seed(0)), ["a cat", "rain"]
    found, want = pipe(image, names, head=place / "segmenter"), task(image, names)
    assert torch.equal(found.class_maps[0], want.class_maps[0])
    assert found.names == ("a cat", "rain")
    print("open_vocabulary_segmentation is good", flush=True)


def load_classifier() -> None:
    from diffusers_repr.tasks import Averaging, ZeroShotClassifier

    pipe = DiffusionPipeline.from_pretrained(saved("short_sd"), **consent("diffusion_classifier"))
    assert type(pipe).__module__.startswith("diffusers_modules.local")
    classes = {"cat": "a cat", "dog": "a dog"}
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    stock = ZeroShotClassifier.of(
        Denoiser.from_pretrained(saved("short_sd")), classes, rule=Averaging(2), image_size=32
    )
    found = pipe(images, classes, rule=Averaging(2), image_size=32)
    assert torch.equal(found.errors, stock(images).errors)
    print("diffusion_classifier is good", flush=True)


def load_retrieval(place: Path) -> None:
    from tests.pipelines.retrieval_cases import index, vectors

    pipe = DiffusionPipeline.from_pretrained(place / "retrieval", **consent("retrieval_diffusion"))
    assert type(pipe).__module__.startswith("diffusers_modules.local")
    pipe.set_progress_bar_config(disable=True)
    call = {"query": vectors(2, 9), "index": index(), "guidance_scale": 2.0, "num_inference_steps": 3}
    want = np.load(place / "retrieval.npy")

    def far() -> float:
        images = pipe(**call, generator=torch.Generator().manual_seed(0), output_type="np").images
        return np.abs(images - want).max()

    assert far() < 5e-5
    pipe.enable_model_cpu_offload(device="cpu")
    assert far() < 5e-5
    print("retrieval is good", flush=True)


def load_autoencoder(place: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(place / "autoencoder", **consent("diffusion_autoencoder"))
    assert type(pipe).__module__.startswith("diffusers_modules.local")
    pipe.set_progress_bar_config(disable=True)
    codes = torch.load(place / "codes.pt", weights_only=True)
    want = np.load(place / "autoencoder.npy")

    def far() -> float:
        images = pipe.decode(
            codes, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
        )
        return np.abs(images.images - want).max()

    assert far() < 5e-5
    pipe.enable_model_cpu_offload(device="cpu")
    assert far() < 5e-5
    print("autoencoder is good", flush=True)


def load_two() -> None:
    """Two folders in one process: the second is refused, the first stays as it is, and the remedies work."""
    first, guided = consent("feature_extraction"), consent("guided_unconditional")
    pipe = DiffusionPipeline.from_pretrained(saved("ddpm"), **first)
    images = torch.rand(1, 1, 16, 16)
    want = pipe(images, "mid_block", 100).features["mid_block"]
    try:
        DiffusionPipeline.from_pretrained(saved("class_unet"), **guided)
    except ImportError as error:
        told = str(error)
    assert "FeatureExtractionPipeline is loaded there already. Import it" in told, told
    assert torch.equal(pipe(images, "mid_block", 100).features["mid_block"], want)
    again = DiffusionPipeline.from_pretrained(saved("ddpm"), **first)  # the same folder, as often as one likes
    assert torch.equal(again(images, "mid_block", 100).features["mid_block"], want)

    from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline

    imported = GuidedUnconditionalPipeline.from_pretrained(saved("class_unet"))
    assert run(imported, **arguments("class_unet"), guidance=PAG(2.0)) is not None
    print("two is good", flush=True)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    cases = [(load_guided, (folder, *given)) for folder, given in GUIDED.items()]
    cases += [
        (load_sit, (place,)),
        (load_joint, (place,)),
        (load_rcg, (place,)),
        (load_retrieval, (place,)),
        (load_tokens, (place,)),
        (load_autoencoder, (place,)),
        (load_features, FEW),
        (load_segmentation, ()),
    ]
    cases += [(load_correspondence, ()), (load_open_vocabulary, (place,)), (load_classifier, ()), (load_two, ())]
    for function, given in cases:  # forked, so that the imports are paid once
        process = multiprocessing.get_context("fork").Process(target=function, args=given)
        process.start()
        process.join()

"""Pipelines and encoders of others: what their files name is not run, and what they ask for is not built.

Every case would create the file `RAN` (or take minutes, or gigabytes) if the files were believed.
"""

import importlib
import json
import sys
import typing

import pytest
import torch
from diffusers import AutoencoderTiny, DDPMPipeline, DiffusionPipeline

from diffusers_repr.cli import main
from diffusers_repr.denoiser import Denoiser, list_layers_from_config
from diffusers_repr.denoiser.loading import load_autoencoder
from diffusers_repr.encoders import Encoder
from diffusers_repr.hub.components import OWN_COMPONENTS, check_config, check_index
from diffusers_repr.hub.own_pipelines import is_own_pipeline, named_pipeline, pipeline_files
from tests.encoders.vits import build as build_vit
from tests.hostile.cases import changed, copied, weights, written
from tests.tasks.planted import pipeline

INDEX, UNET, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
CODE = "import pathlib\npathlib.Path({ran!r}).touch()\nclass Net:\n    pass\n"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "ddpm"
    pipeline().save_pretrained(folder)
    return folder


# name -> edits, what the message says, and whether the layer table reads the file too
CASES = {
    "a command": ([changed(INDEX, "unet", to=["subprocess", "Popen"])], "'Popen' of the library 'subprocess'", True),
    "a shell": ([changed(INDEX, "scheduler", to=["os", "system"])], "'system' of the library 'os'", True),
    "a module that is imported already": ([changed(INDEX, "unet", to=["tests.hostile.cases", "copied"])],
                                          "of the library 'tests.hostile.cases'", True),
    "a module of ours, another class": ([changed(INDEX, "unet", to=["diffusers_repr.cli", "main"])],
                                        "of the library 'diffusers_repr.cli'", True),
    "a class of ours elsewhere": ([changed(INDEX, "unet", to=["os", "SiTTransformer2DModel"])],
                                  "of the library 'os'", True),
    "a submodule": ([changed(INDEX, "unet", to=["diffusers.utils.import_utils", "os"])], "of the library", True),
    "a path": ([changed(INDEX, "unet", to=["../evil", "Net"])], r"of the library '\.\./evil'", True),
    "no class": ([changed(INDEX, "unet", to=["diffusers", "logging"])], "is no network or scheduler", True),
    "a private name": ([changed(INDEX, "unet", to=["diffusers", "__loader__"])], "of the library 'diffusers'", True),
    "a pipeline in a pipeline": ([changed(INDEX, "unet", to=["diffusers", "DDPMPipeline"])],
                                 "is no network or scheduler", True),
    "a network for a scheduler": ([changed(INDEX, "scheduler", to=["diffusers", "UNet2DModel"])],
                                  "is no network or scheduler", True),
    "another format": ([changed(INDEX, "unet", to=["diffusers", "FlashPackUNet2DModel"])],
                       "is no network or scheduler", True),
    "code beside the network": ([changed(INDEX, "unet", to=["evil", "Net"]), written("unet/evil.py", CODE)],
                                "of the library 'evil'", True),
    "code beside it, called diffusers": ([written("unet/diffusers.py", CODE)],
                                         "unet/diffusers.py' is code for unet, .*trust_remote_code=True", False),
    "code for the pipeline": ([changed(INDEX, "_class_name", to=["evil", "Net"]), written("evil.py", CODE)],
                              "by code that lies beside it", False),
    "code called as the pipeline": ([changed(INDEX, "_class_name", to="Net"), written("Net.py", CODE)],
                                    "_class_name is 'Net'", False),
    "no pipeline": ([changed(INDEX, "_class_name", to="UNet2DModel")], "no pipeline of diffusers", False),
    "a pipeline of further repositories": ([changed(INDEX, "_class_name", to="KandinskyCombinedPipeline")],
                                           "further repositories that its card names", False),
    "no name": ([changed(INDEX, "_class_name", drop=True)], "_class_name is null", False),
    "a list": ([written(INDEX, [])], "holds a JSON list", True),
    "a size": ([changed(UNET, "sample_size", to=10**9)], "sample_size is 1000000000; allowed .* 8192", True),
    "a size that is no number": ([written(UNET, '{"sample_size": NaN}')], "sample_size is nan", True),
    "a depth": ([changed(UNET, "layers_per_block", to=10**9)], "layers_per_block is 1000000000", True),
    "depth on depth": ([changed(UNET, "layers_per_block", to=500), changed(UNET, "block_out_channels", to=[8] * 60)],
                       "30000 layers in its blocks", True),
    "many blocks": ([changed(UNET, "down_block_types", to=["DownBlock2D"] * 10**4)], "a list of 10000", True),
    "a width": ([changed(UNET, "block_out_channels", to=[8, 10**12])], "block_out_channels is 1000000000000", True),
    "text for a width": ([changed(UNET, "block_out_channels", to="8")], "UNet2DModel|Could not load", True),
    "timesteps": ([changed(SCHEDULER, "num_train_timesteps", to=10**9)], "num_train_timesteps is 1000000000", True),
    "betas below 0": ([changed(SCHEDULER, "beta_start", to=-1.0)], "betas must lie between 0 and 1", True),
    "betas far above 1": ([changed(SCHEDULER, "beta_end", to=1e30)], "betas must lie between 0 and 1", True),
    "no timesteps": ([changed(SCHEDULER, "num_train_timesteps", to=0)], "betas must lie|Could not load", True),
    "text for betas": ([changed(SCHEDULER, "beta_start", to="x")], "DDPMScheduler|Could not load", True),
    "weights elsewhere": ([written("unet/diffusion_pytorch_model.safetensors.index.json",
                                   {"weight_map": {"a": "../../x.safetensors"}})],
                          r"weight_map\.a is '\.\./\.\./x\.safetensors'", False),
    "weights behind a link": ([written("unet/diffusion_pytorch_model.safetensors.index.fp16.json",
                                       {"weight_map": {"a": "x.safetensors"}}),
                               lambda folder: (folder / "unet" / "x.safetensors").symlink_to("/etc/passwd")],
                              "is a link that leads out of the folder", False),
    "quantised by objects": ([changed(UNET, "quantization_config", to={"quant_method": "modelopt"})],
                             "quant_method is 'modelopt'", True),
    "a damaged file": ([written(WEIGHTS, b"{}" * 99)], "Could not load", False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_of_others_runs_nothing(case, good, tmp_path, monkeypatch):
    edits, message, by_layers = CASES[case]
    ran = tmp_path / "RAN"
    (tmp_path / "evil.py").write_text(CODE.format(ran=str(ran)))
    monkeypatch.syspath_prepend(tmp_path)  # a module of this name would be found
    folder = copied(good, tmp_path / "model", *edits)
    for file in folder.rglob("*.py"):
        file.write_text(CODE.format(ran=str(ran)))
    before = set(sys.modules)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        Denoiser.from_pretrained(folder)
    if by_layers:
        with pytest.raises(ValueError, match=message):
            list_layers_from_config(folder)
    assert len(str(caught.value)) < 1500
    assert not ran.exists()
    assert not {"evil", "antigravity"} & (set(sys.modules) - before)


def test_the_command_of_the_report(good, tmp_path, capsys):
    ran = tmp_path / "RAN"
    popen = {"args": f"touch {ran}", "shell": True}
    folder = copied(good, tmp_path / "m", changed(INDEX, "unet", to=["subprocess", "Popen"]), written(UNET, popen))
    assert main(["layers", str(folder)]) == 2
    assert "unet is 'Popen' of the library 'subprocess'" in capsys.readouterr().err
    assert not ran.exists()


def test_with_consent_the_loader_of_diffusers_decides(good, tmp_path):
    ran = tmp_path / "RAN"
    code = (
        f"import pathlib\nfrom diffusers import DDPMPipeline\npathlib.Path({str(ran)!r}).touch()\n"
        "class Mine(DDPMPipeline):\n    pass\n"
    )
    folder = copied(good, tmp_path / "m", changed(INDEX, "_class_name", to=["mine", "Mine"]), written("mine.py", code))
    denoiser = Denoiser.from_pretrained(folder, trust_remote_code=True)
    assert ran.exists()
    assert isinstance(denoiser.pipe, DDPMPipeline)
    assert denoiser.pipe.config["_name_or_path"] == str(folder)


@pytest.mark.parametrize("name", ["SiTPipeline", "FeatureExtractionPipeline", "GuidedUnconditionalPipeline"])
def test_pipelines_of_ours_run_no_code_beside_a_component(name, good, tmp_path):
    """Before 0.38 diffusers would run it without asking."""
    ran, code = tmp_path / "RAN", "unet/diffusers.py"
    folder = copied(good, tmp_path / "m", written(code, CODE.format(ran=str(tmp_path / "RAN"))))
    with pytest.raises(ValueError, match=f"{code}' is code for unet, which is not run. .* trust_remote_code=True"):
        named_pipeline(name).from_pretrained(folder)
    assert not ran.exists()


def test_components_of_the_table_are_there():
    for name, module in OWN_COMPONENTS.items():
        assert check_index({"transformer": [module, name]}, "index") == {"transformer": (module, name)}
        __import__(module)
        assert getattr(sys.modules[module], name).__module__ == module
    assert is_own_pipeline("SiTPipeline")


def test_every_model_of_ours_is_in_the_table():
    """What a pipeline of ours saves as a component is found again."""
    taken = set()
    for file in pipeline_files():
        module = importlib.import_module(f"diffusers_repr.pipelines.{file.parent.name}.pipeline")
        pipes = (v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__)
        for pipe in (v for v in pipes if issubclass(v, DiffusionPipeline)):
            for kind in typing.get_type_hints(pipe.__init__).values():
                taken |= {k for k in (kind, *typing.get_args(kind)) if isinstance(k, type)}
    ours = {k.__name__: k.__module__ for k in taken if k.__module__.startswith("diffusers_repr.")}
    assert {"ClassTokenHead", "JointHead", "SiTTransformer2DModel"} <= ours.keys()
    assert ours.items() <= OWN_COMPONENTS.items()


def test_published_sizes_pass():
    """The largest networks there are stay far below the limits."""
    for config in (
        {"sample_size": 128, "patch_size": 2, "num_layers": 38, "num_attention_heads": 38, "attention_head_dim": 64,
         "pos_embed_max_size": 384, "dual_attention_layers": list(range(13))},  # SD 3.5
        {"num_layers": 19, "num_single_layers": 38, "axes_dims_rope": [16, 56, 56], "joint_attention_dim": 4096},
        {"block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10], "layers_per_block": 2,
         "sample_size": 128, "projection_class_embeddings_input_dim": 2816},  # SDXL
        {"vocab_size": 256_000, "hidden_size": 4096, "num_hidden_layers": 24, "max_position_embeddings": 1 << 40,
         "eos_token_id": 1 << 40, "num_key_value_heads": 4},
        {"num_train_timesteps": 1000, "trained_betas": None, "set_alpha_to_one": False, "sigma_max": 80.0},
    ):  # fmt: skip
        assert check_config(config, "config.json") == config


def test_an_autoencoder_of_others(tmp_path):
    tiny = AutoencoderTiny(1, 1, (8,), (8,), latent_channels=1, num_encoder_blocks=(1,), num_decoder_blocks=(1,))
    tiny.save_pretrained(tmp_path / "vae")
    assert type(load_autoencoder(tmp_path, "vae", dtype=torch.bfloat16)).__name__ == "AutoencoderTiny"
    for edit, message in (
        (changed("config.json", "_class_name", to="StableDiffusionPipeline"), "no network or scheduler"),
        (changed("config.json", "_class_name", to=["evil", "Net"]), "_class_name is a list of 2"),
        (changed("config.json", "num_decoder_blocks", to=[10**9]), "num_decoder_blocks is 1000000000"),
        (written("diffusion_pytorch_model.safetensors.index.json", {"weight_map": {"a": "/x.safetensors"}}), "/x"),
    ):
        with pytest.raises(ValueError, match=message):
            load_autoencoder(copied(tmp_path / "vae", tmp_path / message.replace("/", "_"), edit))


# Encoders


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit") / "dinov2"
    build_vit("dinov2").save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return folder


VITS = {
    "code": ([changed("config.json", "auto_map", to={"AutoModel": "evil.Net"}),
              changed("config.json", "model_type", to="evil"), written("evil.py", CODE)], "No encoder family"),
    "a kernel": ([changed("config.json", "attn_implementation", to="evil/kernel")], "code that would be fetched"),
    "a kernel within": ([changed("config.json", "sub", to={"_attn_implementation": "a/b"})],
                        "sub._attn_implementation is 'a/b'"),
    "a kernel of a part": ([changed("config.json", "attn_implementation", to={"": "evil/kernel"})],
                           "code that would be fetched"),
    "kernels": ([changed("config.json", "_attn_implementation", to=["evil/kernel"])],
                "_attn_implementation is a list"),
    "an adapter": ([written("adapter_config.json", {"base_model_name_or_path": "other/base"})], "holds an adapter"),
    "a size": ([changed("config.json", "image_size", to=10**8)], "image_size is 100000000"),
    "no patch": ([changed("config.json", "patch_size", to=0)], "patch_size is 0"),
    "a depth": ([changed("config.json", "num_hidden_layers", to=10**8)], "num_hidden_layers is 100000000"),
    "a mean": ([changed("preprocessor_config.json", "image_mean", to="half")], "image_mean is 'half'"),
    "a std": ([written("preprocessor_config.json", '{"image_std": [NaN]}')], r"image_std\[0\] is nan"),
    "a std of 0": ([changed("preprocessor_config.json", "image_std", to=[0.5, 0.5, 0])], r"image_std\[2\] is 0"),
    "a spread": ([changed("preprocessor_config.json", "image_std", to=1e-300)], "image_std is"),
    "a type": ([changed("config.json", "model_type", to=["dinov2"])], "model_type is a list"),
    "an activation": ([changed("config.json", "hidden_act", to="\x1b[2J")], r"Could not load .*KeyError: '\\x1b"),
    "a width": ([changed("config.json", "hidden_size", to=64)], "Could not load"),
    "a text as number": ([changed("config.json", "layer_norm_eps", to="x")], "layer_norm_eps is 'x'"),
    "a side": ([changed("preprocessor_config.json", "size", to={"height": 10**6, "width": 10**6})],
               "size.height is 1000000"),
    "a list": ([written("preprocessor_config.json", [])], "allowed is an object"),
    "a weight": ([weights(lambda held: {k: v * (float("nan") if "norm" in k else 1) for k, v in held.items()},
                          "model.safetensors")], "weights that are not finite"),
    "weights elsewhere": ([written("model.safetensors.index.json", {"weight_map": {"a": "/etc/x.safetensors"}})],
                          "weight_map.a is '/etc/x.safetensors'"),
}  # fmt: skip


@pytest.mark.parametrize("case", VITS)
def test_an_encoder_of_others_runs_nothing(case, vit, tmp_path):
    edits, message = VITS[case]
    folder = copied(vit, tmp_path / "vit", *edits)
    for file in folder.rglob("*.py"):
        file.write_text(CODE.format(ran=str(tmp_path / "RAN")))
    with pytest.raises((ValueError, TypeError), match=message):
        Encoder.from_pretrained(folder)
    assert not (tmp_path / "RAN").exists()


def test_the_good_encoder_loads(vit):
    assert Encoder.from_pretrained(vit)(torch.rand(1, 3, 28, 28)).tokens.isfinite().all()

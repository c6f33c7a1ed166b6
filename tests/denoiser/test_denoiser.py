"""The Denoiser against hand-written calls of the network, for every family."""

import os
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDPMScheduler, EDMEulerScheduler, FluxPipeline, UNet2DModel
from torch import nn
from torch.testing import assert_close

from diffusers_repr.denoiser import Denoiser, Family, GenericFamily, register_family
from diffusers_repr.denoiser.family_registry import _FAMILIES, list_families
from diffusers_repr.noise import NoiseSchedule
from tests.testers.cases import rotating, some
from tests.testers.models import CONDITIONS, PIPELINES, SIZES, build, saved, unet2d


def start(name, dtype=torch.float32, batch=2):
    """A denoiser, an input, a level and a condition, H != W where the family takes it."""
    denoiser = Denoiser.from_pipe(build(name).to(dtype=dtype))
    h, w = SIZES[name]
    generator = torch.Generator().manual_seed(0)
    shape = (batch, denoiser.family.channels(), h // denoiser.stride, w // denoiser.stride)
    x_t = torch.randn(shape, generator=generator).to(dtype)
    condition = denoiser.condition(**CONDITIONS[name], batch=batch, size=(h, w))
    return denoiser, x_t, condition


def by_hand(name, denoiser, x_t, t, inputs):
    """The network called as its pipeline calls it."""
    model, steps = denoiser.model, torch.full((len(x_t),), float(t))
    if name in ("ddpm", "ddim", "class_unet", "sd", "sdxl"):
        return model(x_t, t, **inputs).sample
    if "flux" in name:
        b, c, h, w = x_t.shape
        inputs = {**inputs, "img_ids": FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", x_t.dtype)}
        packed = FluxPipeline._pack_latents(x_t, b, c, h, w)
        out = model(hidden_states=packed, timestep=steps.to(x_t.dtype) / 1000, **inputs).sample
        return FluxPipeline._unpack_latents(out, h * denoiser.stride, w * denoiser.stride, denoiser.stride)
    if name == "sana":
        return model(x_t, timestep=steps * 0.5, **inputs).sample
    return model(hidden_states=x_t, timestep=steps, **inputs).sample.chunk(2 if name in ("dit", "pixart") else 1, 1)[0]


@pytest.mark.parametrize("name", sorted(PIPELINES))
@torch.no_grad()
def test_predict_equals_the_network_called_by_hand(name):
    denoiser, x_t, condition = start(name)
    t = 261
    got = denoiser.predict(x_t, t, condition)
    want = by_hand(name, denoiser, x_t, t, condition.kwargs())
    assert got.output.shape == x_t.shape
    assert_close(got.output, want, rtol=0, atol=0)
    level = got.level
    assert_close(level.alpha * got.x0 + level.sigma * got.eps, x_t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(PIPELINES))
@torch.no_grad()
def test_one_level_per_sample(name):
    """A batch of levels and conditions equals its rows done one by one."""
    denoiser, x_t, condition = start(name)
    steps = torch.tensor([100.0, 700.5])
    both = denoiser.predict(x_t, steps, condition)
    for row in range(2):
        one = denoiser.predict(x_t[row : row + 1], float(steps[row]), condition.take([row]))
        assert_close(both.output[row : row + 1], one.output, rtol=1e-4, atol=1e-5)
        assert_close(both.x0[row : row + 1], one.x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ddpm", "dit", "sd"])
def test_predict_makes_the_default_condition(name):
    denoiser, x_t, _ = start(name)
    with torch.no_grad():
        size = tuple(side * denoiser.stride for side in x_t.shape[2:])
        want = denoiser.predict(x_t, 10, denoiser.condition(batch=2, size=size))
        assert_close(denoiser.predict(x_t, 10).output, want.output, rtol=0, atol=0)


def test_predict_keeps_gradients_and_train_mode():
    denoiser, x_t, condition = start("sd")
    denoiser.model.train()
    x_t.requires_grad_()
    denoiser.predict(x_t, 10, condition).x0.sum().backward()
    assert x_t.grad is not None
    assert denoiser.model.training


@pytest.mark.parametrize(
    ("name", "dtype"),
    rotating(sorted(PIPELINES), (torch.bfloat16, torch.float16)),
)
@torch.no_grad()
def test_half_precision(name, dtype):
    """The network runs in its own dtype, the prediction is float32 and close to float32's."""
    denoiser, x_t, condition = start(name, dtype)
    assert denoiser.dtype == dtype
    got = denoiser.predict(x_t, 261, condition)
    assert got.x0.dtype == torch.float32
    full, _, condition = start(name)
    want = full.predict(x_t.float(), 261, condition)
    error = (got.output - want.output).norm() / want.output.norm()
    assert error < (0.01 if dtype == torch.float16 else 0.05)


def test_flux_condition_of_another_size():
    denoiser, x_t, condition = start("flux")
    with pytest.raises(ValueError, match="positions of 96 image tokens, the input .* has 64: make it for this size"):
        denoiser.predict(x_t[..., :16, :16], 10, condition)
    del condition.inputs["img_ids"]
    with torch.no_grad():
        assert denoiser.predict(x_t[..., :16, :16], 10, condition).output.shape == (2, 4, 16, 16)


OFFLOAD = [
    (name, kind)
    for name in ("ddim", "dit", "sd", "sdxl", "sd3", "flux_guidance", "sana", "pixart")
    for kind in ("model", "sequential", "block_level", "leaf_level")
    if not (name == "dit" and kind.endswith("level"))  # DiTTransformer2DModel refuses group offloading
]


def offload(pipe, kind):
    if kind == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif kind == "sequential":
        # What `enable_sequential_cpu_offload` does; itself it names the device "cpu:0", which fails inside accelerate.
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                cpu_offload(component, torch.device("cpu"), offload_buffers=bool(component._parameters))
    else:
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type=kind, **blocks)
    return pipe


# Each kind, and each family, once or twice
FAST = [("ddim", "model"), ("dit", "sequential"), ("sdxl", "leaf_level"), ("flux_guidance", "model"),
        ("sd3", "block_level"), ("sana", "leaf_level"), ("pixart", "sequential")]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), some(OFFLOAD, *FAST))
@torch.no_grad()
def test_offload(name, kind):
    """Same numbers under every offload of diffusers, and the pipeline still samples."""
    h, w = SIZES[name]
    images = torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(1))

    def run(denoiser):
        condition = denoiser.condition(**CONDITIONS[name], batch=2, size=(h, w))
        x0 = denoiser.encode(images, image_size="keep")
        return denoiser.predict(denoiser.add_noise(x0, 261, torch.ones_like(x0)), 261, condition).output

    want = run(Denoiser.from_pipe(build(name)))
    pipe = offload(build(name), kind)
    denoiser = Denoiser.from_pipe(pipe)
    assert_close(run(denoiser), want, rtol=0, atol=0)
    call = {k: [v] if k == "class_labels" else v for k, v in CONDITIONS[name].items()}
    call |= {"height": h, "width": w} if "prompt" in call else {}
    call |= {"use_resolution_binning": False} if name in ("pixart", "sana") else {}
    generator = torch.Generator().manual_seed(0)
    got = pipe(num_inference_steps=1, output_type="np", generator=generator, **call).images
    generator = torch.Generator().manual_seed(0)
    assert_close(got, build(name)(num_inference_steps=1, output_type="np", generator=generator, **call).images)
    assert_close(run(denoiser), want, rtol=0, atol=0)


@pytest.mark.parametrize("name", some(sorted(PIPELINES), *(set(PIPELINES) - {"sd", "flux"})))
def test_from_pretrained_folder(name):
    denoiser = Denoiser.from_pretrained(saved(name))
    assert denoiser.name == str(saved(name))
    assert type(denoiser.model) is type(Denoiser.from_pipe(build(name)).model)
    want = build(name)
    model = getattr(want, "unet", None) or want.transformer
    for key, value in denoiser.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


def test_from_pretrained_passes_arguments_on():
    assert Denoiser.from_pretrained(saved("ddpm"), dtype=torch.float16).dtype == torch.float16


def test_from_pretrained_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no pipeline folder: it has no model_index.json .it holds nothing"):
        Denoiser.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"it holds config.json, diffusion_pytorch_model.safetensors"):
        Denoiser.from_pretrained(saved("ddpm") / "unet")
    for missing in (tmp_path / "nothing", str(tmp_path / "nothing"), "./nothing", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="No folder .*nothing|No folder 'a/b/c'"):
            Denoiser.from_pretrained(missing)


@pytest.mark.slow
def test_no_network():
    """A Hub that cannot be reached: one error that says what to check."""
    code = (
        "from diffusers_repr.denoiser import Denoiser\n"
        "try:\n    Denoiser.from_pretrained('nobody/nothing')\n"
        "except OSError as error:\n    print(error)"
    )
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=120
    )
    assert "'nobody/nothing'" in run.stdout
    assert "no connection to the Hub" in run.stdout
    assert "Check the connection" in run.stdout
    assert run.stderr == ""


def test_from_pipe_needs_a_denoiser():
    pipe = build("ddpm")
    pipe.unet = None
    with pytest.raises(TypeError, match="DDPMPipeline has no component named unet or transformer .* it has scheduler"):
        Denoiser.from_pipe(pipe)
    with pytest.raises(TypeError, match="A pipeline is needed; got UNet2DModel. .* Denoiser.model, scheduler, vae"):
        Denoiser.from_pipe(build("ddpm").unet)
    with pytest.raises(TypeError, match="needs a scheduler.* Of a pipeline: Denoiser.from_pipe"):
        Denoiser(build("ddpm"))


class Blob(nn.Module):
    """A network of nobody's: other names, an extra input, tokens inside."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(2, 8, 2, 2)
        self.block = nn.Linear(8, 8)
        self.out = nn.ConvTranspose2d(8, 2, 2, 2)

    def forward(self, x, t, scale=None):
        h = self.embed(x) + t.reshape(-1, 1, 1, 1).float() / 1000
        tokens = self.block(h.flatten(2).transpose(1, 2))
        h = tokens.transpose(1, 2).unflatten(2, h.shape[2:])
        return self.out(h if scale is None else h * scale.reshape(-1, 1, 1, 1))


def test_unknown_class():
    with pytest.raises(TypeError, match=r"No family adapter for Blob. Known: .*UNet2DModel(.|\n)*register_family"):
        Denoiser(Blob(), DDPMScheduler())
    with pytest.raises(TypeError, match="needs a scheduler"):
        Denoiser(unet2d(1))


@torch.no_grad()
def test_generic_family():
    net = Blob()
    family = GenericFamily(
        sample="x", timestep="t", channels=2, grid_fn=lambda tokens, size: (size[0] // 2, size[1] // 2)
    )
    denoiser = Denoiser(net, DDPMScheduler(), family=family)
    x_t = torch.randn(2, 2, 8, 12)
    scale = torch.tensor([1.0, 2.0])
    got = denoiser.predict(x_t, 261, denoiser.condition(embeddings={"scale": scale}))
    assert_close(got.output, net(x_t, torch.tensor([261, 261]), scale), rtol=0, atol=0)
    assert_close(denoiser.predict(x_t, 261).output, net(x_t, torch.tensor([261, 261])), rtol=0, atol=0)
    with pytest.raises(ValueError, match="Blob takes no input 'skale'. It takes: t, scale"):
        denoiser.condition(embeddings={"skale": scale})
    family = GenericFamily(sample="x", timestep="t", channels=2, timestep_fn=lambda level: level.sigma)
    sigma = Denoiser(net, DDPMScheduler(), family=family)
    at = sigma.level(261).sigma
    assert_close(sigma.predict(x_t, 261).output, net(x_t, torch.tensor([at, at])), rtol=0, atol=0)
    with pytest.raises(ValueError, match="takes no class_labels"):
        denoiser.condition(class_labels=1)


def test_a_user_registers_a_family():
    class BlobFamily(Family):
        conditioning = "none"

        def channels(self):
            return 2

        def inputs(self, x_t, level, condition):
            return {"x": x_t, "t": self.timestep(level, x_t), **condition}

    try:
        register_family("Blob")(BlobFamily)
        assert "Blob" in list_families()
        assert isinstance(Denoiser(Blob(), DDPMScheduler()).family, BlobFamily)

        class Child(Blob):
            pass

        assert isinstance(Denoiser(Child(), DDPMScheduler()).family, BlobFamily)  # found by the parent class
        with pytest.raises(ValueError, match="'Blob' is the family adapter .*BlobFamily already"):
            register_family("Blob")(BlobFamily)
    finally:
        _FAMILIES.pop("Blob", None)
    with pytest.raises(ValueError, match="'UNet2DModel' is the family adapter .*already"):
        register_family("UNet2DModel")(BlobFamily)


def test_sizes():
    dit, ddpm, sana, flux = (Denoiser.from_pipe(build(name)) for name in ("dit", "ddpm", "sana", "flux"))
    assert dit.image_size == (32, 32)
    assert (dit.stride, dit.multiple, dit.image_channels) == (2, 4, 3)
    assert (ddpm.stride, ddpm.multiple, ddpm.image_channels) == (1, 4, 1)
    assert (sana.stride, sana.image_size) == (4, (32, 32))
    assert flux.image_size == (256, 256)  # 128 latent pixels
    with pytest.raises(ValueError, match="takes square images only.*got 32 x 48"):
        dit.check_size((32, 48))
    with pytest.raises(ValueError, match=r"takes multiples of 4. Pass image_size=\(16, 20\)"):
        ddpm.check_size((17, 21))
    unknown = Denoiser(UNet2DModel(**{**unet2d(1).config, "sample_size": None}), DDPMScheduler())
    with pytest.raises(ValueError, match="no sample_size; pass image_size"):
        _ = unknown.image_size


def test_class_vectors_of_an_identity_embedding():
    net = unet2d(1, class_embed_type="identity")
    denoiser = Denoiser(net, DDPMScheduler())
    x_t, vectors = torch.randn(2, 1, 16, 16), torch.randn(2, 32)
    with torch.no_grad():
        got = denoiser.predict(x_t, 5, denoiser.condition(embeddings={"class_labels": vectors}))
        assert_close(got.output, net(x_t, 5, class_labels=vectors).sample, rtol=0, atol=0)


@torch.no_grad()
def test_edm_network():
    """EDM: the input is c_in (x_0 + sigma eps), the network is told ln(sigma) / 4."""
    net = unet2d(1)
    denoiser = Denoiser(net, EDMEulerScheduler())
    x0, eps = torch.randn(2, 1, 16, 16), torch.randn(2, 1, 16, 16)
    sigma = 1.7
    level = denoiser.level(denoiser.schedule.resolve(0.25 * torch.log(torch.tensor(sigma)).item()))
    x_t = denoiser.add_noise(x0, level, eps)
    c_in = 1 / (sigma**2 + 0.25) ** 0.5
    assert_close(x_t, c_in * (x0 + sigma * eps))
    raw = net(x_t, 0.25 * torch.log(torch.tensor(sigma))).sample
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 * c_in
    assert_close(denoiser.predict(x_t, level).x0, c_skip * (x0 + sigma * eps) + c_out * raw, rtol=1e-4, atol=1e-4)


def test_a_schedule_by_hand():
    denoiser = Denoiser(unet2d(1), schedule=NoiseSchedule("flow", "velocity"))
    assert denoiser.level(500).sigma == pytest.approx(0.5)

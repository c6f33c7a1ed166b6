"""The further families against their own pipelines and a plain hooked forward."""

import pytest
import torch
from diffusers import AdaptiveProjectedMixGuidance, PerturbedAttentionGuidance

from diffusers_repr.capture import capture
from diffusers_repr.denoiser import Denoiser, list_layers
from diffusers_repr.denoiser.layers import list_layers_from_config
from diffusers_repr.denoiser.vae import encode_moments
from tests.capture.test_capture import full_forward, same
from tests.denoiser.test_condition import assert_same_inputs
from tests.testers.families import network_calls
from tests.testers.family_cases import embeds
from tests.testers.models_text import FAMILIES, family_pipeline
from tests.testers.models_video import VIDEOS

NAMES = list(FAMILIES)


def condition_of(denoiser, name, batch=1):
    call = FAMILIES[name].call
    given = {"prompt": call["prompt"]} if set(call) == {"prompt"} else {"embeddings": call}
    return denoiser.condition(**given, batch=batch, size=FAMILIES[name].size)


def noisy(denoiser, name, batch=1):
    shape = (batch, denoiser.family.channels(), *denoiser.latent_size(FAMILIES[name].size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def flat(inputs):
    """Lists and tuples by their elements; empty dicts as nothing."""
    found = {}
    for key, value in inputs.items():
        if isinstance(value, (list, tuple)):
            found |= {f"{key}.{at}": item for at, item in enumerate(value)}
        else:
            found[key] = None if value == {} and isinstance(value, dict) else value
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_called_as_its_pipeline_calls_it(name):
    """All inputs at the pipeline's first step, the timestep too; and the prediction is what its scheduler is given."""
    case, pipe = FAMILIES[name], family_pipeline(name)
    calls, steps = network_calls(pipe, {**case.call, **case.off}, case.size, steps=2)
    theirs, step = calls[0], steps[0]
    denoiser = Denoiser.from_pipe(family_pipeline(name))
    x_t = denoiser.family.sample(theirs)
    level = denoiser.level(float(step["timestep"]))
    condition = condition_of(denoiser, name)
    with torch.no_grad():
        ours = denoiser.network_inputs(x_t, level, condition.kwargs())
        predicted = denoiser.predict(x_t, level, condition).output
    given = step["model_output"]
    if given.ndim == 3:  # packed
        given = denoiser.family.output(given, x_t)
    assert torch.equal(predicted, given[:, : predicted.shape[1]])
    timestep_name = denoiser.family.timestep_name
    assert torch.equal(ours[timestep_name].double(), theirs[timestep_name].double().expand(1))
    back = denoiser.family.training_timestep(theirs[timestep_name].flatten()[0])
    assert float(back) == pytest.approx(float(step["timestep"]), abs=1e-3)
    assert set(map(type, theirs.values())) >= {torch.Tensor}
    del ours[timestep_name], theirs[timestep_name]
    assert_same_inputs(flat(ours), flat(theirs))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_equal_a_full_forward(name):
    """Every layer of the table, read at once and with early exit, from two samples; the image alone is in it."""
    denoiser = Denoiser.from_pipe(family_pipeline(name))
    layers = {layer.path: layer for layer in list_layers(denoiser, FAMILIES[name].size, "all")}
    x_t, condition = noisy(denoiser, name, 2), condition_of(denoiser, name, 2)
    inputs = denoiser.network_inputs(x_t, denoiser.level(261), condition.kwargs())
    expected = full_forward(denoiser.model, inputs, layers)
    with capture(denoiser.model, list(layers), stop_early=False) as tape:
        denoiser.predict(x_t, 261, condition)
    same(tape.features, expected)
    some = list(layers)[len(layers) // 2]
    with capture(denoiser.model, some) as tape:
        denoiser.predict(x_t, 261, condition)
    same(tape.features, {some: expected[some]})
    for path, layer in layers.items():
        value = expected[path]
        assert value.shape[0] == 2, path
        if layer.kind == "map":
            assert value.shape[1:] == (layer.channels, *layer.grid), path
            continue
        place = denoiser.token_grid(path, value.shape[1], tuple(x_t.shape[2:]))
        assert place is not None, path
        assert place[0] == layer.grid, path
        assert (layer.text_tokens > 0) == (place[1] > 0), path
    blocks = [path for stack in FAMILIES[name].stacks for path in blocks_of(denoiser.model, stack)]
    assert set(blocks) <= set(layers)
    shares = [layer.flops_share for layer in layers.values()]
    assert shares[-1] == pytest.approx(1.0, abs=1e-3)


def blocks_of(model, stack):
    return [f"{stack}.{at}" for at in range(len(model.get_submodule(stack)))]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_is_read_is_the_image(name):
    """A change of one image cell reaches its own token most, and none of what is listed is text alone."""
    denoiser = Denoiser.from_pipe(family_pipeline(name))
    layers = list_layers(denoiser, FAMILIES[name].size, "all")
    x_t, condition = noisy(denoiser, name), condition_of(denoiser, name)
    blocks = [path for stack in FAMILIES[name].stacks for path in blocks_of(denoiser.model, stack)]
    paths, maps = [layer.path for layer in layers], []
    for x in (x_t, x_t.clone()):
        if maps:
            (x[:, :, 1] if x.ndim == 5 else x)[..., 2:4, 2:4] += 0.1
        with capture(denoiser.model, paths, stop_early=False) as tape:
            denoiser.predict(x, 261, condition)
        maps.append({path: tape[path] for path in paths})
    for layer in layers:
        change = (maps[1][layer.path] - maps[0][layer.path]).abs()
        change = denoiser.feature_map(layer.path, change, tuple(x_t.shape[2:])).as_map().sum(1)[0]
        assert change.max() > 0, layer.path
        if layer.path in blocks and name != "kolors":
            side = x_t.shape[-2] // layer.grid[-2]
            *frame, row, column = torch.unravel_index(change.argmax(), change.shape)
            assert (2 <= row * side < 4, 2 <= column * side < 4, frame in ([], [1])) == (True, True, True), layer.path


@pytest.mark.parametrize("name", NAMES)
def test_trains(name):
    """A loss on the prediction has a gradient in every block."""
    denoiser = Denoiser.from_pipe(family_pipeline(name))
    denoiser.predict(noisy(denoiser, name, 2), 261, condition_of(denoiser, name, 2)).output.square().mean().backward()
    for stack in FAMILIES[name].stacks:
        for path in blocks_of(denoiser.model, stack):
            assert any(p.grad is not None and p.grad.any() for p in denoiser.model.get_submodule(path).parameters())


def test_latents_as_the_pipelines_scale_them():
    """FLUX.2 norms 2 x 2 latent pixels together, Qwen-Image each channel; back to pixels again."""
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(4))
    pipe = family_pipeline("flux2")
    draw = torch.Generator().manual_seed(5)
    pipe.vae.bn.running_mean.copy_(torch.randn(16, generator=draw))
    pipe.vae.bn.running_var.copy_(torch.rand(16, generator=draw) + 0.5)
    flux = Denoiser.from_pipe(pipe)
    packed = pipe._encode_vae_image(images * 2 - 1, None)
    assert torch.equal(flux.encode(images, image_size="keep"), pipe._unpatchify_latents(packed))
    qwen = Denoiser.from_pipe(family_pipeline("qwen_image"))
    mean, std = (torch.tensor(qwen.vae.config[key]).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
    with torch.no_grad():
        raw = qwen.vae.encode((images * 2 - 1).unsqueeze(2)).latent_dist.mode().squeeze(2)
    assert torch.equal(qwen.encode(images, image_size="keep"), (raw - mean) / std)
    for denoiser in (flux, qwen):
        x0 = denoiser.encode(images, image_size="keep")
        assert x0.shape == (2, 4, 16, 24)
        assert denoiser.decode(x0).shape == images.shape
        moments = encode_moments(denoiser.vae, images * 2 - 1)
        assert moments.shape == (2, 8, 16, 24)


@pytest.mark.parametrize("name", ["aura_flow", "chroma", "hunyuan_dit", "lumina2", *VIDEOS])
def test_the_null_condition_is_what_the_pipeline_guides_with(name):
    """The negative prompt's rows in a guided call: the first half of one call, or the second call."""
    case = FAMILIES[name]
    calls, _ = network_calls(family_pipeline(name), {**case.call, **case.guided, **case.null}, case.size, steps=2)
    calls = calls[: len(calls) // 2]  # of the first step
    null = Denoiser.from_pipe(family_pipeline(name)).condition("x", size=case.size, **case.null).null.kwargs()
    theirs = {key: value for key, value in calls[-1].items() if key not in ("hidden_states", "timestep")}
    if len(calls) == 1:
        theirs = {k: v.chunk(2)[0] if isinstance(v, torch.Tensor) else v for k, v in theirs.items()}
    assert_same_inputs(flat(null), flat(theirs))


@torch.no_grad()
def test_captions_of_z_image_in_a_batch():
    """Captions of unequal lengths, each read as alone."""
    denoiser = Denoiser.from_pipe(family_pipeline("z_image"))
    captions = [embeds(9, 24), embeds(40, 24, seed=2)]
    x_t = noisy(denoiser, "z_image", 2)
    both = denoiser.predict(x_t, 261, denoiser.condition(embeddings={"prompt_embeds": captions}, size=(32, 48)))
    for at, caption in enumerate(captions):
        alone = denoiser.condition(embeddings={"cap_feats": [caption]})
        torch.testing.assert_close(denoiser.predict(x_t[at : at + 1], 261, alone).output[0], both.output[at])


def test_what_is_refused():
    lumina, qwen, dit = (
        Denoiser.from_pipe(family_pipeline(name)) for name in ("lumina2", "qwen_image", "hunyuan_dit")
    )
    captions = lumina.condition(["a cat", "a photo of a cat"], size=(64, 96))
    with pytest.raises(ValueError, match=r"captions have \[\d+, \d+\] tokens: the image would stand at another place"):
        lumina.predict(noisy(lumina, "lumina2", 2), 261, captions)
    for denoiser, name in ((qwen, "qwen_image"), (dit, "hunyuan_dit")):
        x_t = noisy(denoiser, name)[..., :8]
        with pytest.raises(ValueError, match="make it for this size"):
            denoiser.predict(x_t, 261, condition_of(denoiser, name))
    image, flux = (Denoiser.from_pipe(family_pipeline(name)) for name in ("hunyuan_image", "flux2"))
    inputs = {"hidden_states": torch.zeros(1, 4, 8, 8)}
    image.pipe.guider = PerturbedAttentionGuidance(perturbed_guidance_layers=[0])
    with pytest.raises(ValueError, match=r"PerturbedAttentionGuidance\) asks for pred_cond, pred_cond_skip, pred_unc"):
        image.family.lanes(image.pipe, inputs)
    image.pipe.guider = AdaptiveProjectedMixGuidance(guidance_rescale=0.5)
    with pytest.raises(ValueError, match=r"guidance_rescale=0\.5.*replaces the guider's"):
        image.family.lanes(image.pipe, inputs)
    with pytest.raises(ValueError, match="keeps keys and values of reference images"):
        flux.family.lanes(flux.pipe, {**inputs, "kv_cache_mode": "cached"})


def test_a_guider_stays_as_it_was():
    pipe = family_pipeline("hunyuan_image")
    before = {key: str(value) for key, value in vars(pipe.guider).items()}
    Denoiser.from_pipe(pipe).condition(embeddings=FAMILIES["hunyuan_image"].call, size=(32, 48))
    assert {key: str(value) for key, value in vars(pipe.guider).items()} == before


@pytest.mark.parametrize("name", NAMES)
def test_defaults(name):
    """Every method finds layers of its own in the network."""
    denoiser = Denoiser.from_pipe(family_pipeline(name))
    for method in ("pag", "readout", *(["repa"] if name != "kolors" else [])):
        found = denoiser.default_layers(method)
        assert found.layers, method
        for path in found.layers:
            denoiser.model.get_submodule(path)


@pytest.mark.parametrize("name", ["hunyuan_image", "qwen_image", "z_image", *VIDEOS])
def test_layers_from_configs_alone(name, tmp_path):
    pipe, size = family_pipeline(name), FAMILIES[name].size
    pipe.save_pretrained(tmp_path)
    assert list_layers_from_config(tmp_path, size) == list_layers(Denoiser.from_pipe(pipe), size)

"""Conditions against what the real pipeline passes to its own network."""

import inspect

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

from diffusers_repr.denoiser import Denoiser, GenericFamily
from diffusers_repr.denoiser.family import PatchTransformerFamily
from tests.testers.models import CONDITIONS, PIPELINES, SIZES, autoencoder, build, t5_encoder
from tests.testers.tokenizers import t5_tokenizer

TEXT = [name for name in PIPELINES if "prompt" in CONDITIONS[name]]


class Stop(Exception):
    pass


def pipeline_call(pipe, at=1, **call):
    """Arguments of a denoiser call of a real run (the first), by name."""
    model = getattr(pipe, "unet", None) or pipe.transformer
    calls = []

    def hook(module, args, kwargs):
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        calls.append({**dict(zip(names, args, strict=False)), **kwargs})
        if len(calls) == at:
            raise Stop

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    accepted = inspect.signature(type(pipe).__call__).parameters
    call = {k: v for k, v in call.items() if k in accepted}
    with pytest.raises(Stop):
        pipe(num_inference_steps=3, generator=torch.Generator().manual_seed(5), **call)
    handle.remove()
    return calls[-1]


def guidance_off(name, prompt=None):
    height, width = SIZES[name]
    call = {**CONDITIONS[name], "height": height, "width": width, "use_resolution_binning": False}
    if prompt is not None:
        call["prompt"] = prompt
    if name == "dit":
        call["class_labels"] = [call["class_labels"]]
    if "flux" not in name:  # Flux: the scale is an input of the network
        call["guidance_scale"] = 1.0
    return call


def assert_same_inputs(ours, theirs):
    """Equal values by name; None where the other has none."""
    for key in {**ours, **theirs}:
        if isinstance(theirs.get(key), dict):
            assert_same_inputs(ours[key], theirs[key])
        elif isinstance(theirs.get(key), torch.Tensor):
            assert_close(ours[key], theirs[key].to(ours[key].dtype), rtol=0, atol=0, msg=lambda m, k=key: f"{k}: {m}")
        else:
            assert ours.get(key) == theirs.get(key), key


@pytest.mark.parametrize("name", sorted(set(PIPELINES) - {"class_unet"}))
def test_equals_what_the_pipeline_passes(name):
    """Every input of the network, the timestep too, with H != W where the pipeline takes it."""
    theirs = pipeline_call(build(name), **guidance_off(name))
    theirs.pop("return_dict", None)
    denoiser = Denoiser.from_pipe(build(name))
    size = SIZES[name] if "prompt" in CONDITIONS[name] else denoiser.image_size
    condition = denoiser.condition(**CONDITIONS[name], size=size)
    x_t = torch.randn(1, denoiser.family.channels(), *(side // denoiser.stride for side in size))
    model_timestep = theirs["timestep"].flatten()[0].item()
    step = model_timestep * 1000 if "flux" in name else model_timestep / denoiser.config.get("timestep_scale", 1.0)
    ours = denoiser.network_inputs(x_t, denoiser.level(step), condition.kwargs())
    sample = list(inspect.signature(type(denoiser.model).forward).parameters)[1]
    assert ours.pop(sample).shape == theirs.pop(sample).shape
    assert_close(ours.pop("timestep").float(), theirs.pop("timestep").float().expand(1), rtol=0, atol=0)
    assert_same_inputs(ours, theirs)


@pytest.mark.parametrize("name", ["sd", "pixart", "sd3", "flux_guidance", "sana"])
def test_half_precision_equals_what_the_pipeline_passes(name):
    """In bfloat16 too, dtypes included; the timestep as the pipeline rounds it."""
    theirs = pipeline_call(build(name).to(dtype=torch.bfloat16), **guidance_off(name))
    denoiser = Denoiser.from_pipe(build(name).to(dtype=torch.bfloat16))
    ours = denoiser.condition(**CONDITIONS[name], size=SIZES[name]).kwargs()
    for key, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == theirs[key].dtype
            assert torch.equal(value, theirs[key])
    if name == "flux_guidance":
        step = 733.25
        x_t = torch.zeros(1, 4, 16, 24, dtype=torch.bfloat16)
        model_timestep = denoiser.network_inputs(x_t, denoiser.level(step), ours)["timestep"]
        assert torch.equal(model_timestep, torch.tensor(step).expand(1).to(torch.bfloat16) / 1000)


@pytest.mark.parametrize("name", TEXT)
def test_null_equals_the_pipelines_own_null(name):
    """The negative prompt's condition is the half that the pipeline's CFG passes for it."""
    negative = "blurry, ugly"
    call = {**guidance_off(name), "negative_prompt": negative}
    if "flux" in name:  # two calls: condition first, null second
        call["true_cfg_scale"] = 3.0
        halves = pipeline_call(build(name), at=2, **call)
    else:
        call["guidance_scale"] = 3.0
        halves = {k: _first_half(v) for k, v in pipeline_call(build(name), **call).items()}
    for other in ("sample", "hidden_states", "timestep", "return_dict"):
        halves.pop(other, None)
    null = Denoiser.from_pipe(build(name)).condition("a cat", negative_prompt=negative, size=SIZES[name]).null
    assert_same_inputs(null.kwargs(), halves)


class AuraFamily(PatchTransformerFamily):
    """As one writes it in the first try: AuraFlow guides by 3.5 unless told otherwise."""

    conditioning = "text"


class UnguidedAuraFamily(AuraFamily):
    pipeline_arguments = {"guidance_scale": 1.0}


@pytest.fixture(scope="module")
def aura():
    tokenizer = t5_tokenizer()
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    vae = autoencoder((8, 8), latent_channels=4, sample_size=16)
    pipe = AuraFlowPipeline(tokenizer, t5_encoder(tokenizer), vae, transformer, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.text_encoder, pipe.transformer):
        part.eval()
    return pipe


@pytest.mark.parametrize("given", [{"prompt": "a cat"}, {"embeddings": {"prompt": ["a cat", "a dog"]}}])
@pytest.mark.parametrize("family", [AuraFamily(), GenericFamily("hidden_states", channels=4)])
def test_a_pipeline_that_guides_by_itself_is_refused(aura, given, family):
    """Its first rows are those of the negative prompt."""
    if "prompt" in given and family.conditioning == "none":
        given = {"embeddings": given}
    rows = r"4 rows for 2 prompts" if "dog" in str(given) else r"2 rows for 1 prompt"
    message = (
        rf"AuraFlowPipeline gives .* {rows}:.*guidance_scale=3\.5; set `pipeline_arguments = .'guidance_scale': 1\.0"
    )
    with pytest.raises(ValueError, match=message):
        Denoiser.from_pipe(aura, family=family).condition(**given)


def test_a_family_that_switches_guidance_off_has_the_pipelines_own_condition(aura):
    theirs = pipeline_call(aura, prompt="a cat", height=16, width=16)["encoder_hidden_states"]
    assert theirs.shape[0] == 2
    plain = Denoiser.from_pipe(aura, family=UnguidedAuraFamily())
    made = plain.condition("a cat", negative_prompt="", size=(16, 16), batch=2)
    ours, null = (rows.kwargs()["encoder_hidden_states"] for rows in (made, made.null))
    assert torch.equal(ours[0], ours[1])
    assert not torch.equal(ours, null)
    halves = torch.cat([null[:1], ours[:1]])
    assert torch.equal(theirs, halves) or torch.equal(theirs, halves.flip(0))
    by_name = Denoiser.from_pipe(aura, family=GenericFamily("hidden_states", channels=4))
    by_name = by_name.condition(embeddings={"prompt": "a cat", "guidance_scale": 1.0}, size=(16, 16)).kwargs()
    assert torch.equal(by_name["encoder_hidden_states"], ours[:1])


def _first_half(value):
    if isinstance(value, dict):
        return {k: _first_half(v) for k, v in value.items()}
    return value.chunk(2)[0] if isinstance(value, torch.Tensor) and value.ndim else value


def test_the_oracle_sees_the_negative_prompt():
    """Two negative prompts differ, so the test above is no tautology."""
    denoiser = Denoiser.from_pipe(build("sana"))
    a, b = (denoiser.condition("x", negative_prompt=text).null.kwargs() for text in ("blurry", "a cat"))
    assert not torch.equal(a["encoder_hidden_states"], b["encoder_hidden_states"])
    prompt = denoiser.condition("blurry").kwargs()
    assert not torch.equal(a["encoder_hidden_states"], prompt["encoder_hidden_states"])  # the instruction


@pytest.mark.parametrize("name", TEXT)
def test_prompts_per_image_in_order_each_encoded_once(name):
    pipe = build(name)
    calls = []
    pipe.text_encoder.register_forward_pre_hook(lambda module, args: calls.append(1))
    denoiser = Denoiser.from_pipe(pipe)
    prompts = ["a cat", "a dog", "a cat", "a bird"]
    cache = {}
    many = denoiser.condition(prompts, batch=4, cache=cache)
    needed = 1 if denoiser.family.prompts_together else 3
    assert len(calls) == needed
    assert len(many) == 4
    assert many.rows == 3
    again = denoiser.condition(["a bird", "a cat"], cache=cache)
    assert len(calls) == needed
    assert len(again) == 2
    for at, prompt in enumerate(prompts):
        assert_same_inputs(many.take([at]), denoiser.condition(prompt, cache=cache).kwargs())
    assert_same_inputs(many.take([3, 0]), again.kwargs())


def test_prompts_are_kept_by_the_denoiser_on_request():
    pipe, calls = build("sd"), []
    pipe.text_encoder.register_forward_pre_hook(lambda module, args: calls.append(1))
    denoiser = Denoiser.from_pipe(pipe)
    denoiser.prompts = {}
    for _ in range(3):
        denoiser.condition("a cat", negative_prompt="a cat", batch=2)
    assert len(calls) == 1


def test_one_prompt_serves_a_batch():
    denoiser = Denoiser.from_pipe(build("sdxl"))
    condition = denoiser.condition("a cat", batch=3)
    assert condition.rows == 1
    inputs = condition.kwargs()
    assert inputs["encoder_hidden_states"].shape[0] == 3
    assert inputs["added_cond_kwargs"]["time_ids"].shape == (3, 6)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart", "sana"])
@torch.no_grad()
def test_embeddings_by_the_pipelines_names(name):
    """Those of the pipeline's own `encode_prompt` give what the prompt gives."""
    pipe = build(name)
    denoiser = Denoiser.from_pipe(pipe)
    want = denoiser.condition("a cat", size=SIZES[name]).kwargs()
    if name in ("pixart", "sana"):
        extra = {"complex_human_instruction": _instruction(pipe)} if name == "sana" else {}
        embeds, mask, *_ = pipe.encode_prompt("a cat", do_classifier_free_guidance=False, device="cpu", **extra)
        given = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
        given["negative_prompt"] = None if name == "pixart" else ""
    elif name == "sd":
        given = {"prompt_embeds": pipe.encode_prompt("a cat", "cpu", 1, False)[0]}
    elif name == "sdxl":
        embeds, _, pooled, _ = pipe.encode_prompt("a cat", do_classifier_free_guidance=False)
        given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    elif name == "sd3":
        embeds, _, pooled, _ = pipe.encode_prompt("a cat", None, None, do_classifier_free_guidance=False)
        given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    else:
        embeds, pooled, _ = pipe.encode_prompt("a cat", None)
        given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    assert_same_inputs(denoiser.condition(embeddings=given, size=SIZES[name]).kwargs(), want)
    # and by the network's names, for a batch
    tensors = {k: v for k, v in want.items() if v is not None}
    assert_same_inputs(denoiser.condition(embeddings=tensors, batch=1).kwargs(), tensors)


def _instruction(pipe):
    return inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default


def test_embeddings_errors():
    denoiser = Denoiser.from_pipe(build("sd"))
    rows = torch.zeros(2, 7, 16)
    with pytest.raises(ValueError, match="2 rows of embeddings for 3 images"):
        denoiser.condition(embeddings={"encoder_hidden_states": rows}, batch=3)
    with pytest.raises(ValueError, match="takes no argument 'prompt_embedding'"):
        denoiser.condition(embeddings={"prompt_embedding": rows})
    with pytest.raises(ValueError, match="not both"):
        denoiser.condition("a cat", embeddings={"encoder_hidden_states": rows})
    bare = Denoiser(denoiser.model, denoiser.scheduler)
    with pytest.raises(ValueError, match="takes no input 'prompt_embeds'. It takes: .*encoder_hidden_states"):
        bare.condition(embeddings={"prompt_embeds": rows})
    with pytest.raises(ValueError, match="has no text encoder"):
        bare.condition("a cat")


def test_wrong_inputs_for_the_family():
    sd, ddpm, dit = (Denoiser.from_pipe(build(name)) for name in ("sd", "ddpm", "dit"))
    with pytest.raises(ValueError, match="takes a prompt, not class_labels"):
        sd.condition(class_labels=1)
    with pytest.raises(ValueError, match="takes no prompt; class-conditional models take class_labels"):
        dit.condition("a cat")
    with pytest.raises(ValueError, match="unconditional"):
        ddpm.condition(class_labels=[1])
    with pytest.raises(ValueError, match="2 prompts for 3 images"):
        sd.condition(["a", "b"], batch=3)
    with pytest.raises(ValueError, match="0 prompts"):
        sd.condition([], batch=3)
    with pytest.raises(TypeError, match=r"prompt must be a string.*got 5 \(int\)"):
        sd.condition([5])
    with pytest.raises(TypeError, match="one string for all images; got 2"):
        sd.condition("a", negative_prompt=["b", "c"])


@pytest.mark.parametrize(
    ("labels", "rows"),
    [(3, [3, 3]), ([3, 7], [3, 7]), (torch.tensor([1, 0]), [1, 0]), ((2,), [2, 2]), (None, [1000, 1000])],
)
def test_class_labels_of_dit(labels, rows):
    condition = Denoiser.from_pipe(build("dit")).condition(class_labels=labels, batch=2)
    assert condition.kwargs()["class_labels"].tolist() == rows
    assert condition.kwargs()["class_labels"].dtype == torch.int64


def test_class_label_errors():
    dit, unet = (Denoiser.from_pipe(build(name)) for name in ("dit", "class_unet"))
    assert dit.condition(class_labels=1000).kwargs()["class_labels"].tolist() == [1000]
    with pytest.raises(ValueError, match=r"0\.\.1000 \(1000 is the null class\); got \[1001\]"):
        dit.condition(class_labels=1001)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.9; got \[10\]"):
        unet.condition(class_labels=10)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.9; got \[-1\]"):
        unet.condition(class_labels=-1)
    with pytest.warns(UserWarning, match="does not tell which class is the null one; .* the last id, 9"):
        assert unet.condition().kwargs()["class_labels"].tolist() == [9]
    with pytest.raises(ValueError, match="2 class_labels for 3 images"):
        dit.condition(class_labels=[1, 2], batch=3)
    for wrong in (1.5, [True], "tench", [[1], [2, 3]]):
        with pytest.raises(TypeError, match="class_labels are whole numbers"):
            dit.condition(class_labels=wrong)
    with pytest.raises(ValueError, match="class_labels is empty"):
        dit.condition(class_labels=[])


def test_guidance_of_a_distilled_model_comes_from_its_pipeline():
    flux = Denoiser.from_pipe(build("flux_guidance"))
    assert flux.condition("a cat").kwargs()["guidance"].tolist() == [3.5]  # the default of FluxPipeline's call
    asked = flux.condition(embeddings={"prompt": "a cat", "guidance_scale": 1.0})
    assert asked.kwargs()["guidance"].tolist() == [1.0]
    assert Denoiser.from_pipe(build("flux")).condition("a cat").kwargs().get("guidance") is None


def snapshot(pipe):
    """What a user can see of a pipeline."""
    modules = {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}
    return {
        "attributes": {k: v for k, v in vars(pipe).items() if k not in ("_internal_dict", "scheduler")},
        "config": dict(pipe.config),
        "scheduler": {k: str(v) for k, v in vars(pipe.scheduler).items()},
        "scheduler config": dict(pipe.scheduler.config),
        "training": {(k, n): m.training for k, v in modules.items() for n, m in v.named_modules()},
        "hooks": {
            k: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in v.modules()] for k, v in modules.items()
        },
        "grad": {(k, n): p.requires_grad for k, v in modules.items() for n, p in v.named_parameters()},
        "padding": {k: getattr(v, "padding_side", None) for k, v in pipe.components.items()},
        "rng": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_the_pipeline_stays_as_it_was(name):
    pipe = build(name)
    model = getattr(pipe, "unet", None) or pipe.transformer
    # What stock pipelines rewrite, or what a user may have set.
    pipe.scheduler.register_to_config(steps_offset=0, clip_sample=True)
    pipe.set_progress_bar_config(desc="mine", disable=True)
    model.train()
    pipe.vae.train() if hasattr(pipe, "vae") else None
    if name == "sana":
        pipe.tokenizer.padding_side = "left"
    model.register_forward_pre_hook(lambda *_: pytest.fail("a hook of the user saw a call that never happened"))
    denoiser = Denoiser.from_pipe(pipe)
    with torch.no_grad():  # transformers puts its own recording hooks on an encoder at its first use
        for key, encoder in pipe.components.items():
            if key.startswith("text_encoder"):
                encoder(torch.zeros(1, 77, dtype=torch.long), output_hidden_states=True)
    before = snapshot(pipe)
    denoiser.condition(**CONDITIONS[name], size=SIZES[name])
    assert snapshot(pipe) == before
    if "prompt" in CONDITIONS[name]:
        with pytest.raises(ValueError, match="Images are 33 x 32"):
            denoiser.condition("a cat", size=(33, 32))
        assert snapshot(pipe) == before
        encoder = next(v for k, v in pipe.components.items() if k.startswith("text_encoder"))
        handle = encoder.register_forward_pre_hook(lambda *_: 1 / 0)
        before = snapshot(pipe)
        with pytest.raises(ZeroDivisionError):
            denoiser.condition("a dog")
        assert snapshot(pipe) == before
        handle.remove()


def test_dropout_of_a_text_encoder_in_train_mode_does_not_reach_the_condition():
    pipe = build("pixart")
    want = Denoiser.from_pipe(pipe).condition("a cat").kwargs()
    pipe.text_encoder.train()
    assert_same_inputs(Denoiser.from_pipe(pipe).condition("a cat").kwargs(), want)
    assert pipe.text_encoder.training


def test_a_pipeline_that_never_calls_its_network():
    pipe = build("sd")

    class Lazy(type(pipe)):
        def __call__(self, prompt=None, **kwargs):
            return prompt

    pipe.__class__ = Lazy
    with pytest.raises(RuntimeError, match="Lazy returned without calling its UNet2DConditionModel"):
        Denoiser.from_pipe(pipe).condition("a cat")
    assert not pipe.unet._forward_pre_hooks


def test_compiled_networks_are_stopped_too():
    """In place (`module.compile()`) and wrapped (`torch.compile(module)`)."""
    want = Denoiser.from_pipe(build("sd")).condition("a cat").kwargs()
    pipe = build("sd")
    pipe.unet.compile(backend="eager")
    compiled = pipe.unet._compiled_call_impl
    assert_same_inputs(Denoiser.from_pipe(pipe).condition("a cat").kwargs(), want)
    assert pipe.unet._compiled_call_impl is compiled
    pipe = build("sd")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    denoiser = Denoiser.from_pipe(pipe)
    assert_same_inputs(denoiser.condition("a cat").kwargs(), want)
    assert denoiser.config["sample_size"] == 16

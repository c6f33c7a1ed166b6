"""A guided pipeline beside others that share its network, in many threads; whose calls a guidance acts in."""

import copy
import threading
from contextlib import ExitStack

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

from diffusers_repr import CFG, PAG, SAG, Denoiser, EnergyGuidance, FeatureExtractor, guide
from diffusers_repr.guidance.activations import steer
from tests.capture.models import hook_count
from tests.guidance.test_engine import run
from tests.testers.guidance import noise
from tests.testers.models import build
from tests.testers.threads import at_once, equal, in_thread

ROUNDS = 2


def sharing(pipe):
    """Another pipeline with the same networks; its scheduler is its own, and a tokenizer, which takes one thread."""
    own = {"scheduler": DDIMScheduler.from_config(pipe.scheduler.config)}
    if "tokenizer" in pipe.components:
        own["tokenizer"] = copy.deepcopy(pipe.tokenizer)
    other = type(pipe)(**{**pipe.components, **own})
    other.set_progress_bar_config(disable=True)
    return other


def energy():
    return EnergyGuidance(lambda features, x0, condition: x0.square().mean((1, 2, 3)), scale=10.0, checkpoint=True)


def repeated(name, *arguments):
    return lambda: [run(name, *arguments) for _ in range(ROUNDS if name == "ddim" else 1)]


@pytest.mark.parametrize(
    ("name", "own"),
    [("ddim", [PAG(2.0), SAG(0.5)]), ("sd", [PAG(2.0), CFG(4.0, interval=(0, 600)), energy()])],
    ids=["ddim", "sd"],
)
def test_a_plain_pipeline_and_a_reader_beside_a_guided_one(name, own):
    """`guide` is called here; the guided pipeline runs in a thread, as in a server."""
    pipe = build(name)
    plain, scale = sharing(pipe), None if name == "ddim" else 3.0
    denoiser = Denoiser.from_pipe(plain)
    extractor = FeatureExtractor(denoiser, ["mid_block", "up_blocks.0"], 261, image_size="keep")
    images = [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))] * (1 if name == "sd" else 2)
    if name == "ddim":
        images = [image[:, :16, :16] for image in images]

    def read():
        return [extractor(images).features for _ in range(ROUNDS)]

    unguided, features = repeated(name, plain, scale)(), read()
    with guide(pipe, own) as handle:
        guided = repeated(name, pipe, scale)()
        lanes = handle.stats.lanes
        found = at_once(repeated(name, pipe, scale), repeated(name, plain, scale), read)
        assert handle.stats.lanes == lanes
        calls = handle.stats.calls
        assert equal(in_thread(lambda: run(name, plain, scale)), unguided[0])
        assert handle.stats.calls == calls
    assert equal(found, [guided, unguided, features])
    assert not equal(guided, unguided)
    assert hook_count(pipe.unet) == 0


def test_a_scheduler_shared_with_a_plain_pipeline_is_not_changed():
    pipe = build("ddim")
    plain = type(pipe)(**pipe.components)
    plain.set_progress_bar_config(disable=True)
    expected = run("ddim", plain)
    with guide(pipe, [CFG(1.0), EnergyGuidance(energy().fn, scale=0.1, update="latent_sign")]):
        run("ddim", pipe)
        assert torch.equal(in_thread(lambda: run("ddim", plain)), expected)


def test_in_the_thread_of_guide_all_calls_are_guided():
    """Also after the block was entered in another thread than `guide` was called in."""
    pipe = build("short_sd")
    other = StableDiffusionImg2ImgPipeline(
        **{**pipe.components, "scheduler": DDIMScheduler.from_config(pipe.scheduler.config)},
        requires_safety_checker=False,
    )
    other.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def sample():
        generator = torch.Generator().manual_seed(0)
        call = {"image": image, "num_inference_steps": 4, "generator": generator, "output_type": "latent"}
        return other("a cat", **call).images

    plain = sample()
    with guide(pipe, PAG(3.0)):
        guided = sample()
        assert torch.equal(in_thread(sample), plain)
    assert not torch.equal(guided, plain)
    handle = guide(pipe, PAG(3.0))

    def enter():
        with handle:
            return sample()

    assert torch.equal(in_thread(enter), guided)


def test_a_loop_belongs_to_its_thread():
    pipe = build("ddim")
    x = noise(1, 3, 16, 16)

    def step():
        with torch.no_grad():
            return pipe.unet(x, 300).sample

    plain = step()
    with guide(Denoiser.from_pipe(pipe), PAG(2.0)):
        guided = step()
        assert equal(at_once(*[lambda: [step() for _ in range(4)]] * 2), [[plain] * 4] * 2)
        assert torch.equal(step(), guided)
    with pytest.raises(RuntimeError, match="Nothing was guided"), guide(Denoiser.from_pipe(pipe), PAG(2.0)):
        in_thread(step)


def held(pipe):
    """A run in a thread that waits after its first step, and what lets it go on."""
    inside, leave, result = threading.Event(), threading.Event(), []

    def wait(pipeline, step, timestep, tensors):
        inside.set()
        leave.wait()
        return tensors

    thread = threading.Thread(target=lambda: result.append(run("sd", pipe, 3.0, callback_on_step_end=wait)))
    thread.start()
    inside.wait()

    def finish():
        leave.set()
        thread.join()
        return result[0]

    return finish


def test_a_second_thread_on_a_guided_pipeline_raises_at_once():
    pipe = build("short_sd")
    handle = guide(pipe, PAG(2.0))
    expected = run("sd", pipe, 3.0)
    finish = held(pipe)
    for second in (lambda: run("sd", pipe, 3.0), lambda: in_thread(lambda: run("sd", pipe, 3.0))):
        with pytest.raises(RuntimeError, match=r"guided StableDiffusionPipeline is running in another thread.*copy"):
            second()
    with pytest.raises(RuntimeError, match="its guidance cannot end meanwhile"):
        handle.remove()
    with pytest.raises(ValueError, match="is guided already.*Two threads that guide at once need a network each"):
        guide(pipe, PAG(1.0))
    assert torch.equal(finish(), expected)
    for _ in range(3):  # threads whose numbers may be those of threads that have ended
        assert torch.equal(in_thread(lambda: run("sd", pipe, 3.0)), expected)
    handle.remove()
    assert hook_count(pipe.unet) == 0


def test_an_error_in_the_block_does_not_end_the_guidance_under_a_run():
    pipe = build("short_sd")
    with guide(pipe, PAG(2.0)):
        expected = run("sd", pipe, 3.0)
    handle, runs = guide(pipe, PAG(2.0)), []
    with pytest.raises(IndexError) as caught, handle:
        runs.append(held(pipe)) or runs[1]
    finish = runs[0]
    assert "stays guided" in caught.value.__notes__[0]
    assert torch.equal(finish(), expected)
    handle.remove()
    assert hook_count(pipe.unet) == 0


# Hooks look at the frames of their callers; Dynamo leaves that out of its graph and says so.
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin .sys._getframe")
def test_a_thread_that_compiles_the_network_is_not_guided():
    pipe = build("ddim")
    x = noise(1, 3, 16, 16)
    with torch.no_grad():
        plain = pipe.unet(x, 300).sample
        with guide(pipe, PAG(2.0)):
            run("ddim", pipe)
            compiled = torch.compile(pipe.unet, backend="eager")
            assert torch.equal(in_thread(torch.no_grad()(lambda: compiled(x, 300).sample)), plain)


def test_a_run_that_was_broken_off_in_a_thread_does_not_stay():
    pipe = build("short_sd")

    def stop(*args):
        raise KeyboardInterrupt

    with guide(pipe, PAG(2.0)):
        expected = run("sd", pipe, 3.0)
        hook = pipe.unet.up_blocks[-1].register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            in_thread(lambda: run("sd", pipe, 3.0))
        hook.remove()
        assert torch.equal(run("sd", pipe, 3.0), expected)


def test_of_threads_that_guide_one_network_one_wins():
    pipe = build("ddim")
    won = []

    def attempt():
        try:
            won.append(guide(pipe, PAG(2.0)))
        except ValueError as error:
            return str(error)

    told = at_once(*[attempt] * 4)
    assert len(won) == 1
    assert sum("is guided already" in (message or "") for message in told) == 3
    won[0].remove()
    assert hook_count(pipe.unet) == 0


def test_steering_belongs_to_its_thread():
    """Two threads that steer to other classes, and one that does not."""
    unet, x = build("ddpm").unet, noise(1, 1, 16, 16)
    weight = torch.randn(10, unet.config.block_out_channels[-1], generator=torch.Generator().manual_seed(0))

    def classify(hidden, skips, timestep):
        return hidden.mean((2, 3)) @ weight.T + sum(skip.square().mean() for skip in skips)

    def work(label):
        def call():
            with torch.no_grad(), ExitStack() as stack:
                if label is not None:
                    stack.enter_context(steer(unet, classify, torch.tensor([label]), 5.0))
                return [unet(x, 300).sample for _ in range(ROUNDS)]

        return call

    works = [work(1), work(7), work(None)]
    expected = [call() for call in works]
    assert not equal(expected[0], expected[2])
    assert equal(at_once(*works), expected)

"""What a hook does belongs to the thread that set it: many threads on one model give what one gives, bit by bit."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from diffusers_repr.capture import PersistentCapture, bottleneck, capture, capture_attention, encode_partial
from diffusers_repr.capture.forwards import replace_forward
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.condition import eval_mode
from tests.capture.models import hook_count, inputs_of
from tests.capture.test_traces import offload
from tests.testers.models import build
from tests.testers.threads import at_once, equal, in_thread

ROUNDS = 6


def repeated(work):
    return lambda: [work() for _ in range(ROUNDS)]


def unet():
    pipe = build("ddpm")
    return pipe.unet, [torch.randn(1 + i, 1, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def test_readers_of_every_kind_beside_a_plain_forward():
    """Early and late layers, whole and broken-off forwards, attention, halves of the U-Net, gradients of an input."""
    model, x = unet()

    def read(i, layers, **settings):
        with torch.no_grad(), capture(model, layers, **settings) as tape:
            model(x[i], 100 * i)
        return tape.features

    def attention():
        with torch.no_grad(), capture_attention(model, "mid_block.attentions.0") as tape:
            model(x[1], 100)
        return tape.features

    def halves():
        with torch.no_grad(), bottleneck(model, lambda hidden, skips: (hidden * 2, skips)):
            moved = model(x[2], 200).sample
        with torch.no_grad():
            return moved, encode_partial(model, x[2], 200).hidden

    def gradient():
        leaf = x[0].clone().requires_grad_()
        with capture(model, ["mid_block", "up_blocks.0"]) as tape:
            model(leaf, 300)
        return torch.autograd.grad(tape["up_blocks.0"].square().sum(), leaf)[0]

    def plain():
        with torch.no_grad():
            return model(x[3], 300).sample

    works = [
        lambda: read(0, ["mid_block"]),
        lambda: read(1, ["up_blocks.1", "mid_block"], stop_early=False),
        lambda: read(2, ["down_blocks.0"], where="input", transform=lambda value, path: value.mean((2, 3))),
        attention,
        halves,
        gradient,
        plain,
        plain,
    ]
    expected = [work() for work in works]
    for found, wanted in zip(at_once(*map(repeated, works)), expected, strict=True):
        assert all(equal(one, wanted) for one in found)
    assert hook_count(model) == 0


def test_hooks_set_and_removed_while_forwards_break_off():
    """After an `Exception` torch goes through a module's hooks one by one, and fails if one is set meanwhile."""
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), nn.Linear(2, 2))
    for _ in range(1000):
        model[0].register_forward_hook(lambda module, args, output: None)
    inputs = [torch.full((1, 2), float(i)) for i in range(4)]
    layers = ["0.0", "0", "0.1", "0"]  # some are left inside of what others set their hooks on
    with torch.no_grad():
        expected = [model[0][0](inputs[0]), *(model[0](x) for x in inputs[1:])]

    def work(x, layer):
        with torch.no_grad():
            for _ in range(700):
                with capture(model, [layer]) as tape:
                    model(x)
                yield tape[layer]

    works = [lambda x=x, layer=layer: list(work(x, layer)) for x, layer in zip(inputs, layers, strict=True)]
    for found, wanted in zip(at_once(*works), expected, strict=True):
        assert all(equal(one, wanted) for one in found)
    assert hook_count(model) == 1000


def test_calls_of_another_thread_are_not_read():
    model, x = nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2)
    with pytest.raises(ValueError, match="the model was not called inside"), capture(model, ["0"]):
        in_thread(lambda: model(x))
    with capture(model, ["0"], stop_early=False) as tape:
        model(x)
        in_thread(lambda: model(2 * x))
        in_thread(lambda: torch.compile(model, backend="eager")(3 * x))
    assert torch.equal(tape["0"], model(x))


def test_another_forward_is_that_of_its_threads_calls():
    model, x = nn.Linear(2, 2), torch.ones(1, 2)
    own = model.forward
    model.forward = lambda value: own(value) + 1  # someone's before
    before = model.__dict__["forward"]
    plain = model(x)

    def work(factor):
        def call():
            undo = replace_forward(model, lambda inner, args, kwargs: factor * inner(*args, **kwargs))
            found = model(x)
            undo()
            return [found, model(x)]

        return lambda: [call() for _ in range(100)]

    def stays():
        return [model(x) for _ in range(200)]

    found = at_once(work(2), work(3), stays)
    assert equal(found, [[[2 * plain, plain]] * 100, [[3 * plain, plain]] * 100, [plain] * 200])
    assert model.__dict__["forward"] is before


def test_the_mode_comes_back_with_the_last_block():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)).train()
    model[1].eval()
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with eval_mode(model):
            inside.set()
            leave.wait()
            return model[0].training, model.training

    with ThreadPoolExecutor(1) as pool:
        with eval_mode(model):
            other = pool.submit(hold)
            inside.wait()
            with eval_mode(model):
                pass
        assert not model[0].training  # the other thread still reads
        leave.set()
        assert other.result() == (False, False)
    assert [module.training for module in model.modules()] == [True, True, False]


def test_a_block_in_a_block_brings_back_what_it_found():
    model = nn.Linear(2, 2)
    with eval_mode(model):
        model.train()
        with eval_mode(model):
            assert not model.training
        assert model.training
    assert model.training


def test_a_tap_belongs_to_the_thread_that_records():
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    reads, x = PersistentCapture(model, ["0"]), torch.ones(1, 2)
    with reads.recording() as seen:
        in_thread(lambda: model(x))  # neither kept nor a second call
        kept = model(x)
        with pytest.raises(RuntimeError, match="Another thread is recording this Sequential"):
            in_thread(reads.recording().__enter__)
    assert torch.equal(torch.tanh(seen["0"]), kept)


@pytest.mark.parametrize("kind", ["sequential", "leaf_level"])
def test_a_second_reader_of_an_offloaded_network_raises_at_once(kind):
    pipe = build("ddpm")
    inputs = inputs_of(Denoiser.from_pipe(pipe), "ddpm")
    offload(pipe, kind)
    model, layers = pipe.unet, ["mid_block"]

    def read():
        with torch.no_grad(), capture(model, layers) as tape:
            model(**inputs)
        return tape["mid_block"]

    expected = read()
    with torch.no_grad(), capture(model, layers) as tape:
        with pytest.raises(RuntimeError, match=r"reading this UNet2DModel, whose weights are offloaded"):
            in_thread(read)
        model(**inputs)
    assert torch.equal(tape["mid_block"], expected)
    assert torch.equal(read(), expected)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_that_is_read_record_nothing(how):
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    reads, x = PersistentCapture(model, ["0"]), torch.ones(1, 2)
    with reads.recording() as seen, capture(model, "1") as tape:
        twin = how(model)
        assert torch.equal(twin(x), twin[1](twin[0](x)))
        assert not tape.features
        model(x)
    assert torch.equal(tape["1"], torch.tanh(seen["0"]))
    assert torch.equal(twin(x), model(x))

"""What diffusers' own suites ask of every pipeline, in short: a subclass of `PipelineContract` for each of ours."""

import inspect

import numpy as np
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from tests.testers.hosts import in_dtype


class ClassCutoff(PipelineCallback):
    """As diffusers' cutoff callbacks of text pipelines: no guidance after a share of the steps."""

    tensor_inputs = ["class_labels"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
            pipeline._guidance_scale = 0.0
        return callback_kwargs


class Keep(PipelineCallback):
    """Keeps tensors after each step."""

    tensor_inputs: list[str] = []

    def __init__(self, names):
        super().__init__()
        self.tensor_inputs, self.steps = list(names), []

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        self.steps.append({name: callback_kwargs[name].clone() for name in self.tensor_inputs})
        return callback_kwargs


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


def network(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


def modules(pipe):
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


class PipelineContract:
    """The checks; a subclass tells how to make and call its pipeline.

    Attributes:
        pair: Arguments for two samples, guided.
        one: Of the second of them alone.
        repeated: Of each of them twice, side by side.
        off: What switches guidance off.
        cut: Arguments of the run in which a callback does; `pair` if None.
        many: Name of the argument for several images a label or prompt; None if there is none.
        state: Names of the tensors that a step changes.
        cutoff: Class of a callback that switches guidance off; None for a call without callbacks.
        output_types: What it can return.
    """

    pair: dict
    one: dict
    repeated: dict
    off: dict = {"guidance_scale": 1.0}
    cut: dict | None = None
    many: str | None = "num_images_per_label"
    state = ("latents",)
    cutoff: type | None = ClassCutoff
    output_types = ("pil", "np", "pt", "latent")

    def make(self):
        """A fresh pipeline on which nothing depends; its sampler is deterministic."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def pipe(cls):
        pipe = cls().make()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @pytest.fixture(scope="class")
    @classmethod
    def want(cls, pipe):
        return cls().sample(pipe)

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, pipe, tmp_path_factory):
        folder = tmp_path_factory.mktemp("pipeline")
        pipe.save_pretrained(folder)
        return folder

    def sample(self, pipe, call=None, **settings):
        settings = {"num_inference_steps": 2, "output_type": "np", "generator": seeds(3)[0], **settings}
        return pipe(**{**(self.pair if call is None else call), **settings}).images

    def load(self, pipe, folder, **settings):
        again = type(pipe).from_pretrained(folder, **settings)
        again.set_progress_bar_config(disable=True)
        return again

    def test_a_seed_decides_and_the_batch_does_not(self, pipe, want):
        assert np.array_equal(self.sample(pipe), want)
        both = self.sample(pipe, generator=seeds(1, 2))
        alone = self.sample(pipe, self.one, generator=seeds(2))
        assert both.shape == want.shape
        assert np.abs(both[1:] - alone).max() < 2e-4
        assert np.abs(both[0] - both[1]).max() > 1e-3

    def test_outputs(self, pipe, want):
        assert want.dtype == np.float32
        assert 0 <= want.min() <= want.max() <= 1
        for kind in self.output_types:
            got = self.sample(pipe, output_type=kind)
            if kind == "pil":
                assert (
                    np.abs(np.stack([np.asarray(image) for image in got]).reshape(want.shape) / 255 - want).max()
                    < 1 / 255
                )
            elif kind == "pt":  # stock pipelines of diffusers 0.36 give arrays
                got = got if isinstance(got, np.ndarray) else got.permute(0, 2, 3, 1).float().numpy()
                assert np.allclose(got, want, atol=1e-6)
            elif kind == "latent":
                assert len(got) == 2
                assert got.is_floating_point()
        (images,) = pipe(
            **self.pair, num_inference_steps=2, output_type="np", generator=seeds(3)[0], return_dict=False
        )[:1]
        assert np.array_equal(images, want)

    def test_callbacks_of_diffusers(self, pipe):
        """The last step by `num_timesteps`, several callbacks, guidance switched off amid a run."""
        if self.cutoff is None:
            assert "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters
            return
        settings, call, steps = {"num_inference_steps": 4, "output_type": "latent"}, self.cut or self.pair, []

        def clear_at_the_end(pipe, step, timestep, tensors):
            steps.append(step)
            assert list(tensors) == ["latents"]
            if step == pipe.num_timesteps - 1:
                return {"latents": torch.zeros_like(tensors["latents"])}
            return tensors

        last = self.sample(pipe, call, **settings, callback_on_step_end=clear_at_the_end)
        assert steps == list(range(pipe.num_timesteps))
        assert not last.any()

        keep = Keep(self.state)
        both = MultiPipelineCallbacks([self.cutoff(cutoff_step_ratio=0.25), keep])
        got = self.sample(pipe, call, **settings, callback_on_step_end=both)
        after = int(pipe.num_timesteps * 0.25)
        assert pipe.guidance_scale == 0
        # From there on it is a run without guidance.
        plain = self.sample(
            pipe,
            {**call, **self.off},
            **settings,
            callback_on_step_end=lambda p, step, t, tensors: keep.steps[after] if step == after else {},
        )
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)
        guided = self.sample(pipe, call, **settings)
        assert float((guided - got).abs().max()) > 1e-5
        assert pipe.guidance_scale > 0

    def test_every_tensor_can_be_asked_for(self, pipe):
        if self.cutoff is None:
            return
        names, seen = type(pipe)._callback_tensor_inputs, []

        def look(pipe, step, timestep, tensors):
            seen.append(sorted(tensors))
            pipe._interrupt = True
            return tensors

        self.sample(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=list(names))
        assert seen == [sorted(names)]
        assert pipe.interrupt
        with pytest.raises(ValueError, match="noise"):
            self.sample(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["noise"])

    def test_several_images_a_label(self, pipe):
        if self.many is None:
            return
        got = self.sample(pipe, **{self.many: 2})
        assert len(got) == 4
        assert np.allclose(got, self.sample(pipe, self.repeated), atol=1e-5)

    def test_saved_and_loaded(self, pipe, want, folder):
        again = self.load(pipe, folder)
        assert set(again.components) == set(pipe.components)
        for name, part in modules(pipe).items():
            for key, tensor in part.state_dict().items():
                assert torch.equal(modules(again)[name].state_dict()[key], tensor), (name, key)
        assert type(again.scheduler) is type(pipe.scheduler)
        # Weights read from a file lie at other addresses, by which the CPU's kernels round differently.
        assert np.abs(self.sample(again) - want).max() < 1e-4
        again.enable_model_cpu_offload(device="cpu")
        assert np.abs(self.sample(again) - want).max() < 1e-4
        assert hasattr(network(again), "_hf_hook")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_by_from_pretrained(self, pipe, want, folder, dtype):
        half = self.load(pipe, folder, **in_dtype(dtype))
        assert half.dtype == network(half).dtype == dtype
        images = self.sample(half)
        assert images.dtype == np.float32
        assert np.isfinite(images).all()
        # The noise is drawn in the network's dtype by some: only the range is comparable.
        assert 0.1 < images.mean() / want.mean() < 10

    def test_variants(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path, variant="fp16")
        place = next(name for name, part in modules(pipe).items() if part is network(pipe))
        assert list((tmp_path / place).glob("*.fp16.safetensors"))
        again = self.load(pipe, tmp_path, variant="fp16")
        for key, tensor in network(pipe).state_dict().items():
            assert torch.equal(network(again).state_dict()[key], tensor)

    def test_from_pipe_and_components(self, pipe, want):
        for other in (type(pipe).from_pipe(pipe), type(pipe)(**pipe.components)):
            other.set_progress_bar_config(disable=True)
            assert all(other.components[name] is part for name, part in pipe.components.items())
        assert np.array_equal(self.sample(other), want)

    def test_progress_bar(self, pipe, capfd):
        pipe.set_progress_bar_config(disable=False, desc="sampling")
        try:
            self.sample(pipe, num_inference_steps=1)
        finally:
            pipe.set_progress_bar_config(disable=True)
        assert "sampling: 100%" in capfd.readouterr().err

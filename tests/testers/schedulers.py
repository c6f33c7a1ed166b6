"""What diffusers' own suites ask of every scheduler, in short: a subclass of `SchedulerContract` for each of ours."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers import DPMSolverMultistepScheduler as DPMSolver
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

SHIFTS = [
    ({}, None),
    ({"shift": 3.0}, None),
    ({"use_dynamic_shifting": True}, 1.1),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 2.2),
]


def ratio(sigmas):
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
    return sigmas / (1 - sigmas)


class SchedulerContract:
    """The checks; a subclass tells the class, a config in which nothing is a default, and an unlike one of ours.

    Attributes:
        cls: The scheduler, of the linear path by default.
        settings: A config with no default in it.
        other: Another scheduler of ours.
        fewest: Steps that it needs.
    """

    cls: type
    settings: dict
    other: type
    fewest = 1

    def run(self, scheduler, steps=None, dtype=torch.float32, **options):
        """A loop over a network that is no constant; the last state."""
        if steps is not None:
            scheduler.set_timesteps(steps, **options)
        x = torch.linspace(-1, 1, 12, dtype=dtype).reshape(1, 3, 2, 2)
        seed = torch.Generator().manual_seed(0)
        for t in scheduler.timesteps:
            x = scheduler.step(x * t / (t + 1) + 0.1, t, scheduler.scale_model_input(x, t), generator=seed).prev_sample
        return x

    def test_configs_and_files(self, tmp_path):
        scheduler = self.cls(**self.settings)
        scheduler.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "scheduler_config.json").read_text())
        assert written["_class_name"] == self.cls.__name__
        assert self.settings.items() <= written.items()
        want = self.run(scheduler, 5)
        for again in (
            self.cls.from_pretrained(tmp_path),
            self.cls.from_config(scheduler.config),
            self.cls.from_config(json.loads(scheduler.to_json_string())),
        ):
            assert {key: again.config[key] for key in self.settings} == self.settings
            assert len(again) == len(scheduler)
            assert torch.equal(self.run(again, 5), want)
        changed = self.cls.from_config(scheduler.config, shift=5.0)
        assert (changed.config.shift, changed.shift) == (5.0, 5.0)

    def test_compatibles_and_swaps(self):
        """As pipelines swap samplers: there and back with every setting, and never to another process."""
        mine, euler = self.cls(**self.settings), FlowMatchEulerDiscreteScheduler
        names = [cls.__name__ for cls in mine.compatibles]
        assert names == [self.cls.__name__, euler.__name__, "FlowMatchHeunDiscreteScheduler"]
        for cls in (*mine.compatibles, self.other):
            there = cls.from_config(mine.config)
            assert there.config.shift == self.settings["shift"]
            back = self.cls.from_config(there.config)
            assert {key: back.config[key] for key in self.settings} == self.settings
        theirs = euler(shift=3.0, base_shift=0.4, max_image_seq_len=1024)
        again = euler.from_config(self.cls.from_config(theirs.config).config)
        assert {k: v for k, v in again.config.items() if k[0] != "_" and k in theirs.config} == {
            k: v for k, v in theirs.config.items() if k[0] != "_"
        }
        solver = DPMSolver(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0)
        assert self.cls.from_config(solver.config).shift == 1.0

    def test_configs_of_other_processes_are_refused(self, tmp_path):
        for other in (
            DDPMScheduler(),
            DDIMScheduler(prediction_type="v_prediction"),
            EDMEulerScheduler(),
            DPMSolver(use_flow_sigmas=True, prediction_type="epsilon"),
        ):
            with pytest.raises(ValueError, match="of another noise process. Take a scheduler of that process"):
                self.cls.from_config(other.config)
        DDPMScheduler().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="of another noise process"):
            self.cls.from_pretrained(tmp_path)
        for lost, told in (
            ({"shift_terminal": 0.1}, "has no shift_terminal=0.1 .*Pass shift_terminal=None"),
            ({"use_karras_sigmas": True}, "has no use_karras_sigmas=True"),
            ({"invert_sigmas": True}, "has no invert_sigmas=True"),
            ({"stochastic_sampling": True}, "has no stochastic_sampling=True"),
        ):
            config = FlowMatchEulerDiscreteScheduler(**lost).config
            with pytest.raises(ValueError, match=told):
                self.cls.from_config(config)
            self.cls.from_config(config, **{name: None for name in lost})
        solver = DPMSolver(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
        with pytest.raises(ValueError, match=r"Pass flow_shift=1.0, or shift=3.0 to from_config"):
            self.cls.from_config(solver.config)
        assert self.cls.from_config(solver.config, shift=3.0).shift == 3.0
        # and back: a scheduler of another process that was made from ours cannot step
        wrong = DDPMScheduler.from_config(self.cls().config)
        wrong.set_timesteps(2)
        with pytest.raises(ValueError, match="flow_prediction"):
            wrong.step(torch.ones(1, 1), wrong.timesteps[0], torch.ones(1, 1))

    @pytest.mark.parametrize(("settings", "mu"), SHIFTS)
    def test_the_shift_is_that_of_diffusers(self, settings, mu):
        ours, theirs = self.cls(**settings), FlowMatchEulerDiscreteScheduler(**settings)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps)
        torch.testing.assert_close(ours.sigmas[:-1], theirs.sigmas)
        grid = np.linspace(1, 1 / 7, 7)
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(sigmas=grid, mu=mu)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=0)
        times, count = retrieve_timesteps(ours, 7, "cpu", sigmas=grid, mu=mu)
        assert count == 7
        assert torch.equal(times, ours.timesteps)
        # What is given as timesteps is where the network is called.
        ours.set_timesteps(timesteps=[900.0, 300.0], mu=mu)
        assert sorted(set(ours.timesteps.tolist())) == [300.0, 900.0]

    def test_the_shift_on_a_curved_path(self):
        """It multiplies sigma / alpha, whatever the path; a mu without dynamic shifting is not looked at."""
        grid = np.array([0.9, 0.5, 0.2])
        shifted = self.cls(path="cosine", shift=3.0)
        shifted.set_timesteps(sigmas=grid, mu=9.0)
        t = shifted.timesteps.double().unique().flip(0) * torch.pi / 2000
        want = 3 * torch.as_tensor(grid / np.sqrt(1 - grid**2))
        torch.testing.assert_close(t.tan(), want, rtol=1e-5, atol=0)

    def test_a_shift_may_be_set(self):
        scheduler, made = self.cls(), self.cls(shift=4.0)
        scheduler.set_shift(4.0)
        made.set_timesteps(5)
        scheduler.set_timesteps(5)
        assert torch.equal(scheduler.timesteps, made.timesteps)
        assert scheduler.shift == 4.0
        for wrong in (0.0, -1.0, float("nan"), float("inf")):
            for call in (scheduler.set_shift, lambda shift: self.cls(shift=shift)):
                with pytest.raises(ValueError, match="shift is a finite number above 0"):
                    call(wrong)
        with pytest.raises(ValueError, match="time_shift_type is one of exponential, linear; got 'log'"):
            self.cls(time_shift_type="log")
        dynamic = self.cls(use_dynamic_shifting=True)
        for mu in (None, float("nan"), 1e4, -1e4):
            with pytest.raises(ValueError, match="needs mu, a number from -700 to 700; got"):
                dynamic.set_timesteps(5, mu=mu)
        with pytest.raises(ValueError, match="leaves no distance between two steps"):
            dynamic.set_timesteps(5, mu=60.0)
        with pytest.raises(ValueError, match="above 0, to 700; got -1"):
            self.cls(use_dynamic_shifting=True, time_shift_type="linear").set_timesteps(5, mu=-1.0)

    def test_loops_of_every_length(self):
        for steps in (self.fewest, 3, 10):
            scheduler = self.cls()
            end = self.run(scheduler, steps)
            assert end.shape == (1, 3, 2, 2)
            assert end.isfinite().all()
            assert scheduler.step_index == len(scheduler.timesteps)
            assert len(scheduler.sigmas) == len(scheduler.timesteps) + 1
            assert float(scheduler.sigmas[-1]) == 0
            assert torch.equal(end, self.run(scheduler, steps))  # nothing of the first run is left

    def test_steps(self):
        scheduler = self.cls()
        scheduler.set_timesteps(4)
        x = torch.ones(2, 3, 4, 4)
        first = scheduler.step(x, scheduler.timesteps[0], x, generator=torch.Generator().manual_seed(0))
        again = self.cls()
        again.set_timesteps(4)
        (other,) = again.step(x, again.timesteps[0], x, torch.Generator().manual_seed(0), return_dict=False)
        assert torch.equal(first.prev_sample, other)
        assert first["prev_sample"].shape == x.shape
        noisy = scheduler.add_noise(x, torch.zeros_like(x), torch.tensor([250.0, 750.0]))
        assert noisy.shape == x.shape
        assert noisy[:, 0, 0, 0].tolist() == pytest.approx([0.75, 0.25])
        assert scheduler.scale_noise(x, torch.tensor([250.0, 750.0]), x).shape == x.shape
        # The process is the network's: the sampler's shift moves the grid alone.
        moved = self.cls(shift=3.0).add_noise(x, torch.zeros_like(x), torch.tensor([250.0, 750.0]))
        assert torch.equal(moved, noisy)

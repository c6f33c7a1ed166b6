"""Zero-shot classifiers: against the Bayes classifier of a known mixture, on tiny real models, saved, and misused."""

import dataclasses
import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.estimates import check_estimates
from diffusers_repr.denoiser.hooks import count_hooks
from diffusers_repr.features import ddae_levels
from diffusers_repr.noise import NoiseSchedule
from diffusers_repr.tasks import AdaptiveSchedule, Averaging, Racing, WinogroundOutput, ZeroShotClassifier, winoground
from diffusers_repr.tasks.denoising_errors.classes import ZeroShotClasses
from diffusers_repr.tasks.denoising_errors.conditions import encode_conditions
from diffusers_repr.tasks.denoising_errors.network import NetworkErrors
from diffusers_repr.tasks.denoising_errors.pairs import Asked, ask
from diffusers_repr.tasks.denoising_errors.scores import bound_weight, noise_error
from diffusers_repr.testing import check_task
from tests.pipelines import sit_cases
from tests.tasks.gaussian_classes import WIDTH, denoiser, draw, means, photos
from tests.testers.models import build

FORMS = ("epsilon", "v_prediction", "sample", "flow")
WORDS = {"cat": "a photo of a cat", "dog": ["a dog", "the dog"], "cow": "a cow"}


def network(base, x0, batch_size=64, **settings):
    conditions = encode_conditions(base, class_labels=list(range(base.family.classes()[0])))
    return NetworkErrors(base, x0, [str(at) for at in range(len(x0))], conditions, batch_size=batch_size, **settings)


def pictures(count=3, side=32, channels=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(channels, side, side + 8 * at, generator=generator) for at in range(count)]


# A mixture of normal distributions, whose Bayes classifier takes the nearest mean


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_bayes_classifier_of_a_mixture(form):
    """And errors are of eps in every form of prediction: those of the closed form."""
    base, (x0, labels) = denoiser(form), draw(16, width=0.8)
    bayes = (x0[:, None] - means()[None]).square().flatten(2).sum(-1).argmin(1)
    assert 0 < int((bayes != labels).sum()) < 9  # hard enough to tell the Bayes classifier from the labels
    find = network(base, x0)
    for rule in (Averaging(40), Racing(error=0.01, n_levels=2, max_rounds=30)):
        levels = rule.levels(base.schedule)
        units = ZeroShotClassifier.of(base, None, rule=rule)._units()
        found = rule(find, units, len(x0), levels)
        sure = torch.ones(16, dtype=torch.bool) if found.decided is None else found.decided
        assert int(sure.sum()) >= 10
        assert float((found.labels == bayes)[sure].double().mean()) >= (0.85 if found.decided is None else 1.0)
    asked = Asked(*(torch.tensor([value]) for value in (2, 1)), torch.tensor([250.0]).double(), torch.tensor([0]))
    level, noise = base.level(250), find.noise.draw(["2|250.0"], [0], x0.shape[1:]).double()
    a, s = level.alpha, level.sigma
    x_t = a * x0[2] + s * noise[0]
    eps = s * (x_t - a * means()[1]) / (a**2 * WIDTH**2 + s**2)
    assert float(find(asked)) == pytest.approx(float((eps - noise[0]).square().mean()), rel=1e-5)


@pytest.mark.parametrize("timestep", [10.0, 300.0, 800.0])
def test_mean_and_variance_of_errors_are_those_of_the_formula(timestep):
    """Expected error (1 - k s)^2 D + k^2 a^2 |x0 - mu|^2; paired variance 4 (1 - k s)^2 k^2 a^2 |mu_1 - mu_2|^2."""
    base, draws = denoiser(), 2500
    x0 = draw(1)[0]
    asked = [Asked(torch.zeros(draws).long(), torch.full((draws,), prompt), torch.full((draws,), timestep).double(),
                   torch.arange(draws)) for prompt in (0, 1)]  # fmt: skip
    find = network(base, x0, batch_size=1000)
    first, second = (16 * find(one) for one in asked)
    level = base.level(timestep)
    a, s = level.alpha, level.sigma
    k = s / (a**2 * WIDTH**2 + s**2)
    for errors, centre in ((first, means()[0]), (second, means()[1])):
        distance = float((x0[0] - centre).square().sum())
        assert float(errors.mean()) == pytest.approx((1 - k * s) ** 2 * 16 + k**2 * a**2 * distance, rel=0.05)
    paired = 4 * (1 - k * s) ** 2 * k**2 * a**2 * float((means()[0] - means()[1]).square().sum())
    assert float((first - second).var()) == pytest.approx(paired, rel=0.12)


def test_a_model_blind_to_its_condition():
    """All errors are equal: the first class wins, no race is decided, and nothing is certain."""
    base, (x0, _) = denoiser(centres=means()[:1].expand(4, -1, -1, -1)), draw(6)
    units = ZeroShotClassifier.of(base)._units()
    for rule in (Averaging(3), AdaptiveSchedule((2, 6), (2, 1)), Racing(max_rounds=5)):
        found = rule(network(base, x0, 7), units, 6, rule.levels(base.schedule))
        assert found.labels.tolist() == [0] * 6
        assert found.confidence.tolist() == [0.0] * 6
        assert found.decided is None or not bool(found.decided.any())


def test_order_and_number_of_classes_change_no_error():
    base, images = denoiser(), photos(draw(5)[0])
    rule, order = Averaging(4), [2, 0, 3, 1]
    plain = ZeroShotClassifier.of(base, rule=rule)(images)
    turned = ZeroShotClassifier.of(base, order, rule=rule)(images)
    torch.testing.assert_close(turned.errors, plain.errors[:, order], rtol=1e-6, atol=0)
    assert turned.labels == plain.labels == [str(at) for at in plain.ids.tolist()]
    few = ZeroShotClassifier.of(base, {"one": 1, "three": 3}, rule=rule)(images)
    torch.testing.assert_close(few.errors, plain.errors[:, [1, 3]], rtol=1e-6, atol=0)
    assert set(few.labels) <= {"one", "three"}


# Numbers


def test_losses_and_the_bounds_weight():
    eps, noise = torch.tensor([[3.0, 0.5]]), torch.zeros(1, 2)
    wanted = {"l2": 9.25 / 2, "vlb": 9.25 / 2, "l1": 1.75, "huber": (2.5 + 0.125) / 2}
    assert {kind: float(noise_error(eps, noise, kind)) for kind in wanted} == pytest.approx(wanted)
    scheduler = DDPMScheduler()
    schedule = NoiseSchedule.from_scheduler(scheduler)
    betas, bars = scheduler.betas.double(), scheduler.alphas_cumprod.double()
    for t in (1, 40, 700):  # Ho et al. 2020, eq. 12, with the posterior's variance
        posterior = betas[t] * (1 - bars[t - 1]) / (1 - bars[t])
        weight = betas[t] ** 2 / (2 * posterior * (1 - betas[t]) * (1 - bars[t]))
        found = float(bound_weight(schedule.resolve(t), schedule))
        assert found == pytest.approx(1000 * float(weight) / math.log(2), rel=2e-3)
    flow = NoiseSchedule("flow", "velocity")
    low, high = (flow.resolve(t).half_log_snr for t in (499.5, 500.5))
    assert float(bound_weight(flow.resolve(500), flow)) == pytest.approx(1000 * (low - high) / math.log(2), rel=1e-5)
    with pytest.raises(ValueError, match="the decoder's"):
        bound_weight(schedule.resolve(0), schedule)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coefficients_are_not_rounded(dtype):
    """At timestep 1 of Stable Diffusion's schedule, in half precision and under autocast."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    base = Denoiser(build("class_unet").unet.to(dtype), DDIMScheduler(**betas))
    seen = []
    base.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["sample"]), with_kwargs=True)
    find = network(base, torch.zeros(1, 3, 16, 24, dtype=dtype))
    with torch.autocast("cpu", dtype):
        find(ask(torch.ones(1, 2, dtype=torch.bool), [1.0]))
    noise = find.noise.draw(["0|1.0"], [0], (3, 16, 24))
    share = (seen[0][0].double() * noise[0]).sum() / noise.double().square().sum()
    assert float(share) == pytest.approx(0.04128, rel=2e-3 if dtype == torch.bfloat16 else 3e-4)


# Real models


@pytest.fixture(scope="module")
def text():
    return Denoiser.from_pipe(build("short_sd"))


def test_text_by_the_pipelines_own_call(text):
    """Each error by hand: the pipeline's embeddings, the network called for one row."""
    images = pictures()
    made = ZeroShotClassifier.of(text, WORDS, rule=Averaging(3), image_size=32, batch_size=5)
    found = made(images)
    middle = [text.encode(image[:, :, (image.shape[2] - 32) // 2 :][:, :, :32], image_size=32) for image in images]
    values = [word for words in made.recipe.classes.prompts for word in words]
    for row in (0, 5, 17, len(found.pairs) - 1):
        image, prompt, time = (int(column[row]) for column in (found.pairs.images, found.pairs.prompts,
                                                                found.pairs.timesteps))  # fmt: skip
        noise = find_noise(made, images, image, time, middle[0].shape[1:])
        x_t = text.add_noise(middle[image], time, noise)
        with torch.no_grad(), text.evaluating():
            eps = text.predict(x_t, time, text.condition(values[prompt], size=(32, 32))).eps
        assert float(found.pair_errors[row]) == pytest.approx(float((eps - noise).square().mean()), rel=1e-4)
    mean = found.pair_errors.view(3, 3, 4).mean(1)
    torch.testing.assert_close(found.errors, torch.stack([mean[:, 0], mean[:, 1:3].mean(1), mean[:, 3]], 1))
    assert found.ids.tolist() == found.errors.argmin(1).tolist()
    best = ZeroShotClassifier.of(text, WORDS, rule=Averaging(3), image_size=32, ensemble="best")(images)
    torch.testing.assert_close(best.errors[:, 1], mean[:, 1:3].amin(1), rtol=1e-4, atol=1e-6)
    times, curve = found.curves(1)
    torch.testing.assert_close(curve.mean(0), found.errors[1])
    assert times.tolist() == sorted(set(found.pairs.timesteps.tolist()))


def find_noise(made, images, at, time, shape):
    from diffusers_repr.features.noise_policy import NoiseSource, image_keys
    from diffusers_repr.tasks.denoising_errors.crops import sized_pixels

    pixels = sized_pixels(images, made.denoiser, made.recipe.image_size, "crop")
    return NoiseSource("per_image", 0).draw([f"{image_keys(None, pixels)[at]}|{float(time)!r}"], [0], shape)


def test_no_batch_changes_an_answer(text):
    images, rule = pictures(2), Racing(n_levels=2, max_rounds=2)
    whole = ZeroShotClassifier.of(text, WORDS, rule=rule, image_size=32)(images)
    parts = [ZeroShotClassifier.of(text, WORDS, rule=rule, image_size=32, batch_size=1)(image) for image in images]
    torch.testing.assert_close(torch.cat([part.errors for part in parts]), whole.errors, rtol=1e-4, atol=1e-6)
    assert [part.labels[0] for part in parts] == whole.labels


def test_what_comes_before_the_prompt_runs_once_for_all_prompts(text, monkeypatch):
    """Of 3 images at 2 levels under 4 prompts; a network that reads its class at once shares nothing."""
    made = ZeroShotClassifier.of(text, WORDS, rule=Averaging(2), image_size=32, batch_size=64)
    alone = ZeroShotClassifier.of(text, WORDS, rule=Averaging(2), image_size=32, batch_size=1)
    classes = Denoiser.from_pipe(build("class_unet"))
    seen = []

    def counted(path, forward):
        def run(x, *args, **kwargs):
            seen.append((path, len(x)))
            return forward(x, *args, **kwargs)

        return run

    attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    watched = ["conv_in", "down_blocks.0.resnets.0", f"{attention}.to_q", f"{attention}.to_k", "conv_out"]
    modules = {path: text.model.get_submodule(path) for path in watched} | {"other": classes.model.conv_in}
    for path, module in modules.items():
        monkeypatch.setattr(module, "forward", counted(path, module.forward), raising=False)
    whole, own = made(pictures()), modules["conv_in"].forward
    looked = [(path, 6) for path in watched]  # once, the whole network: who reads the prompt first
    assert seen == [*looked, *((path, 6) for path in watched[:3]), *((path, 24) for path in watched[3:])]
    assert (count_hooks(modules["conv_in"]), modules["conv_in"].forward) == ((0, 0, 0), own)
    torch.testing.assert_close(whole.errors, alone(pictures()).errors, rtol=1e-5, atol=1e-7)
    seen.clear()
    other = ZeroShotClassifier.of(classes, None, rule=Averaging(2))
    other(pictures())
    assert seen == [("other", 3 * 2 * len(other.recipe.classes))]


def test_batches_shrink_where_memory_does_not_suffice(text, monkeypatch):
    made = ZeroShotClassifier.of(text, WORDS, rule=Averaging(2), image_size=32)
    want, forward, sizes = made(pictures()), NetworkErrors._forward, []

    def short(self, asked):
        if len(asked) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sizes.append(len(asked))
        return forward(self, asked)

    monkeypatch.setattr(NetworkErrors, "_forward", short)
    with pytest.warns(UserWarning, match="Memory does not suffice for") as told:
        found = made(pictures())
    torch.testing.assert_close(found.errors, want.errors, rtol=1e-4, atol=1e-6)
    assert "for 24 rows of one forward; going on with 12." in str(told[0].message)
    assert sum(sizes) == 24
    assert max(sizes) == made.batch_size == 3
    monkeypatch.setattr(NetworkErrors, "_forward", lambda self, asked: torch.empty(1 << 60))
    with (
        pytest.warns(UserWarning, match="Memory does not suffice for"),
        pytest.raises(MemoryError, match="one of the rows"),
    ):
        made(pictures())

    def other(self, asked):
        raise RuntimeError("something else")

    monkeypatch.setattr(NetworkErrors, "_forward", other)
    with pytest.raises(RuntimeError, match="something else"):
        made(pictures())


def test_prompts_are_encoded_in_parts(text, monkeypatch):
    words, condition = [f"a thing {at}" for at in range(5)], Denoiser.condition
    want = encode_conditions(text, prompts=words, size=(32, 32)).take(torch.arange(5))

    def short(self, prompt=None, **given):
        if len(prompt) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return condition(self, prompt, **given)

    monkeypatch.setattr(Denoiser, "condition", short)
    with pytest.warns(UserWarning, match="prompts that are encoded together; going on with"):
        found = encode_conditions(text, prompts=words, size=(32, 32)).take(torch.arange(5))
    torch.testing.assert_close(found["encoder_hidden_states"], want["encoder_hidden_states"])


@pytest.mark.parametrize("name", ["class_unet", "dit", "sd3", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "pixart", "flux", "sana"))])  # fmt: skip
def test_families(name):
    base = Denoiser.from_pipe(build(name))
    classes = ["cat", "dog"] if base.conditioner.argument == "prompt" else [0, 1, 2]
    size = (16, 24) if name == "class_unet" else 32
    made = ZeroShotClassifier.of(base, classes, rule=AdaptiveSchedule((1, 3), (2, 1)), image_size=size)
    found = made(pictures(2))
    assert bool(found.pair_errors.isfinite().all())
    assert bool((found.pair_errors > 0).all())
    assert len(found) == 2


def test_a_flow_in_velocity():
    """SiT's velocity is eps - x_0, so that the noise is x_t + (1 - t) v; written out, one row at a time."""
    base = Denoiser.from_pipe(sit_cases.pipeline())
    x0 = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = ZeroShotClassifier.of(base, [0, 3], rule=Averaging(2), batch_size=3)
    found = made(list(x0 / 2 + 0.5))
    for image in range(2):
        for place, label in enumerate((0, 3)):
            errors = []
            for time in (250.0, 750.0):
                noise = find_noise(made, list(x0 / 2 + 0.5), image, time, (3, 8, 8))[0]
                x_t, t = x0[image] * (1 - time / 1000) + noise * (time / 1000), torch.tensor([time])
                with torch.no_grad():
                    v = base.model(x_t[None], t, class_labels=torch.tensor([label])).sample
                errors.append((x_t + (1 - time / 1000) * v - noise).square().mean())
            assert float(found.errors[image, place]) == pytest.approx(float(sum(errors) / 2), rel=1e-4)


def test_winoground(text):
    images, captions = pictures(2), ("some plants around a bulb", "a bulb around some plants")
    found = winoground(text, [(captions, images)], n_levels=3, image_size=32)
    made = ZeroShotClassifier.of(text, dict(zip("ab", captions, strict=True)), rule=Averaging(3), image_size=32)
    errors = made(images, ids=["example 0", "example 0"]).errors
    torch.testing.assert_close(found.scores[0], -errors.T, rtol=1e-4, atol=1e-7)
    scores = torch.tensor([[[2.0, 1], [1, 2]], [[2, 3], [1, 4]], [[3, 1], [2, 0]], [[0, 1], [1, 0]]])
    made = WinogroundOutput(scores)
    assert made.text.tolist() == [True, True, False, False]
    assert made.image.tolist() == [True, False, False, False]
    assert made.group.tolist() == [True, False, False, False]
    assert made.summary() == {"text": 0.5, "image": 0.25, "group": 0.25}
    with pytest.raises(ValueError, match="two captions, which differ"):
        winoground(text, [(("a", "a"), images)])
    with pytest.raises(ValueError, match="text-to-image"):
        winoground(denoiser(), [])


# As a task


@pytest.fixture(scope="module")
def fitted():
    images, labels = draw(32)
    base = Denoiser.from_pipe(build("class_unet"))
    grey = [image.repeat(3, 4, 6) for image in photos(images)]
    settings = {"classes": [0, 1, 2, 3], "image_size": (16, 24), "candidates": 3, "error": 0.05}
    return ZeroShotClassifier.fit(base, (grey, labels), (grey[:8], labels[:8]), **settings), grey, labels


def test_a_zero_shot_classifier_is_a_task(fitted):
    made, images, labels = fitted
    check_task(made, images[:3], (images[:8], labels[:8]), lambda output: output.errors)
    assert {score.name for score in made.recipe.scores} == {"accuracy", "balanced_accuracy"}
    probabilities = made(images[:3]).probabilities
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3).double())
    scores = made.evaluate((images[:8], labels[:8]), record=False)
    assert 4 <= scores["evaluations"] <= 12


def test_what_is_learned_is_used():
    """On the mixture: the levels in order, races shorter than without, the stated error kept."""
    base = denoiser()
    images, labels = draw(64)
    made = ZeroShotClassifier.fit(base, (list(photos(images)), labels), candidates=5, resize="stretch")
    rule = made.recipe.rule
    assert rule.at == made.recipe.calibration.timesteps
    assert list(made.recipe.calibration.telling) == sorted(made.recipe.calibration.telling, reverse=True)
    raced = ZeroShotClassifier.fit(base, (list(photos(images)), labels), candidates=5, rule="racing")
    assert raced.recipe.rule.at == rule.at
    assert raced.recipe.rule.effect == made.recipe.calibration.effect
    test, truth = draw(64, seed=9)
    found = made(photos(test))
    assert float((found.ids == truth).double().mean()) >= 0.95
    assert float(found.evaluations.double().mean()) < float(raced(photos(test[:8])).evaluations.double().mean())


def test_another_base_is_refused(fitted, tmp_path):
    made = fitted[0]
    made.save_pretrained(tmp_path / "made")
    with pytest.raises(ValueError, match="Wrong base for this zero-shot classifier.*is a UNet2DConditionModel"):
        ZeroShotClassifier.from_pretrained(tmp_path / "made", base=build("sd"))
    other = build("class_unet")
    other.scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    with pytest.raises(ValueError, match="the noise schedules differ"):
        ZeroShotClassifier.from_pretrained(tmp_path / "made", base=other)
    other = build("class_unet")
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter += 1
    with pytest.warns(UserWarning, match="other weights"):
        ZeroShotClassifier.from_pretrained(tmp_path / "made", base=other)
    path = tmp_path / "made" / "zero_shot.json"
    kept = json.loads(path.read_text())
    for changes, message in (
        ({"rule": {**kept["rule"], "kind": "os.system"}}, "rule.kind is 'os.system'"),
        ({"loss": "l3"}, "loss is 'l3'"),
        ({"classes": {**kept["classes"], "names": ["a", "a", "b", "c"]}}, "stands twice"),
        ({"format": "diffusers_repr.zero_shot/9"}, "its format must be"),
    ):
        path.write_text(json.dumps({**kept, **changes}))
        with pytest.raises(ValueError, match=message):
            ZeroShotClassifier.from_pretrained(tmp_path / "made", base=build("class_unet"))


def test_rules_and_classes_come_back(text, tmp_path):
    for rule in ("racing", "averaging", "pets"):
        made = ZeroShotClassifier.of(text, WORDS, rule=rule, seed=3, image_size=32, ensemble="best")
        made.save_pretrained(tmp_path / rule)
        again = ZeroShotClassifier.from_pretrained(tmp_path / rule, base=text)
        assert again.recipe == dataclasses.replace(made.recipe, base=again.recipe.base)
    assert (made.recipe.loss, made.recipe.rule) == ("l1", AdaptiveSchedule((25, 250), (5, 1)))


# Misuse


@pytest.mark.parametrize(
    ("classes", "template", "message"),
    [
        (["cat"], "a {}", "two classes or more"),
        (["cat", "cat"], "a {}", "The name 'cat' stands twice"),
        ({"cat": "an animal", "dog": "an animal"}, "a {}", "The prompt 'an animal' stands twice"),
        ({"cat": "a cat", "nothing": " "}, "a {}", "Class 'nothing' has an empty prompt"),
        ({"cat": "a cat", "nothing": []}, "a {}", "Class 'nothing' has an empty prompt"),
        (["cat", ""], "a {}", "empty name"),
        (["cat", "dog"], "a photo", "has {} once"),
        (None, "a {}", "needs classes"),
        ([1, 2], "a {}", "Classes of a text model are names"),
        ("cat", "a {}", "Classes of a text model are names"),
        (ZeroShotClasses(("a", "b"), class_labels=(0, 1)), "a {}", "is told prompts; these classes have class ids"),
    ],
)
def test_classes_refused(text, classes, template, message):
    with pytest.raises(ValueError, match=message):
        ZeroShotClassifier.of(text, classes, template=template)


def test_misuse(text):
    with pytest.raises(ValueError, match="not conditioned on text or classes"):
        ZeroShotClassifier.of(build("ddpm"), ["cat", "dog"])
    base = denoiser()
    for classes, message in (([0, 9], "from 0 to 3; got 9"), (["cat", 1], "no class 'cat'"), ([1, 1], "stands twice")):
        with pytest.raises(ValueError, match=message):
            ZeroShotClassifier.of(base, classes)
    for settings, message in (
        ({"rule": "cifar100"}, "take one of racing, averaging, food"),
        ({"rule": "calibrated"}, "ZeroShotClassifier.fit"),
        ({"loss": "l3", "rule": Averaging(2)}, "loss='l3'"),
        ({"ensemble": "sum"}, "ensemble='sum'"),
        ({"resize": "pad"}, "resize='pad'"),
        ({"image_size": "keep"}, "not for classification"),
    ):
        with pytest.raises(ValueError, match=message):
            ZeroShotClassifier.of(base, **settings)(photos(draw(2)[0]))
    made = ZeroShotClassifier.of(base, rule=Averaging(2))
    with pytest.raises(ValueError, match="No images"):
        made([])
    images, labels = photos(draw(8)[0]), draw(8)[1]
    with pytest.raises(ValueError, match="those of these classes from 0 to 3"):
        made.evaluate((images, labels + 2))
    with pytest.warns(UserWarning, match="2 of 4 classes have no image in images .test.: 2, 3"):
        made.evaluate((images[:2], labels[:2]))
    with pytest.raises(ValueError, match="schedules have levels of their own"):
        ZeroShotClassifier.fit(base, (images, labels), rule="pets")
    with pytest.raises(ValueError, match="learned its own .8 channels out, 4 in"):
        ZeroShotClassifier.of(build("dit"), [0, 1], loss="vlb")
    broken = denoiser(centres=means() * math.nan)
    with pytest.raises(FloatingPointError, match="is not finite"):
        ZeroShotClassifier.of(broken, rule=Averaging(2))(images)


def test_a_network_of_edm_without_its_preconditioning_is_refused():
    """What it gives is about the opposite of the noise, where there is little; with its scheduler it is right."""
    edm = NoiseSchedule("edm", "edm", sigma_min=0.002, sigma_max=80.0, sigma_data=1.0)
    lost, images = denoiser(trained_as=edm), photos(draw(8)[0])
    with pytest.raises(ValueError, match="gaussian: its estimates of .* a network of EDM without its precond"):
        ZeroShotClassifier.of(lost, rule=Averaging(4))(images)
    kept = denoiser("edm")
    assert len(ddae_levels(kept)) == 3
    assert ZeroShotClassifier.of(kept, rule=Averaging(16))(images).ids.tolist() == [0, 1, 2, 3] * 2
    grey = {"centres": means() * 0, "trained_as": edm}
    with pytest.raises(ValueError, match="It was not trained for this scheduler .vp, output 'epsilon'"):
        ddae_levels(denoiser(**grey))
    assert len(ddae_levels(denoiser(centres=grey["centres"]))) == 3
    with pytest.raises(ValueError, match="a network that is not EDM's, or another prediction_type"):
        check_estimates(kept, -0.5, 0.1)


def test_a_picture_of_errors_by_level():
    found = ZeroShotClassifier.of(denoiser(), rule=Racing(n_levels=3, max_rounds=3))(photos(draw(2)[0]))
    figure = found.plot(1, limit=3)
    axes = figure.axes[0]
    assert [line.get_label() for line in axes.get_lines()] == [name for name, _ in found.top(3)[1]]
    times, errors = found.curves(1)
    winner = errors[:, found.ids[1]] - errors.nan_to_num(torch.inf).amin(1)
    assert axes.get_lines()[0].get_ydata().tolist() == pytest.approx(winner.tolist())
    assert "2 images" in repr(found)

"""The shortest whole use, in half a minute: features of images, a probe, a guided sample.

    python examples/quickstart.py

These are the blocks of docs/quickstart.md, which explains them. Writes a selection, a probe and a picture to
`outputs/quickstart`.
"""

from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline

from diffusers_repr import PAG, Denoiser, FeatureExtractor, Probe, guide, list_layers, select_features
from diffusers_repr.data.digits import load_digits_splits

# 1. A model
denoiser = Denoiser.from_pretrained("examples/models/digits-ddpm")
for layer in list_layers(denoiser)[:4]:
    print(layer.path, layer.kind, layer.channels, layer.grid, f"{layer.flops_share:.0%}")

# 2. Features
digits = load_digits_splits()
images = digits["test"][:8]["image"]
extract = FeatureExtractor(denoiser, ["mid_block"], timestep=100, ensemble_size=4)
output = extract(images)
print(output["mid_block"].shape, output.level)

# 3. Which level, which layers
selection = select_features(denoiser, digits["train"], digits["validation"], timesteps=[30, 100, 300], progress=False)
print(selection.best.layer, selection.best.timestep, round(selection.best.mean, 3))
selection.save("outputs/quickstart/selection")  # selection.json, selection.parquet, heatmap.png

# 4. A probe
probe = Probe.fit(selection.extractor(denoiser), digits["train"], digits["validation"])
print({name: round(score, 3) for name, score in probe.evaluate(digits["test"]).items()})
probe.save_pretrained("outputs/quickstart/probe")

again = Probe.from_pretrained("outputs/quickstart/probe")
print(again(images).labels)

# 5. The other way round
pipe = GuidedUnconditionalPipeline.from_pretrained("examples/models/digits-class-ddim")
pipe.set_progress_bar_config(disable=True)
with guide(pipe, PAG(1.0, layers="up_blocks.0.*")) as handle:
    guided = pipe(class_labels=[3], guidance_scale=2.0, num_inference_steps=10).images
guided[0].resize((128, 128), 0).save("outputs/quickstart/guided.png")
print(handle.stats)

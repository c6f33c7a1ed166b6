"""Our pipelines, the layer table and the Denoiser by Hub id, over HTTP against the local Hub."""

import json
import shutil
from pathlib import Path

from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler

from tests.pipelines.guided_cases import GUIDED
from tests.pipelines.test_joint_diffusion import make
from tests.testers.hub_server import hub_env, hub_server, run_python
from tests.testers.models import saved

PIPELINES = Path(__file__).parents[2] / "pipelines"

CLIENT = """
import json, os
from pathlib import Path
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers_repr import PAG, guide, hub
from diffusers_repr.denoiser import Denoiser, list_layers
from diffusers_repr.denoiser.layers import list_layers_from_config
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.pipelines.joint_diffusion import JointDiffusionPipeline
from tests.pipelines.guided_cases import GUIDED, arguments, run

work, report = Path(os.environ["WORK"]), {}
hub.publish_pipeline(work / "feature_extraction", "user/features")
first = hub.push_folder(work / "ddim", "user/model").rsplit("/", 1)[1]
hub.push_folder(work / "dit", "user/model")  # the newest commit is another model

layers = list_layers_from_config("user/model", revision=first)
report["layers"] = [layer.path for layer in layers[:2]]
report["newest"] = [layer.path for layer in list_layers_from_config("user/model")][-2:]
assert not list(Path(os.environ["HF_HOME"]).rglob("*.safetensors"))  # no weights came for the tables

denoiser = Denoiser.from_pretrained("user/model", revision=first)
report["name"], report["revision"] = denoiser.name, denoiser.revision
assert [layer.path for layer in layers] == [layer.path for layer in list_layers(denoiser)]
pipe = DiffusionPipeline.from_pretrained(
    "user/model", revision=first, custom_pipeline="user/features", trust_remote_code=True
)
report["class"], report["original"] = type(pipe).__name__, pipe.config.class_name
images = torch.rand(2, 3, 16, 16)
want = FeatureExtractor(denoiser, "mid_block", 261)(images)
assert torch.equal(pipe(images, "mid_block", 261)["mid_block"], want["mid_block"])

# two more custom pipelines in the one process
hub.push_folder(work / "class_unet", "user/class")
commits = {f: hub.publish_pipeline(work / f, f"user/{f}").rsplit("/", 1)[1] for f in GUIDED}
for folder in ("guided_dit", "guided_unconditional"):
    model = "user/class" if folder == "guided_unconditional" else work / "dit"
    pipe = DiffusionPipeline.from_pretrained(
        model, custom_pipeline=f"user/{folder}", custom_revision=commits[folder], trust_remote_code=True
    )
    name = GUIDED[folder][0]
    got = run(pipe, **arguments(name), guidance=PAG(2.0))
    with guide(pipe, PAG(2.0)):
        assert np.array_equal(run(pipe, **arguments(name)), got)
    report[folder] = [type(pipe).__name__, type(pipe).__module__.split(".")[2]]

# a pipeline with components of ours needs no remote code
hub.push_folder(work / "joint", "user/joint")
joint = JointDiffusionPipeline.from_pretrained("user/joint")
report["joint"] = [type(part).__name__ for part in (joint.unet, joint.scheduler, joint.classifier)]
print(json.dumps(report))
"""


def test_by_hub_id(tmp_path):
    for folder in ("feature_extraction", *GUIDED):
        shutil.copytree(PIPELINES / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    make(scheduler=FlowMatchODEScheduler()).save_pretrained(tmp_path / "joint")
    for name in ("ddim", "dit", "class_unet"):
        shutil.copytree(saved(name), tmp_path / name)
    with hub_server() as server:
        env = hub_env(server, tmp_path / "cache") | {"WORK": str(tmp_path), "OMP_NUM_THREADS": "1"}
        run = run_python(CLIENT, env)
        assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["layers"] == ["conv_in", "down_blocks.0.resnets.0"]
    assert report["newest"] == ["norm_out", "proj_out_2"]
    assert (report["name"], len(report["revision"])) == ("user/model", 40)
    assert (report["class"], report["original"]) == ("FeatureExtractionPipeline", "DDIMPipeline")
    for folder in ("guided_dit", "guided_unconditional"):
        assert report[folder] == [GUIDED[folder][1], f"user--{folder}"]
    assert report["joint"] == ["UNet2DModel", "FlowMatchODEScheduler", "JointHead"]

"""The loaders of diffusers, unchanged, against the local Hub: what is pushed loads by its id."""

import json

import pytest

from tests.testers.hosts import before
from tests.testers.hub_server import hub_env, hub_server, run_python

PIPELINE = '''"""A pipeline of one line, to be told from another one."""

import torch
from diffusers import DiffusionPipeline


class Pipe{name}(DiffusionPipeline):
    """Multiplies."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, x):
        return {factor} * x
'''

CLIENT = """
import json, os, sys
from pathlib import Path
import torch
from diffusers import AutoModel, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers_repr import LinearHead, hub

work, report = Path(os.environ["WORK"]), {}
torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
    down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
)
def same(other):
    pairs = zip(unet.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)

# a model, by its own method
unet.push_to_hub("user/unet")
loaded = UNet2DModel.from_pretrained("user/unet")
assert same(loaded) and loaded.config.block_out_channels == [8, 8], loaded.config
first = hub.load_json_config("user/unet", "config.json")
assert first["_class_name"] == "UNet2DModel"

# a pipeline: saved, pushed by us, loaded by its id, and at an older commit
folder = work / "ddpm"
DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=10)).save_pretrained(folder)
commit = hub.push_folder(folder, "user/ddpm").rsplit("/", 1)[1]
DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20)).save_pretrained(folder)
hub.push_folder(folder, "user/ddpm")
newest, older = DDPMPipeline.from_pretrained("user/ddpm"), DDPMPipeline.from_pretrained("user/ddpm", revision=commit)
assert same(newest.unet)
report["steps"] = [pipe.scheduler.config.num_train_timesteps for pipe in (newest, older)]
report["class"] = type(DiffusionPipeline.from_pretrained("user/ddpm")).__name__
assert same(UNet2DModel.from_pretrained("user/ddpm", subfolder="unet"))

# and by the pipeline's own method
newest.push_to_hub("user/ddpm-again", private=True)
assert same(DDPMPipeline.from_pretrained("user/ddpm-again").unet)

# custom pipelines: not without consent, two in one process, on a folder and on an id
for name in ("a", "b"):
    hub.publish_pipeline(work / name, f"user/pipe-{name}")
try:
    DiffusionPipeline.from_pretrained(folder, custom_pipeline="user/pipe-a")
except ValueError as error:
    report["refused"] = str(error)
made = []
for base in (folder, "user/ddpm"):
    for name in ("a", "b"):
        pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline=f"user/pipe-{name}", trust_remote_code=True)
        assert same(pipe.unet)
        made.append([type(pipe).__name__, pipe(torch.ones(1)).item(), type(pipe).__module__.split(".")[2]])
report["made"] = made

# a head of ours by the auto class: not without consent; what is uploaded is enough
head = LinearHead(4, 2)
head.save_pretrained(work / "head")
hub.push_folder(work / "head", "user/head")
try:
    AutoModel.from_pretrained("user/head")
except ValueError as error:
    report["auto refused"] = str(error)
report["ran"] = [name for name in sys.modules if name.endswith("diffusers_repr_linear")]
again = AutoModel.from_pretrained("user/head", trust_remote_code=True)
assert type(again) is LinearHead and torch.equal(again(torch.ones(1, 4)), head(torch.ones(1, 4)))
print(json.dumps(report))
"""


@pytest.fixture
def server():
    with hub_server() as running:
        yield running


def test_models_pipelines_and_custom_pipelines(server, tmp_path):
    for name, factor in (("a", 2), ("b", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pipeline.py").write_text(PIPELINE.format(name=name.upper(), factor=factor))
    done = run_python(CLIENT, hub_env(server, tmp_path, WORK=tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["steps"] == [20, 10]
    assert report["class"] == "DDPMPipeline"
    if not before("diffusers", "0.38"):
        assert "trust_remote_code=True" in report["refused"]
    assert "trust_remote_code=True" in report["auto refused"]
    assert report["ran"] == []
    assert report["made"] == 2 * [["PipeA", 2.0, "user--pipe-a"], ["PipeB", 3.0, "user--pipe-b"]]

    assert server.token not in done.stdout + done.stderr
    assert all(server.token.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert all(token is None for _, path, _, token in server.requests if path.startswith("/storage/"))
    unet = server.store.repos["model", "user/unet"]
    assert unet.commits[unet.branches["main"]]["diffusion_pytorch_model.safetensors"].sha256 is not None

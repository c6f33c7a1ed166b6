import pytest

from diffusers_repr.hub import check_pipeline_file, publish_pipeline

ONE = "from diffusers import DiffusionPipeline\nclass Mine(DiffusionPipeline):\n    pass\n"


@pytest.mark.parametrize(
    "code",
    [
        ONE,
        "import diffusers\nclass Mine(diffusers.DiffusionPipeline): ...",
        "from diffusers import DDPMPipeline, DiffusionPipeline\nclass Mine(DDPMPipeline): ...",
        "from diffusers_repr.features import FeatureMixin\n" + ONE.replace("(D", "(FeatureMixin, D"),
        "from diffusers.utils import BaseOutput\nclass MineOutput(BaseOutput): ...\n" + ONE,
        "import diffusers_repr.pipelines.x\n" + ONE,
        "try:\n    import torch\nexcept ImportError:\n    torch = None\n" + ONE,
        ONE + "def f():\n    class Other(Mine): ...\n",
    ],
)
def test_accepts_one_pipeline_class(tmp_path, code):
    path = tmp_path / "pipeline.py"
    path.write_text(code)
    assert check_pipeline_file(path) == "Mine"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\n", "no class that descends"),
        ("from diffusers import DiffusionPipeline\n", "no class that descends"),
        (ONE + "class Other(DiffusionPipeline): ...", r"Mine \(line 2\), Other \(line 4\)"),
        (ONE + "class Other(Mine): ...", "Mine .*Other"),
        (ONE + "if True:\n    class Other(Mine): ...", "Mine .*Other"),
        (ONE + "Alias = Mine", "Mine .*Alias"),
        ("from my_package import FooPipeline\n" + ONE, "FooPipeline .*Mine"),
        ("from my_package import FooPipeline as P\nclass Mine(FooPipeline): ...", "P .*Mine"),
        ("from .utils import x\n" + ONE, r"line 1, imports relatively \(from \.utils\)"),
        (ONE + "def f():\n    from . import x\n", "line 5, imports relatively"),
        ("class Mine(:\n", "not valid Python .line 1"),
    ],
)
def test_refuses_with_the_reason(tmp_path, code, message):
    path = tmp_path / "pipeline.py"
    path.write_text(code)
    with pytest.raises(ValueError, match=message):
        check_pipeline_file(path)
    with pytest.raises(ValueError, match=message):
        publish_pipeline(tmp_path, "user/pipe")


def test_refuses_a_folder_without_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no 'pipeline\.py'"):
        publish_pipeline(tmp_path.parent, "user/pipe")

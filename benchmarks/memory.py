"""Peak memory of `diffusers-repr extract` over 10,000 images against 1,000."""

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import report

MODEL = Path("examples/models/digits-ddpm")


def peak_mib(folder: Path, count: int) -> float:
    """Peak resident memory of one extraction, in a process of its own that reports its own peak."""
    code = (
        "import resource, sys\nfrom diffusers_repr.cli import main\n"
        "rc = main(sys.argv[1:])\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\nsys.exit(rc)"
    )
    command = ["extract", str(MODEL), str(folder / f"{count}.parquet"), "--layers", "mid_block", "--timesteps", "200"]
    command += ["--out", str(folder / f"features-{count}"), "--batch_size", "64", "--pooling", "mean"]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout.split()[-1]) / 1024


def main() -> None:
    import numpy as np
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as Pil

    if not MODEL.is_dir():
        raise SystemExit(f"{MODEL} is missing; run this from the repository's root.")
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peaks = {}
        for count in (1_000, 10_000):
            images = [Pil.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(count)]
            rows = {"image": images, "label": [0] * count}
            data = Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("int64")}))
            data.to_parquet(folder / f"{count}.parquet")
            peaks[count] = peak_mib(folder, count)
    report(
        "memory", mib_1000=peaks[1_000], mib_10000=peaks[10_000], ratio=peaks[10_000] / peaks[1_000], target="<= 1.10"
    )


if __name__ == "__main__":
    main()

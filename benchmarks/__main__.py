"""`python -m benchmarks [NAME ...]`: run benchmarks one after another, each in its own process."""

import subprocess
import sys

NAMES = (
    "early_exit",
    "hooks",
    "extraction",
    "selection",
    "memory",
    "readout",
    "segmentation",
    "hyperfeatures",
    "pag",
    "guide_overhead",
    "repa_loss",
    "cknna",
    "resume",
    "optimizer_update",
    "repa_step",
    "loop_overhead",
    "cached_training",
    "correspondence",
    "cleandift",
    "odise",
    "heads",
    "zero_shot",
    "online_step",
    "cluster_lookup",
    "retrieval_keys",
    "perceptual",
    "rcg_vectors",
    "patch_masks",
    "repfusion",
    "tokens",
    "autoencoders",
    "generate",
)


def main() -> int:
    names = sys.argv[1:] or NAMES
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"No benchmark {unknown[0]!r}; there are {', '.join(NAMES)}.", file=sys.stderr)
        return 2
    return max(subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode for name in names)


if __name__ == "__main__":
    sys.exit(main())

"""Python runs this as it starts, in children of tests: cheaper collection of garbage, our deprecations as errors."""

import gc
import warnings

# A fifth of what children spend on imports is garbage collection.
gc.set_threshold(100_000, 20, 100)

# What a host deprecates is an error where our code calls it, as it is in the tests' own process.
for _category in (DeprecationWarning, FutureWarning):
    warnings.filterwarnings(
        "error", category=_category, module=r"(diffusers_repr|pipelines|schedulers_ext|examples|tests|__main__)\b"
    )

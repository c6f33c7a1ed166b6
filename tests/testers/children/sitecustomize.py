"""Python runs this as it starts: a fifth of what children of tests spend on imports is garbage collection."""

import gc

gc.set_threshold(100_000, 20, 100)

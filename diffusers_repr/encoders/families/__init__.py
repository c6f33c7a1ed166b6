"""One file an architecture of transformers."""

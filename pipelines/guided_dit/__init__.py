"""DiT with guidance."""

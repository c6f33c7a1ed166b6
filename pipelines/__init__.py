"""What is published on the Hub: one folder a pipeline, importable as `diffusers_repr.pipelines`."""

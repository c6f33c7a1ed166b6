"""One adapter a file; imported when a model of its class first comes."""

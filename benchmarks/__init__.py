"""Speed and memory claims, each measured against its peer in one run; one JSON line a benchmark."""

"""A disk that is really full after a few kilobytes."""

import subprocess
from contextlib import contextmanager

import pytest


@contextmanager
def mounted(folder, size):
    """A new folder that holds so much (`48k`), in memory; the test is skipped where that may not be mounted."""
    folder.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("may not mount a small disk here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)

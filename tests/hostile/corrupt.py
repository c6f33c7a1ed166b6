"""Good JSON made bad, one leaf at a time."""

import copy
import itertools
import json
import math
import time

import pytest

STRANGE = [None, "x", [], {}, -1, 1e18, math.nan, "../x", True, 10**30]


def leaves(value, path=()):
    """The path of every value that is no list and no object, and of every empty one."""
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in leaves(item, (*path, key))]
    if isinstance(value, list) and value:
        return [leaf for index, item in enumerate(value) for leaf in leaves(item, (*path, index))]
    return [path]


def changed(value, path, new):
    """A copy with another value at a path; as a text, its names are parted by blanks."""
    path = [int(p) if p.isdecimal() else p for p in path.split()] if isinstance(path, str) else path
    value = place = copy.deepcopy(value)
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new
    return value


def at_leaves(value, each=2, most_of_a_list=2):
    """`(path, strange value)`: every leaf with some of the strange values in turn, lists by their first items."""
    turn = itertools.cycle(STRANGE)
    for path in leaves(value):
        if not any(isinstance(key, int) and key >= most_of_a_list for key in path):
            yield from ((path, next(turn)) for _ in range(each))


def sweep(good, write, use, file, other=None, errors=(ValueError, OSError)):
    """Change each leaf; `use` must refuse it, naming the file and a field on the way to it, or go on without a fault.

    Files of the kind `other` (an ending) may be named instead: they are no longer those that the JSON tells of.

    Returns:
        How many were refused.
    """
    refused = 0
    for path, new in at_leaves(good):
        write(json.dumps(changed(good, path, new)))
        since = time.process_time()
        try:
            use()
        except errors as error:
            refused += 1
            told = str(error)
            named = file in told and any(str(key) in told for key in path if isinstance(key, str))
            assert named or (other is not None and other in told), (path, new, told)
            assert len(told) < 2000, (path, new)
        except Exception as error:
            pytest.fail(f"{path} = {new!r}: {type(error).__name__}: {error}")
        assert time.process_time() - since < 2, (path, new)  # seconds of work, whatever else runs
    write(json.dumps(good))
    use()
    return refused

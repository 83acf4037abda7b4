"""How many threads torch has."""

from contextlib import contextmanager

import torch


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by_threads(call, *counts):
    """What each count of threads makes of the call: tensors, which are the same to the bit."""
    found = []
    for count in counts:
        with threads(count):
            found.append(call())
    for others in zip(*found, strict=True):
        assert all(torch.equal(others[0], other) for other in others[1:])
    return found[0]

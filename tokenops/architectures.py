"""Which architectures take which method, as `make models` found it. Here, as it needs nothing of what it speaks of."""

import json
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).parent / "patching" / "supported.json"


class Supported(NamedTuple):
    """An architecture that was tried, small and with random weights.

    Attributes:
        library: "timm", "transformers", "torchvision" or "open_clip".
        architecture: timm's name of a model, or a class of the library; after a comma, what is set in it.
        blocks: the class of its blocks, where it has some, with its module.
        methods: for every method of `apply_patch`, "works" (or "works with" an option that it needs), or why not: the
            words of the error that `apply_patch` raises, or, after "open: ", what was found to be wrong.
        note: why no method can be defined for it, where that is so.
    """

    library: str
    architecture: str
    blocks: str
    methods: dict[str, str]
    note: str = ""


def supported(name: str = "") -> list[Supported]:
    """The architectures that were tried with every method, and what became of each.

    *Works* means, for two images at once: where nothing is reduced the results are those of the unpatched model, to
    1e-5 of the largest number (for "dps" in an order of its own); where tokens are reduced they are others, finite,
    and those of each image alone (but for "random", which draws anew); gradients reach all parameters that they reached
    before; parameters keep their names; and after `remove_patch` the results are the same to the bit.

    Args:
        name: a part of the library, of the architecture or of the class of its blocks, in any case; "" for all.

    Returns:
        Those, in the order of libraries and names.

    Raises:
        TypeError: name is no string.

    >>> [found] = supported("vit_base_patch16_rope_mixed_224")
    >>> found.methods["evo_vit"]
    'works'
    """
    if not isinstance(name, str):
        raise TypeError(f"supported: name must be a str, but got {name!r}")
    found = [read(line) for line in _lines() if "library" in line]
    return [one for one in found if any(name.lower() in part.lower() for part in one[:3])]


def tried_with() -> dict[str, str]:
    """The versions of the libraries that the architectures were tried with."""
    return next(line["versions"] for line in _lines() if "versions" in line)


def _lines() -> list[dict]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def read(line: dict) -> Supported:
    """An architecture of the file, which says for each outcome the methods that have it."""
    methods = {method: outcome for outcome, methods in line["outcomes"].items() for method in methods}
    return Supported(line["library"], line["architecture"], line["blocks"], methods, line.get("note", ""))

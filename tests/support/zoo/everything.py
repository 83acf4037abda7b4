"""The whole list."""

from support.zoo import of_dense, of_language, of_others, of_packed, of_pairs, of_timm, of_transformers
from support.zoo.entry import Entry


def entries() -> list[Entry]:
    """In the order of the file: by library and name."""
    lists = (of_dense, of_language, of_others, of_packed, of_pairs, of_timm, of_transformers)
    return sorted((entry for some in lists for entry in some.entries()), key=lambda entry: entry[:2])

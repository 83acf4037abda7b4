"""tokenops: fused kernels for token reduction and pruned attention in vision transformers.

The whole public surface: operators, backend choice, and the packages `tokenops.nn` (modules) and `tokenops.methods`
(models; needs timm). `tokenops.reference` is the specification in plain PyTorch.
"""

from typing import Any

from . import tome
from .ops import counted, reference
from .ops.backends import use_backend
from .ops.masked_channel_attention import masked_channel_attention, masked_channel_attention_qkv
from .ops.merge_bipartite import Merged, match_bipartite, merge_bipartite, unmerge_bipartite
from .ops.merge_neighbours import merge_neighbours, unmerge_neighbours
from .ops.packed import kept_counts, split_like
from .ops.restore_tokens import restore_tokens
from .ops.select_tokens import Selection, select_tokens
from .ops.soft_aggregate import soft_aggregate
from .ops.soft_scatter import soft_scatter
from .ops.token_mlp import token_mlp

counted.from_now_on()
__version__ = "0.2.0"
__all__ = [
    "Merged",
    "Selection",
    "apply_patch",
    "fidelity",
    "kept_counts",
    "load_patched",
    "masked_channel_attention",
    "masked_channel_attention_qkv",
    "match_bipartite",
    "merge_bipartite",
    "merge_neighbours",
    "reference",
    "remove_patch",
    "restore_tokens",
    "save_patched",
    "select_tokens",
    "soft_aggregate",
    "soft_scatter",
    "split_like",
    "supported",
    "token_mlp",
    "tokens_left",
    "tome",
    "trace",
    "unmerge_bipartite",
    "unmerge_neighbours",
    "use_backend",
    "visualize",
    "vlm",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    """Whole methods, imported when they are asked for: they need more than torch."""
    if name in ("apply_patch", "load_patched", "remove_patch", "save_patched", "tokens_left", "trace"):
        from . import methods, patching  # noqa: F401  methods say their names to the engine

        return getattr(patching, name)
    if name == "vlm":
        from importlib import import_module

        return import_module(".vlm", __name__)
    if name == "fidelity":
        from .patching.fidelity import fidelity

        return fidelity
    if name == "visualize":
        from .patching.visualize import visualize

        return visualize
    if name == "supported":
        from .architectures import supported

        return supported
    if name == "warm_up":
        from .ops.warm_up import warm_up

        return warm_up
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

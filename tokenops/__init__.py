"""tokenops: fused kernels for token reduction and pruned attention in vision transformers.

The whole public surface: operators, backend choice, and the packages `tokenops.nn` (modules) and `tokenops.methods`
(models; needs timm). `tokenops.reference` is the specification in plain PyTorch.
"""

from . import reference
from ._backends import use_backend
from .masked_channel_attention import masked_channel_attention
from .merge_neighbours import merge_neighbours, unmerge_neighbours
from .restore_tokens import restore_tokens
from .select_tokens import Selection, select_tokens
from .soft_aggregate import soft_aggregate
from .soft_scatter import soft_scatter
from .token_mlp import token_mlp

__version__ = "0.1.0"
__all__ = [
    "Selection",
    "masked_channel_attention",
    "merge_neighbours",
    "reference",
    "restore_tokens",
    "select_tokens",
    "soft_aggregate",
    "soft_scatter",
    "token_mlp",
    "unmerge_neighbours",
    "use_backend",
]

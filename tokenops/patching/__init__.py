"""Token reduction in models people have: `apply_patch`, `remove_patch`, and what they do: `tokens_left`, `trace`.

`save_patched` and `load_patched` keep a patched model in a folder.

A method of your own derives from `Method` and gives every block a `Role`.
"""

from .apply import apply_patch, remove_patch
from .counts import TokensLeft, image_tokens_left, tokens_left
from .engine import Flow, Method, Record, Role, Step
from .saving import load_patched, options_of, save_patched
from .views import Trace, trace

__all__ = [
    "Flow",
    "Method",
    "Record",
    "Role",
    "Step",
    "TokensLeft",
    "Trace",
    "apply_patch",
    "image_tokens_left",
    "load_patched",
    "options_of",
    "remove_patch",
    "save_patched",
    "tokens_left",
    "trace",
]

"""Token reduction in models people have: `apply_patch`, `remove_patch`, and `trace`, which says where patches went.

`save_patched` and `load_patched` keep a patched model in a folder.

A method of your own derives from `Method` and gives every block a `Role`.
"""

from .apply import apply_patch, remove_patch
from .engine import Flow, Method, Record, Role, Step
from .saving import load_patched, options_of, save_patched
from .views import Trace, trace

__all__ = [
    "Flow",
    "Method",
    "Record",
    "Role",
    "Step",
    "Trace",
    "apply_patch",
    "load_patched",
    "options_of",
    "remove_patch",
    "save_patched",
    "trace",
]

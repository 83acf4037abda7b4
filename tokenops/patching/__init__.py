"""Token reduction in models people have: `apply_patch`, `remove_patch`, and `trace`, which says where patches went.

A method of your own derives from `Method` and gives every block a `Role`.
"""

from .apply import apply_patch, remove_patch
from .engine import Flow, Method, Record, Role, Step
from .views import Trace, trace

__all__ = ["Flow", "Method", "Record", "Role", "Step", "Trace", "apply_patch", "remove_patch", "trace"]

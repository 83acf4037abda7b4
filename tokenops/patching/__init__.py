"""Token reduction in models people have: `apply_patch`, `remove_patch`, and `trace`, which says where patches went."""

from .apply import apply_patch, remove_patch
from .trace import Step, Trace, trace

__all__ = ["Step", "Trace", "apply_patch", "remove_patch", "trace"]

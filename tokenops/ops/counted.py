"""torch's FLOP counter knows our operators as soon as both are imported, whichever is first; it is slow to import."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any

COUNTER = "torch.utils.flop_counter"


def from_now_on() -> None:
    """Registers flops.py, now or with the import of torch's counter."""
    if COUNTER in sys.modules:
        from . import flops  # noqa: F401
    elif not any(isinstance(finder, _WithCounter) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WithCounter())


class _WithCounter:
    """Sees torch's counter imported, once."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                from . import flops  # noqa: F401

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

"""What a module is behind what wraps it."""

from typing import Any

from timm.layers import LayerNorm
from torch import nn

from ..nn.watched import exact

#: where modules that wrap another keep it: activation checkpointing, FSDP1, torch.compile
_WRAPPED = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")


def fusable(norm: nn.Module) -> tuple[Any, Any, float] | None:
    """A norm as operators take it, to apply it in their launch; None where it must be called."""
    return (norm.weight, norm.bias, norm.eps) if exact(norm, nn.LayerNorm, LayerNorm) else None  # type: ignore


def unwrapped(module: Any) -> Any:
    """A module without what wraps it."""
    while found := [name for name in _WRAPPED if name in getattr(module, "_modules", ())]:
        module = module._modules[found[0]]
    return module


def name_of(thing: Any) -> str:
    """The full name of an object's class: behind fully_shard that of what was sharded."""
    kinds = [kind for kind in type(thing).__mro__ if issubclass(kind, nn.Module) and not is_sharded(kind)]
    kind = kinds[0] if kinds else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def is_sharded(kind: type) -> bool:
    """Whether a class is of modules that fully_shard has taken the parameters of."""
    return any(base.__name__ == "FSDPModule" for base in kind.__mro__)


def plain_of(module: Any) -> type:
    """The class of a module without what `dressed` put before it."""
    cls = type(module)
    return cls.tokenops_made[0] if "tokenops_made" in vars(cls) else cls

"""What a module is behind what wraps it, and whether anything looks at it."""

from typing import Any

from timm.layers import LayerNorm
from torch import nn
from torch.utils.module_tracker import ModuleTracker

_EVERYWHERE: tuple[dict[int, Any], ...] = (
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_backward_pre_hooks,
    nn.modules.module._global_backward_hooks,
)


#: where modules that wrap another keep it: activation checkpointing, FSDP1, torch.compile
_WRAPPED = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")


def keeps_forward(module: Any, name: str = "forward") -> bool:
    """Whether a module has no forward but that of its class, which accelerate's hooks leave on it."""
    own = vars(module).get(name)
    return own is None or getattr(own, "__func__", None) is type(module).forward


def exact(module: nn.Module, *kinds: type) -> bool:
    """Whether a module computes what its class does from its parameters, unseen: no hook, no forward of its own, not
    compiled by itself, plain parameters. Only then may an operator compute it instead.
    """
    if type(module) not in kinds or not keeps_forward(module) or module._compiled_call_impl is not None or watched():
        return False
    seen = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not seen and all(p is None or type(p) is nn.Parameter for p in module._parameters.values())


def watched() -> bool:
    """Whether there are hooks of every module, but for those of torch's FLOP counter, which look at names alone."""
    if not any(_EVERYWHERE):
        return False
    hooks = [hook for everywhere in _EVERYWHERE for hook in everywhere.values()]
    return any(not isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


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

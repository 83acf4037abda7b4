"""Whether anything looks at a module, so that it must be called and nothing else may compute what it does."""

from typing import Any

from torch import nn

_EVERYWHERE: tuple[dict[int, Any], ...] = (
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_backward_pre_hooks,
    nn.modules.module._global_backward_hooks,
)


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
    from torch.utils.module_tracker import ModuleTracker

    hooks = [hook for everywhere in _EVERYWHERE for hook in everywhere.values()]
    return any(not isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)

"""Classes of patched modules: derived from a module's own, under the same name, and taken off again."""

import inspect
import types
from functools import lru_cache
from typing import Any, ClassVar

import torch

from .modules import plain_of


class Patched:
    """What every class made by `dressed` has; it copies and pickles as the plain class and what made it another.

    A new one is of the plain class, as nothing in it is patched: `type(model).from_pretrained` gives a plain model.
    """

    tokenops_made: ClassVar[tuple[Any, ...]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "tokenops_made" in vars(type(self)):  # not a class that was derived since, of parametrized modules say
            self.__class__ = type(self).tokenops_made[0]
            self.__init__(*args, **kwargs)  # type: ignore[misc]
        else:
            super().__init__(*args, **kwargs)

    def tokenops_dress(self, other: Any) -> Any:
        """Give a module, which is to stand in this one's place, what `dressed` put before its class; returns it."""
        dress(other, *type(self).tokenops_made[1:])
        return other

    def __prepare_scriptable__(self) -> Any:
        raise ValueError("a patched model cannot be scripted: use torch.export or torch.jit.trace")

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        return (_remade, type(self).tokenops_made, *made[2:]) if made[1][:1] == (type(self),) else made


@lru_cache(maxsize=4096)
def dressed(
    plain: type, mixins: tuple[type, ...], family: Any = None, setting: str | None = None, role: Any = None
) -> Any:
    """The class of a patched module: the plain one with mixins before it, under the same name.

    Those of other roles have a forward with code of its own: a compiler keeps only so many variants of one code.
    """
    made = (plain, mixins, family, setting, role)
    space: dict[str, Any] = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "tokenops_made": made,
        "tokenops_family": family,
    }
    if setting is not None:
        space[setting] = property(lambda self: self.tokenops_patch.method.value, lambda self, value: _set(self, value))
    forward = mixins[0].__dict__.get("forward") if mixins else None
    if forward is not None:
        code = types.FunctionType(
            forward.__code__.replace(), forward.__globals__, "forward", forward.__defaults__, forward.__closure__
        )
        code.__kwdefaults__ = forward.__kwdefaults__
        code.__signature__ = inspect.signature(plain.forward)  # type: ignore[attr-defined]  # which trainers look at
        space["forward"] = code
    return type(plain.__name__, (*mixins, Patched, plain), space)


def _remade(*made: Any) -> Any:
    return object.__new__(dressed(*made))


def _set(model: Any, value: Any) -> None:
    around = vars(model).get("tokenops_within")
    if around is not None:
        given = f"{model.tokenops_patch.method.setting}={value!r}"
        raise ValueError(f"{given} was set on the {type(model).__name__} within: set it on the {around} around")
    model.tokenops_patch.set(model, value)


def dress(
    module: Any, mixins: tuple[type, ...], family: Any = None, setting: str | None = None, role: Any = None
) -> None:
    """Give a module the class that `dressed` makes of its own."""
    before = type(module)
    module.__class__ = dressed(plain_of(module), mixins, family, setting, role)
    _rebind(module, before)


def dress_as(module: Any, other: Any) -> Any:
    """A module that is to stand in another's place, patched if that one is."""
    return other.tokenops_dress(module) if isinstance(other, Patched) else module


def undress(module: Any) -> None:
    """Give a module its own class back."""
    if isinstance(module, Patched):
        before: Any = type(module)
        module.__class__ = before.tokenops_made[0]
        _rebind(module, before)


def refuse_wrapped(module: Any) -> None:
    """ValueError where a module has another class since it was patched."""
    if isinstance(module, Patched) and "tokenops_made" not in vars(type(module)):
        raise ValueError(
            f"remove_patch: {type(module).__name__} was wrapped after the patch (by fully_shard, say): take that off"
            " first, or make the model anew"
        )


def _rebind(module: Any, before: Any) -> None:
    """Accelerate's hooks call the forward they found, a method of the class that was, and leave it where they were."""
    for name in ("_old_forward", "forward"):
        if getattr(vars(module).get(name), "__func__", None) is before.forward:
            setattr(module, name, types.MethodType(type(module).forward, module))


def place_of(module: Any) -> torch.device:
    """Where a module computes: accelerate's hooks may keep its weights elsewhere."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    said = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in said if device is not None), next(module.parameters()).device))

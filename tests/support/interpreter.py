"""Triton's interpreter without what it does again and again, a third of its time on our kernels; masks as 3.9 needs."""

import sys


def patch_once() -> None:
    """A launch makes the functions of triton.language its interpreter's; a call of a device function within it does so
    anew, and takes nothing back. Here it does so only for a module of which the launch has not yet."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    tl, original = interpreter.tl, interpreter._patch_lang
    launch = interpreter.GridExecutor.__call__.__code__
    patched: set[int] = set()

    def patch(function):
        modules = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if sys._getframe(1).f_code is launch:
            patched.clear()
        elif modules and modules <= patched:
            return None
        patched.update(modules)
        return original(function)

    interpreter._patch_lang = patch

    splat = interpreter.InterpreterBuilder.create_splat

    def keeps_bool(builder, kind, scalar):
        """A comparison of scalars becomes integers there, which Triton 3.9 takes for no mask."""
        made = splat(builder, kind, scalar)
        if scalar.data.dtype == bool:
            made.data = made.data.astype(bool)
        return made

    interpreter.InterpreterBuilder.create_splat = keeps_bool

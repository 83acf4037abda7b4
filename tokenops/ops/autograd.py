"""How operators meet autograd: when it has to know of a call, gradients by kernels, and the gradients of those."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Tensors = Sequence[Tensor | None]


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to know of a call: an autograd.Function costs more than a small kernel.

    Within a transform of torch.func it always has to: what vmap hands on does not say whether it needs a gradient.
    Under forward-mode differentiation too, and it says that it cannot do that. torch.jit.trace cannot save one.
    """
    if torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active():
        if torch.compiler.is_dynamo_compiling():  # it takes an autograd.Function for its forward pass alone there
            torch._dynamo.graph_break(msg="tokenops: within torch.func operators run as they are, not compiled")
        return True
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def apart(tensor: Tensor) -> Tensor:
    """Unknown to autograd; itself where that is so already, but in a trace, whose graphs must be alike."""
    return tensor.detach() if tensor.requires_grad or torch.jit.is_tracing() else tensor


def distinct(arguments: Sequence[Any]) -> list[Any]:
    """The same arguments, tensors that came before as views: torch.compile gives autograd.Function no tensor twice."""
    repeated = [isinstance(a, Tensor) and any(a is b for b in arguments[:i]) for i, a in enumerate(arguments)]
    return [a.view_as(a) if again else a for a, again in zip(arguments, repeated)]


class Operator(torch.autograd.Function):
    """An operator whose kernels torch.vmap can run (vmap.py): vmap then needs no more than these."""

    generate_vmap_rule = True
    _at_once: Any

    def __init_subclass__(cls) -> None:
        """A twin that does without `setup_context`, for which torch binds a signature at every call (90 us of 100)."""

        def forward(ctx, *arguments):
            results = cls.forward(*arguments)
            cls.setup_context(ctx, arguments, results)
            return results

        methods = {"forward": staticmethod(forward), "backward": staticmethod(cls.backward)}
        cls._at_once = type(cls.__name__, (torch.autograd.Function,), methods)

    @classmethod
    def of(cls, *arguments: Any) -> Any:
        """What `apply` gives, a tensor given twice as well."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return cls.apply(*distinct(arguments))
        return cls._at_once.apply(*arguments)


def gradients(
    ctx: Any,
    run: Callable[[Tensors, Tensors, Tensors], Sequence[Tensor | None]],
    plain: Callable[[Tensors, Tensors], Sequence[Tensor | None]],
    inputs: dict[int, Tensor | None],
    cotangents: Tensors,
    constants: Tensors = (),
) -> list[Tensor | None]:
    """The gradients of an operator's inputs, by a kernel; None for those that need none.

    Where they are differentiated again (create_graph, and always within torch.func), theirs are those of the reference.

    Args:
        ctx: of the operator's backward pass.
        run: (inputs, cotangents, constants) to the gradient of each input, by the kernel.
        plain: (inputs, constants) to the operator's results, one a cotangent, by the reference.
        inputs: what may need a gradient, by its place among the operator's arguments.
        cotangents: the gradients of the results; None for those that have none.
        constants: other tensors that run and plain take: under vmap they may use none but those they are given.
    """
    wanted = tuple(t is not None and bool(ctx.needs_input_grad[place]) for place, t in inputs.items())
    tensors = tuple(inputs.values())
    found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if not any(wanted) or all(t is None for t in cotangents):
        return found
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        sizes = len(tensors), len(cotangents)
        made = iter(_Gradients.apply(run, plain, wanted, sizes, *tensors, *cotangents, *constants))
    else:
        made = (g for g, want in zip(run(tensors, cotangents, constants), wanted) if want)
    for place, want in zip(inputs, wanted):
        if want:
            found[place] = next(made)
    return found


def zeros_like_tokens(dy: Any, rows: int) -> Any:
    """Tokens for an operator that is linear in them: what they are is no matter for its gradients. No memory."""
    return None if dy is None else dy.new_zeros(()).expand(dy.shape[0], rows, dy.shape[2])


class _Gradients(torch.autograd.Function):
    """The gradients that are wanted, as a function of all that they depend on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(run, plain, wanted, sizes, *tensors):
        return tuple(g for g, want in zip(run(*_split(tensors, sizes)), wanted) if want)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.plain, ctx.wanted, ctx.sizes, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *seconds):
        tensors = list(ctx.saved_tensors)
        free = [i for i in range(sum(ctx.sizes)) if tensors[i] is not None and ctx.needs_input_grad[4 + i]]

        def first(*values):
            given = list(tensors)
            for i, value in zip(free, values):
                given[i] = value
            inputs, cotangents, constants = _split(given, ctx.sizes)

            def results(*some):
                some = iter(some)
                made = ctx.plain([next(some) if w else t for t, w in zip(inputs, ctx.wanted)], constants)
                return tuple(y for y, dy in zip(made, cotangents) if dy is not None)

            _, pull = torch.func.vjp(results, *(t for t, w in zip(inputs, ctx.wanted) if w))
            return pull(tuple(dy for dy in cotangents if dy is not None))

        _, pull = torch.func.vjp(first, *(tensors[i] for i in free))
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for i, gradient in zip(free, pull(seconds)):
            found[4 + i] = gradient
        return tuple(found)


def _split(tensors: Tensors, sizes: tuple[int, int]) -> tuple[Tensors, Tensors, Tensors]:
    inputs, cotangents = sizes
    return tensors[:inputs], tensors[inputs : inputs + cotangents], tensors[inputs + cotangents :]

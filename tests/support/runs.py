"""A call of an operator with all its gradients, by name, and the same in fp64."""

import torch


def double(tensors):
    floats = {name: t.double() for name, t in tensors.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    return {**tensors, **floats}


def differentiated(function, tensors, learned, upstream=None):
    """(results, gradients, the results' own gradients) by name, of a function of tensors by name to results by name;
    the tensors of `learned` get gradients, and the results' are random unless given."""
    leaves = {n: tensors[n].detach().requires_grad_() for n in learned if n in tensors}
    results = {n: t for n, t in function({**tensors, **leaves}).items() if t is not None}
    if upstream is None:
        upstream = {n: torch.randn_like(t) for n, t in results.items() if t.is_floating_point()}
    dependent = {n: t for n, t in results.items() if t.requires_grad}
    gradients = torch.autograd.grad(
        list(dependent.values()),
        list(leaves.values()),
        [upstream[n].to(t.dtype) for n, t in dependent.items()],
        allow_unused=True,
        materialize_grads=True,
    )
    results = {n: t.detach() for n, t in results.items()}
    return results, {f"d{n}": t for n, t in zip(leaves, gradients, strict=True)}, upstream

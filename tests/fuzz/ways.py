"""Ways of calling an operator: each gives the results and gradients of one call, or of several at once."""

import torch

from tokenops.ops import backends


def leaves_of(call, tensors, subset):
    """The tensors by name, those of `subset` asking for gradients; one that has two names is one leaf."""
    made = {}
    for t in tensors.values():
        wanted = any(other in subset and tensors[other] is t for other in tensors)
        made.setdefault(id(t), t.detach().requires_grad_() if wanted else t)
    leaves = {name: made[id(t)] for name, t in tensors.items()}
    return leaves, {name: leaf for name, leaf in leaves.items() if name in subset}


def outputs(results, upstream):
    return [name for name in results if name in upstream and results[name].requires_grad]


def eager(call, api, tensors, subset, upstream):
    leaves, wanted = leaves_of(call, tensors, subset)
    results = call.invoke(api, leaves)
    names = outputs(results, upstream)
    gradients = {}
    if names and wanted:
        given = [upstream[n].to(results[n].dtype) for n in names]
        found = torch.autograd.grad([results[n] for n in names], list(wanted.values()), given, allow_unused=True)
        gradients = dict(zip(wanted, found))
    return {n: t.detach() for n, t in results.items()}, gradients


def backward(call, api, tensors, subset, upstream):
    leaves, wanted = leaves_of(call, tensors, subset)
    results = call.invoke(api, leaves)
    names = outputs(results, upstream)
    if names:
        torch.autograd.backward([results[n] for n in names], [upstream[n].to(results[n].dtype) for n in names])
    return {n: t.detach() for n, t in results.items()}, {n: leaf.grad for n, leaf in wanted.items()}


def twice(call, api, tensors, subset, upstream):
    """The gradients of the gradients, of their sum times numbers that follow from their places."""
    leaves, wanted = leaves_of(call, tensors, subset)
    results = call.invoke(api, leaves)
    names = outputs(results, upstream)
    if not names or not wanted:
        return {n: t.detach() for n, t in results.items()}, {}
    given = [upstream[n].to(results[n].dtype) for n in names]
    options = {"allow_unused": True, "materialize_grads": True}
    firsts = torch.autograd.grad(
        [results[n] for n in names], list(wanted.values()), given, create_graph=True, **options
    )
    gradients = dict(zip(wanted, firsts))
    again = {n: g for n, g in gradients.items() if g.requires_grad}
    if again:
        places = [torch.arange(g.numel()).remainder(5).sub(2).reshape(g.shape).to(g.dtype) for g in again.values()]
        seconds = torch.autograd.grad(list(again.values()), list(wanted.values()), places, **options)
        gradients |= {f"second {n}": g for n, g in zip(wanted, seconds)}
    return {n: t.detach() for n, t in results.items()}, {n: g.detach() for n, g in gradients.items()}


def no_grad(call, api, tensors, subset, upstream):
    with torch.no_grad():
        return call.invoke(api, leaves_of(call, tensors, subset)[0]), {}


def inference(call, api, tensors, subset, upstream):
    with torch.inference_mode():
        return {n: t.clone() for n, t in call.invoke(api, dict(tensors)).items()}, {}


def autocast(call, api, tensors, subset, upstream):
    """It changes no dtype. Gradients of torch's own operators it does change, so the reference's are made outside."""
    within = torch.autocast("cpu", dtype=torch.bfloat16)
    if backends.forced() == "reference":
        return eager(_Within(call, within), api, tensors, subset, upstream)
    with within:
        return eager(call, api, tensors, subset, upstream)


class _Within:
    """A call that is made in a context."""

    def __init__(self, call, context):
        self.call, self.context = call, context

    def __getattr__(self, name):
        return getattr(self.call, name)

    def invoke(self, *arguments):
        with self.context:
            return self.call.invoke(*arguments)


def functional(call, api, tensors, subset, upstream):
    """torch.func.grad, of the sum of the results times their upstream gradients."""
    unique = {id(tensors[n]): n for n in subset}
    if not unique:
        return no_grad(call, api, tensors, subset, upstream)

    def loss(leaves, others):
        given = {n: leaves[unique[id(t)]] if id(t) in unique else others.get(n, t) for n, t in tensors.items()}
        results = call.invoke(api, given)
        products = [(results[n].double() * u.double()).sum() for n, u in upstream.items() if n in results]
        return sum(products, torch.zeros((), dtype=torch.float64)), results

    gradients, results = torch.func.grad(loss, has_aux=True)({n: tensors[n] for n in unique.values()}, {})
    return results, {n: gradients[unique[id(tensors[n])]] for n in subset}


def compiled(call, api, tensors, subset, upstream):
    torch._dynamo.reset()
    invoke = torch.compile(lambda given: call.invoke(api, given), fullgraph=True, backend="aot_eager")
    return eager(Replaced(invoke), api, tensors, subset, upstream)


class Replaced:
    def __init__(self, invoke):
        self.invoke = lambda api, given: invoke(given)


def variant(call, tensors, number, names):
    """The tensors again; where number is odd, those of `names` the other way round along their last dimension (but if
    there is NaN, which has its place)."""
    turned = number % 2 and not any(t.isnan().any() for t in tensors.values())
    made = {}
    for t in tensors.values():
        flips = turned and t.dim() and any(tensors[n] is t for n in names)
        made.setdefault(id(t), t.flip(-1) if flips else t)
    return {name: made[id(t)] for name, t in tensors.items()}


def mapped(call, api, tensors, subset, upstream, names, count, dims, derivative):
    """torch.vmap over `count` variants: of the call, or of its gradient, which makes gradients of each sample."""
    unique = {id(tensors[n]): n for n in names}
    stacks = {
        n: torch.stack([variant(call, tensors, i, names)[n] for i in range(count)], dims[n]) for n in unique.values()
    }

    def one(batched):
        given = {n: batched[unique[id(t)]] if id(t) in unique else t for n, t in tensors.items()}
        # one that has two names is one tensor in here, too
        inner = Replaced(None)
        inner.invoke = call.invoke
        return (functional if derivative else plainly)(inner, api, given, subset, upstream)

    results, gradients = torch.vmap(one, in_dims=({n: dims[n] for n in stacks},))(stacks)
    each = []
    for i in range(count):
        each.append(({n: t[i] for n, t in results.items()}, {n: t[i] for n, t in gradients.items()}))
    return each


def plainly(call, api, tensors, subset, upstream):
    return call.invoke(api, tensors), {}


WAYS = {"eager": eager, "backward": backward, "no_grad": no_grad, "inference": inference, "autocast": autocast}
WAYS |= {"functional": functional, "compiled": compiled, "twice": twice}

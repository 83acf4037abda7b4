"""What has to be refused, in words, on every backend: one argument of a good call made bad."""

import torch


class Seen:
    """An error that only a look at values finds: on a GPU, for which interpreted Triton stands, nobody waits for it."""

    def __init__(self, error):
        self.error = error


#: operator -> (which tensor, what becomes of it, what is raised)
CHANGES = {
    "soft_aggregate": (
        ("x", lambda t: t[0], ValueError),
        ("w", lambda t: t.int(), TypeError),
        ("w", lambda t: torch.cat([t, t[:, :1]], dim=1), ValueError),
        ("mask", lambda t: t.int(), TypeError),
        ("mask", lambda t: t[:, 1:], ValueError),
        ("scale", lambda t: torch.ones(2), ValueError),
    ),
    "soft_scatter": (("z", lambda t: t[:, 1:], ValueError), ("w", lambda t: t.bool(), TypeError)),
    "token_mlp": (
        ("w1", lambda t: t[:, 1:], ValueError),
        ("w2", lambda t: t.T[1:].T, ValueError),
        ("b1", lambda t: t[1:], ValueError),
        ("b2", lambda t: t.double() if t.dtype != torch.float64 else t.float(), TypeError),
    ),
    "masked_channel_attention": (
        ("k", lambda t: t[:, :, 1:], ValueError),
        ("q", lambda t: t.double() if t.dtype != torch.float64 else t.float(), TypeError),
        ("v", lambda t: t[:, :, :, :0], ValueError),
        ("key_lengths", lambda t: t * 0 + 100, Seen(ValueError)),
        ("key_lengths", lambda t: t * 0 - 1, Seen(ValueError)),
        ("key_lengths", lambda t: t.float(), TypeError),
        ("key_bias", lambda t: t[..., 1:], ValueError),
    ),
    "select_tokens": (
        ("scores", lambda t: t[:, 1:], ValueError),
        ("scores", lambda t: t.long(), TypeError),
        ("counts", lambda t: t.int(), TypeError),
        ("weight", lambda t: t[1:], ValueError),
    ),
    "restore_tokens": (
        ("index", lambda t: t.int(), TypeError),
        ("index", lambda t: t * 0 + 100, Seen(IndexError)),
        ("index", lambda t: t * 0 - 2, Seen(IndexError)),
        ("index", lambda t: t * 0 if t.shape[1] > 1 else t * 0 + 100, Seen(IndexError)),  # twice there
        ("tokens", lambda t: t[:, :, 1:], ValueError),
        ("tokens", lambda t: t.double() if t.dtype != torch.float64 else t.float(), TypeError),
    ),
    "merge_neighbours": (
        ("x", lambda t: t[:, 1:], ValueError),
        ("logits", lambda t: t[:, 1:], ValueError),
        ("sizes", lambda t: t.int(), TypeError),
        ("bias", lambda t: t.int(), TypeError),
    ),
    "unmerge_neighbours": (("x", lambda t: t[:, 1:], ValueError), ("x", lambda t: t.int(), TypeError)),
    "match_bipartite": (("metric", lambda t: t[0], ValueError), ("metric", lambda t: t.int(), TypeError)),
    "merge_bipartite": (
        ("metric", lambda t: t[:, 1:], ValueError),
        ("sizes", lambda t: t[:, 1:], ValueError),
        ("x", lambda t: t.int(), TypeError),
    ),
    "unmerge_bipartite": (
        ("index", lambda t: t * 0 + 100, Seen(IndexError)),
        ("index", lambda t: t * 0 - 1, Seen(IndexError)),
        ("index", lambda t: t.int(), TypeError),
    ),
    "tome": (("x", lambda t: t[:, 1:], ValueError), ("metric", lambda t: t[0], ValueError)),
}


def of(call, number, backend):
    """(tensors, what is raised) of a change that the call has the tensor for, and which makes it bad; or None."""
    changes = [c for c in CHANGES[call.operator] if c[0] in call.tensors]
    if not changes or any(0 in t.shape for t in call.tensors.values()):
        return None
    name, change, error = changes[number % len(changes)]
    if isinstance(error, Seen):
        if backend == "triton":
            return None
        error = error.error
    old = call.tensors[name]
    if sum(t is old for t in call.tensors.values()) > 1:
        return None
    return {**call.tensors, name: change(old)}, error

"""Run by tests/ops/test_host.py in a process that does not interpret: what launches would be, and nothing compiles.

`python -m support.launched CHECK`: a line of JSON of what was found.
"""

import functools
import itertools
import json
import random
import sys
from collections import defaultdict
from contextlib import contextmanager
from unittest.mock import patch

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

import kernel_cases
import tokenops
from host import IdleDriver, idle
from tokenops.ops.triton.masked_channel_attention import masked_channel_attention_fwd
from tokenops.ops.triton.masked_channel_attention_bwd import masked_channel_attention_bwd
from tokenops.ops.triton.match_bipartite import match_bipartite_fwd
from tokenops.ops.triton.merge_bipartite import (
    merge_bipartite_bwd,
    merge_bipartite_fwd,
    unmerge_bipartite_bwd,
    unmerge_bipartite_fwd,
)
from tokenops.ops.triton.merge_neighbours import merge_neighbours_bwd, merge_neighbours_fwd
from tokenops.ops.triton.restore_tokens import restore_tokens_bwd, restore_tokens_fwd
from tokenops.ops.triton.select_tokens import select_tokens_bwd, select_tokens_fwd
from tokenops.ops.triton.soft_aggregate import soft_aggregate_bwd, soft_aggregate_fwd


class Launched:
    """A launch that reached the driver: by which way, of which kernel as specialised, on what."""

    def __init__(self, grid, stream, function, packed, metadata, enter, leave, *arguments):
        self.grid, self.function, self.enter, self.leave, self.metadata = grid, function, enter, leave, metadata
        self.direct = not any(isinstance(a, torch.Tensor) for a in arguments)
        self.arguments = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]

    def like(self, other, mine):
        """Whether it is the same kernel on the same arguments, but for the addresses of results (not of `mine`)."""

        def visible(launched):
            return [a if not isinstance(a, int) or a < 2**32 or a in mine else a % 16 for a in launched.arguments]

        return (self.function, self.grid, visible(self)) == (other.function, other.grid, visible(other))


@contextmanager
def recorded(capability=90):
    """Yields the list of launches that reach the driver; nothing is compiled, whatever Triton tells apart is."""
    found = []

    def compiled(source, target=None, options=None, _env_vars=None):
        made = CompiledKernel.__new__(CompiledKernel)
        kind = source.signature, source.constants, source.attrs, options
        made.module, made.packed_metadata, made.src, made.name = None, (), source, source.fn.__name__
        made.function = made.name, repr([sorted(part.items()) for part in kind])
        made._run = lambda x, y, z, *rest: found.append(Launched((x, y, z), *rest))
        return made

    with (
        idle(capability),
        patch.object(triton.compiler, "compile", compiled),
        patch.object(CompiledKernel, "_init_handles", lambda self: None),
    ):
        yield found


def plainly(kernel, grid):
    return functools.partial(kernel.run, grid=grid, warmup=False)


def ran(found, call):
    found.clear()
    call()
    return list(found)


def three_times(found, call, given):
    """Whether Triton's way and ours launch the same, the first time and later; and which kernels went our way."""
    with patch.object(JITFunction, "__getitem__", plainly):
        expected = ran(found, call)
    for launches in (ran(found, call), ran(found, call)):
        assert len(launches) == len(expected)
        for launched, other in zip(launches, expected):
            assert launched.like(other, given), (launched.function, launched.arguments, other.function, other.arguments)
    return {launched.function[0]: launched.direct for launched in launches}


class Memory:
    """Makes tensors that begin anywhere, in any order in memory; knows where they are."""

    def __init__(self, seed):
        self.random, self.given = random.Random(seed), []

    def __call__(self, *shape, dtype=torch.bfloat16, ordered=True):
        order = list(range(len(shape)))
        if not ordered:
            self.random.shuffle(order)
        begin = self.random.choice((0, 0, 0, 1, 8, 16))
        memory = torch.empty(torch.Size(shape).numel() + begin, dtype=dtype)[begin:]
        tensor = memory.view([shape[i] for i in order]).permute([order.index(i) for i in range(len(shape))])
        self.given.append(tensor)
        return tensor

    def addresses(self):
        return {t.data_ptr() for t in self.given}


def of_cases():
    """Every case of kernel_cases.py, of tensors that begin anywhere."""
    found_direct = {}
    with recorded() as found:
        for operator, dtype in itertools.product(kernel_cases.CASES, (torch.bfloat16, torch.float32)):
            for seed in range(4):
                memory = Memory(seed)
                with patch.object(kernel_cases, "_meta", memory):
                    for _, run in kernel_cases.CASES[operator](dtype):
                        found_direct |= three_times(found, run, memory.addresses())
    return found_direct


def some_call(memory):
    """A launcher with arguments, of sizes that a specialisation may tell apart."""
    pick = memory.random.choice
    dtype = pick((torch.bfloat16, torch.float16, torch.float32, torch.float64))
    B, N, C, P = pick((1, 2, 16)), pick((1, 2, 15, 16, 31, 32, 33)), pick((1, 3, 16, 17, 48)), pick((0, 1, 2))
    new = functools.partial(memory, dtype=dtype, ordered=pick((True, False)))
    k = memory.random.randint(1, N)
    index = memory(B, k, dtype=torch.int64, ordered=pick((True, False)))
    kinds = [pick((torch.float32, torch.int64, torch.bool)) for _ in range(memory.random.randint(0, 4))]
    operator = memory.random.randint(0, 11)
    if operator == 0:
        olds, news = [memory(B, N, dtype=d) for d in kinds], [memory(B, k, dtype=d) for d in kinds]
        tokens = new(B, pick((k, P + k)), C)
        return functools.partial(restore_tokens_fwd, new(B, P + N, C), tokens, index, P, olds, news)
    if operator == 1:
        given = [memory(B, N, dtype=d, ordered=False) for d in kinds]
        return functools.partial(restore_tokens_bwd, new(B, P + N, C), index, P, pick((0, P)), given)
    sizes = pick((None, memory(B, P + N, dtype=torch.float32, ordered=False)))
    norm, tokens = pick((False, True)), memory.random.randint(1, N)
    weight, bias = (pick((None, memory(C, dtype=torch.float32))) if norm else None for _ in range(2))
    if operator in (8, 9):
        rest, counts = pick(("none", "mean", "weighted", "normalized")), pick((None, memory(B, dtype=torch.int64)))
        x, scores = new(B, P + N, C), memory(B, N, dtype=pick((dtype, torch.float32)), ordered=False)
        given = [memory(B, N if operator == 8 else k, dtype=d, ordered=False) for d in kinds]
        if operator == 8:
            arguments = (k, counts, given, weight, bias, P, rest, pick((False, True)), norm, 1e-6)
            return functools.partial(select_tokens_fwd, x, scores, *arguments)
        fused = memory(B, 1 + C, dtype=torch.promote_types(dtype, torch.float32)) if rest == "normalized" else None
        x = x if rest in ("weighted", "normalized") else None
        dtokens = new(B, P + k + (rest != "none"), C)
        return functools.partial(select_tokens_bwd, dtokens, given, index, scores, counts, x, fused, P, rest)
    index = memory(B, N, dtype=torch.int64)
    if operator == 2:
        x, eps = new(B, P + N, C), memory.random.random()
        return functools.partial(merge_bipartite_fwd, x, index, tokens, sizes, weight, bias, P, norm, eps)
    if operator == 3:
        merged = memory(B, P + tokens, dtype=torch.float32)
        return functools.partial(merge_bipartite_bwd, new(B, P + tokens, C), index, sizes, merged, P)
    if operator == 4:
        return functools.partial(unmerge_bipartite_fwd, new(B, P + tokens, C), index, P)
    if operator == 5:
        return functools.partial(unmerge_bipartite_bwd, new(B, P + N, C), index, tokens, P)
    if operator in (10, 11):
        scale, mask = pick((None, memory(1, dtype=dtype))), pick((None, memory(B, N, dtype=torch.bool, ordered=False)))
        x, w, factor = new(B, P + N, C), new(B, N, tokens), pick((1, 16, 0.5))
        if operator == 10:
            return functools.partial(soft_aggregate_fwd, x, w, scale, factor, mask, P)
        dy, y = new(B, P + tokens, C), memory(B, P + tokens, C, dtype=dtype)
        stats = memory(3, B, tokens, dtype=torch.promote_types(dtype, torch.float32))
        return functools.partial(soft_aggregate_bwd, dy, x, w, scale, factor, mask, y, stats, P)
    H, W, vertical = memory.random.randint(1, 5), pick((1, 2, 4, 16)), pick((False, True))
    one = memory(pick((1, C)), dtype=torch.float32)
    first, second, logits = pick(((None, None, None), (one, None, None), (one, one, None), (None, None, new(B, H * W))))
    sizes = pick((None, memory(B, H * W, dtype=torch.float32)))
    numbers = memory.random.choice((0, 1, 16, 0.5)), memory.random.random()
    if operator == 6:
        arguments = (first, second, logits, sizes, weight, bias, H, W, vertical, P, *numbers, norm, 1e-6)
        return functools.partial(merge_neighbours_fwd, new(B, P + H * W, C), *arguments)
    rows = P + ((H + 1) // 2 * W if vertical else H * ((W + 1) // 2))
    x = None if first is None and logits is None else new(B, P + H * W, C)
    arguments = (first, second, logits, sizes, H, W, vertical, P, *numbers)
    return functools.partial(merge_neighbours_bwd, new(B, rows, C), x, *arguments)


def of_random_calls():
    """Random arguments, many of whose plans come again with pointers elsewhere."""
    found_direct = {}
    with recorded() as found:
        for seed in range(1500):
            memory = Memory(seed)
            found_direct |= three_times(found, some_call(memory), memory.addresses())
    return found_direct


#: rows of DeiT-S that are left block by block: ToMe's, and EViT's in three blocks
LENGTHS = (range(197, 41, -13), (197, 140, 100, 72))


def of_lengths():
    """How many kernels of each name the lengths of a method need, forward and backward, of one image and of many."""
    kinds = defaultdict(set)
    channels = torch.empty(384)
    with recorded() as found:
        for B, lengths in itertools.product((1, 2, 256), LENGTHS):
            for rows, left in itertools.pairwise(lengths):
                x, sizes = (torch.empty(B, rows, *size, dtype=torch.bfloat16) for size in ((384,), ()))
                index, kept = (torch.empty(B, n - 1, dtype=torch.int64) for n in (rows, left))
                parameters = channels, channels, 1, True, 1e-6
                y, merged, *_ = merge_bipartite_fwd(x, index, left - 1, sizes.float(), *parameters)
                merge_bipartite_bwd(y, index, sizes.float(), merged, 1)
                match_bipartite_fwd(x[:, :, :64], rows - left, 1)
                qkv = torch.empty(B, rows, 3, 6, 64, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4).unbind(0)
                optional = None, None, sizes.float()[:, None].expand(B, 6, rows), None
                out, _, lse, _ = masked_channel_attention_fwd(*qkv, *optional, 0.125, "none", False, True)
                arguments = (*qkv, *optional, out, lse, 0.125, "none", False)
                masked_channel_attention_bwd(out, None, None, *arguments)
                restored, _ = restore_tokens_fwd(x, y, kept, 1, [sizes[:, 1:]], [sizes[:, 1:left]])
                restore_tokens_bwd(restored, kept, 1, 1, [sizes[:, 1:]])
                scores, options = sizes[:, 1:].float(), (1, "normalized")
                arguments = (left - 1, None, [sizes[:, 1:]], *parameters[:2], *options, False, True, 1e-6)
                tokens, chosen, _, _, fused, (y,) = select_tokens_fwd(x, scores, *arguments)
                select_tokens_bwd(tokens, [y], chosen, scores, None, x, fused, *options)
        for grid in ((14, 14), (14, 7), (7, 7), (7, 4)):
            x, sizes = (torch.empty(3, grid[0] * grid[1] + first, *size) for first, size in ((1, (384,)), (0, ())))
            arguments = (None, None, None, sizes)
            y, *_ = merge_neighbours_fwd(x, *arguments, channels, channels, *grid, False, 1, 0.5, 0.5, True, 1e-6)
            merge_neighbours_bwd(y, None, *arguments, *grid, False, 1, 0.5, 0.5)
        for launched in found:
            kinds[launched.function[0]].add(launched.function)
    return {name: len(of_name) for name, of_name in kinds.items()}


def hooks_and_tools():
    """What sees a launch that goes our way: a profiler's hooks and what replaces Triton's way; and what ends it."""
    call = functools.partial(unmerge_bipartite_fwd, torch.empty(2, 5, 16), torch.empty(2, 9, dtype=torch.int64), 1)
    seen = {}
    with recorded() as found:
        call()
        seen["direct"] = [launched.direct for launched in ran(found, call)]
        seen["hooks"] = [found[-1].enter is not None, found[-1].leave is not None]
        hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        for chain in hooks:
            chain.add(print)
        (hooked,) = ran(found, call)
        seen["hooked"] = [hooked.direct, hooked.enter is not None, hooked.leave is not None]
        seen["metadata"] = hooked.metadata.get()["name"]
        for chain in hooks:
            chain.remove(print)
        with patch.object(JITFunction, "__getitem__", lambda kernel, grid: lambda *args, **kwargs: grids.append(grid)):
            grids = []
            seen["replaced"] = len(ran(found, call)), len(grids)
        knobs.runtime.debug = True
        seen["debug"] = [launched.direct for launched in ran(found, call)]
        knobs.runtime.debug = False
        with patch.object(triton.runtime.driver, "_active", IdleDriver(80)):  # another GPU
            seen["elsewhere"] = [launched.direct for launched in ran(found, call)]
        meta = functools.partial(unmerge_bipartite_fwd, *(t.to("meta") for t in call.args[:2]), 1)
        seen["without memory"] = len(ran(found, meta))
    return seen


def ahead():
    """What `warm_up` foresees of ToMe in a small model, and what the model launches then and later."""
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3).to(torch.bfloat16)
    tokenops.apply_patch(model, "tome", r=3)
    image = torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)
    before = torch.random.get_rng_state()
    with recorded() as found:
        warm = tokenops.warm_up(model.train(), image, workers=2)
        ready = warm.kernels
        kinds = {launched.function for launched in found}
        model(image).float().sum().backward()
        later = {launched.function for launched in found} - kinds
    same = bool((before == torch.random.get_rng_state()).all())
    return {"ready": ready, "launched": len(kinds), "later": len(later), "unforeseen": warm.unforeseen, "random": same}


CHECKS = {check.__name__: check for check in (of_cases, of_random_calls, of_lengths, hooks_and_tools, ahead)}

if __name__ == "__main__":
    print(json.dumps(CHECKS[sys.argv[1]]()))

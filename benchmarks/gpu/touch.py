"""Launches every kernel of tokenops once or twice at small, odd sizes, forward and backward; compares nothing.

What a sanitizer looks at (sanitize.py). Waits after each case and prints a line "touched {...}", so that a hang or a
failure is located. `python -m gpu.touch --device cpu` runs the Triton kernels interpreted.
"""

import argparse
import faulthandler
import json
import os
import re
import time
from contextlib import contextmanager
from unittest.mock import patch

if __name__ == "__main__" and "TRITON_INTERPRET" not in os.environ:
    raise SystemExit("set TRITON_INTERPRET: 0 for a GPU, 1 for a CPU")

import torch
import triton
import triton.language as tl
from triton.runtime.jit import KernelInterface

import tokenops
from tokenops.ops.backends import TABLE

BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64


class Inputs:
    """Random tensors that want gradients; `apart` puts the rows apart, `turned` makes the channels the slow axis."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device = device
        self.B, self.C, self.heads = (1, 35, 1) if tiny else (2, 193, 2)
        self.many = 30 if tiny else 300  # tokens: on a GPU more than a block has threads

    def leaf(self, *shape, dtype=FP32, apart=False, turned=False):
        if turned:
            given = torch.randn(*shape[:-2], shape[-1], shape[-2], device=self.device).to(dtype).transpose(-1, -2)
        else:
            given = torch.randn(*shape[:-1], shape[-1] + 3 * apart, device=self.device).to(dtype)[..., : shape[-1]]
        return given.requires_grad_()

    def each(self, *values):
        """One of each image."""
        return torch.tensor(values[: self.B], device=self.device)

    def norm(self, C):
        return self.leaf(C), self.leaf(C), 1e-6


def back(*results):
    """The backward pass from every result that has one."""
    wanted = [t for t in results if isinstance(t, torch.Tensor) and t.requires_grad]
    torch.autograd.backward(wanted, [torch.randn_like(t) for t in wanted])


def select_tokens(given):
    B, C, N = given.B, given.C, given.many
    x, scores, counts = given.leaf(B, 38, 64, dtype=BF16), given.leaf(B, 37), given.each(5, 0)
    follow = given.leaf(B, 37, dtype=BF16), torch.arange(B * 37, device=given.device).view(B, 37)
    options = {"rest": "weighted", "counts": counts, "companions": follow, "norm": given.norm(64)}
    chosen = tokenops.select_tokens(x, scores, 17, **options)
    back(chosen.tokens, chosen.normed, *chosen.companions)
    x, scores = given.leaf(B, 33, C, apart=True), given.leaf(B, 33, dtype=BF16)
    back(tokenops.select_tokens(x, scores, 9, prefix=0, rest="mean", order="index").tokens)
    x, scores = given.leaf(1, 2 + N, 7, turned=True), given.leaf(1, N)
    back(tokenops.select_tokens(x, scores, 9, prefix=2, rest="weighted", normalize=False).tokens)


def restore_tokens(given):
    B, C = given.B, given.C
    index = torch.stack([torch.randperm(37, device=given.device)[:17] for _ in range(B)])
    index[0, 3] = -1  # goes nowhere
    pairs = (given.leaf(B, 37), given.leaf(B, 17)), (index.new_zeros(B, 37), index.clone())
    base, tokens = given.leaf(B, 38, 64, dtype=BF16), given.leaf(B, 18, 64, dtype=BF16)  # with the prefix
    y, found = tokenops.restore_tokens(base, tokens, index, companions=pairs)
    back(y, *found)
    back(tokenops.restore_tokens(given.leaf(B, 37, C, apart=True), given.leaf(B, 17, C), index, prefix=0))
    back(tokenops.restore_tokens(given.leaf(B, 39, 5, turned=True), given.leaf(B, 17, 5), index, prefix=2))


def merge_neighbours(given):
    B, C, merge = given.B, given.C, tokenops.merge_neighbours
    back(merge(given.leaf(B, 36, 64, dtype=BF16), (5, 7), "horizontal"))
    x, sizes, channels = (
        given.leaf(B, 37, C, apart=True),
        given.leaf(B, 35).detach().abs(),
        (given.leaf(C), given.leaf(C)),
    )
    back(*merge(x, (7, 5), "vertical", channels, prefix=2, sizes=sizes, norm=given.norm(C)))
    x, logits = given.leaf(B, 35, 64, dtype=BF16), given.leaf(B, 35, dtype=BF16)
    back(*merge(x, (5, 7), "vertical", logits, prefix=0, norm=given.norm(64)))
    back(merge(given.leaf(B, 36, 37), (5, 7), "horizontal", given.leaf(B, 35), sizes=sizes)[0])
    back(merge(given.leaf(B, 36, 64, turned=True), (5, 7), "horizontal", (given.leaf(1), 0.4)))


def merge_bipartite(given):
    B, C = given.B, given.C
    x, metric, sizes = given.leaf(B, 34, 64, dtype=BF16), given.leaf(B, 34, 24, dtype=BF16), given.leaf(B, 34)
    merged = tokenops.merge_bipartite(x, metric, 9, sizes=sizes.detach().abs(), norm=given.norm(64))
    back(merged.tokens, merged.normed)
    back(tokenops.unmerge_bipartite(given.leaf(B, 25, 64, dtype=BF16), merged.index))
    merged = tokenops.merge_bipartite(given.leaf(B, 33, C, apart=True), given.leaf(B, 33, 37), 16, prefix=0)
    back(merged.tokens)
    back(tokenops.unmerge_bipartite(given.leaf(B, 17, C, turned=True), merged.index, prefix=0))
    # one image, on a GPU of 5 tiles by 4: several blocks look for its edges, and another launch chooses
    tokenops.match_bipartite(given.leaf(1, 1 + 2 * given.many, 72, dtype=BF16), given.many // 2)


def sum_rows(given):
    """By the selection of packed sequences, one of which has more rows than are summed up at once."""
    rows = 40 + 9 * given.many
    ends = torch.tensor([0, 17, 17, rows - 5], dtype=torch.int32, device=given.device)
    for x, norm in ((given.leaf(rows, 64, dtype=BF16), given.norm(64)), (given.leaf(rows, given.C, apart=True), None)):
        chosen = tokenops.select_tokens(
            x, given.leaf(rows), 9, cu_seqlens=ends, max_seqlen=rows, rest="weighted", norm=norm,
        )  # fmt: skip
        back(chosen.tokens, chosen.normed)
        back(tokenops.select_tokens(x, given.leaf(rows), 9, cu_seqlens=ends, max_seqlen=rows).tokens)


def masked_channel_attention(given):
    B, H, attend = given.B, given.heads, tokenops.masked_channel_attention
    qkv = given.leaf(1, 70, H, 192, dtype=BF16).transpose(1, 2)
    back(*attend(*qkv.split(64, 3), scores="class"))
    q, k, v = (given.leaf(B, H, *size, dtype=BF16) for size in ((13, 40), (70, 40), (70, 52)))
    masks = {"qk_mask": given.leaf(H, 40), "v_mask": given.leaf(H, 52)}
    masks |= {"key_bias": given.leaf(B, 1, 1, 70), "key_lengths": given.each(33, 70)}
    back(*attend(q, k, v, **masks, scores="received", return_lse=True, return_key_mean=True))
    q, k, v = (given.leaf(1, 3, *size, apart=True) for size in ((17, 24), (37, 24), (37, 5)))
    back(*attend(q, k, v, key_bias=given.leaf(1, 3, 1, 37), scores="class", heads="mean", return_key_mean=True))
    q, k, v = (given.leaf(B, H, *size) for size in ((1, 24), (37, 24), (37, 5)))  # one query
    back(*attend(q, k, v, key_lengths=given.each(37, 0), scores="received", heads="mean"))


def soft_aggregate(given):
    B, C = given.B, given.C
    x, w, mask = given.leaf(B, 71, 64, dtype=BF16), given.leaf(B, 70, 33, dtype=BF16), given.leaf(B, 70) > 0
    back(tokenops.soft_aggregate(x, w, scale=given.leaf(1), mask=mask, prefix=1))
    back(tokenops.soft_aggregate(given.leaf(B, 37, C, apart=True), given.leaf(B, 37, 19, turned=True), scale=0.5))
    back(tokenops.soft_scatter(given.leaf(B, 33, 64, dtype=BF16), w, scale=given.leaf(1)))
    ends = torch.tensor([0, 35, 35, 36, 140], dtype=torch.int32, device=given.device)  # and two rows behind the last
    options = {"prefix": 2, "cu_seqlens": ends, "max_seqlen": 110, "scale": given.leaf(1)}
    back(tokenops.soft_aggregate(given.leaf(142, C, apart=True), given.leaf(142, 19), **options))


def token_mlp(given):
    def tensors(*shapes, dtype):
        return [given.leaf(*shape, dtype=dtype) for shape in shapes]

    back(tokenops.token_mlp(*tensors((given.B, 24, 70), (100, 24), (100,), (40, 100), (40,), dtype=BF16)))
    w1, w2 = tensors((41, 19), (37, 41), dtype=FP32)
    back(tokenops.token_mlp(given.leaf(1, 19, given.C, apart=True), w1, None, w2, None))


OPERATORS = (
    select_tokens,
    restore_tokens,
    merge_neighbours,
    merge_bipartite,
    sum_rows,
    masked_channel_attention,
    soft_aggregate,
    token_mlp,
)

#: the kernels of csrc/cuda that each operator above launches, and what of its calls does
CUDA_KERNELS = {
    "select_tokens": {
        "select_tokens_fwd_kernel",
        "select_tokens_bwd_kernel",
    },
    "restore_tokens": {
        "restore_tokens_fwd_kernel",
        "restore_tokens_bwd_kernel",
    },
    "merge_neighbours": {
        "merge_neighbours_fwd_kernel",
        "merge_neighbours_norm_kernel",  # with a norm
        "merge_neighbours_bwd_kernel",  # average, and factors with gradients
        "merge_neighbours_logits_bwd_kernel",  # logits with gradients
    },
    "merge_bipartite": {
        "match_bipartite_kernel",
        "match_bipartite_choice_kernel",  # few images of many tokens
        "merge_bipartite_kernel",  # merging, and unmerging's gradient
        "unmerge_bipartite_kernel",  # unmerging, and merging's gradient
    },
    "sum_rows": {
        "packed_parts_kernel",  # a row that many go to
        "packed_sums_kernel",
        "packed_gather_kernel",
    },
}


@triton.jit
def planted_kernel(x_ptr, y_ptr, RACE: tl.constexpr):
    """May read what nobody wrote and write past y, or have all threads write one place in shared memory and read it."""
    i = tl.arange(0, 128)
    value = tl.load(x_ptr + i)
    if RACE:
        value = tl.inline_asm_elementwise(
            "{ .shared .align 4 .b32 spot; st.volatile.shared.b32 [spot], $1; ld.volatile.shared.b32 $0, [spot]; }",
            "=r,r", [value + i], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    tl.store(y_ptr + i, value)


def plant(fault: str) -> None:
    """What the tool of that name finds; "none" only compiles the kernel."""
    x = torch.zeros(128, dtype=torch.int32, device="cuda")
    if fault == "initcheck":
        x = torch.empty_like(x)
    y = torch.zeros(100 if fault == "memcheck" else 128, dtype=torch.int32, device="cuda")
    for race in {"racecheck": (True,), "none": (True, False)}.get(fault, (False,)):
        planted_kernel[(1,)](x, y, race)


@contextmanager
def triton_launches():
    """Yields the set of the names of the Triton kernels that are launched in the block, interpreted or not."""
    names, original = set(), KernelInterface.__getitem__

    def noted(kernel, grid):
        names.add(kernel.fn.__name__)
        return original(kernel, grid)

    with patch.object(KernelInterface, "__getitem__", noted):
        yield names


@contextmanager
def all_launches(device: str):
    """As triton_launches, of the CUDA C++ kernels too where the profiler sees them."""
    with triton_launches() as names:
        if device == "cpu":
            yield names
            return
        with torch.profiler.profile() as profiler:
            yield names
            torch.cuda.synchronize()
        for event in profiler.events():  # with a demangled name or a mangled one
            names |= {
                f"tokenops::{name}" for name in re.findall(r"(?:tokenops::|8tokenops\d+)(\w+?_kernel)", event.name)
            }


def cases(device: str) -> dict:
    """Name -> what runs it: each operator on each of its backends."""
    return {f"{run.__name__}.{backend}": run for run in OPERATORS for backend in TABLE[run.__name__][device]}


def touch(name: str, run, device: str) -> dict:
    began, failure = time.perf_counter(), {}
    torch.manual_seed(0)
    try:
        with tokenops.use_backend(name.rpartition(".")[2]):
            run(Inputs(device, tiny=device == "cpu"))
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        failure = {"failed": f"{type(error).__name__}: {error}"[:500]}
    return {"case": name, "seconds": round(time.perf_counter() - began, 2)} | failure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--cases", nargs="*", help="default: all")
    parser.add_argument("--planted", choices=("memcheck", "racecheck", "initcheck", "none"), help="a fault, before all")
    parser.add_argument("--launches", action="store_true", help="name the kernels that each case launched")
    parser.add_argument("--seconds", type=float, default=600, help="ends then, with a traceback")
    options = parser.parse_args()
    if options.device == "cpu":
        from support.interpreter import patch_once

        patch_once()
    faulthandler.dump_traceback_later(options.seconds, exit=True)
    if options.planted and options.device == "cuda":
        print("touched", json.dumps(touch("planted.triton", lambda _: plant(options.planted), "cuda")), flush=True)
    for name, run in cases(options.device).items():
        if options.cases is not None and name not in options.cases:
            continue
        if options.launches:
            with all_launches(options.device) as names:
                done = touch(name, run, options.device)
            done["kernels"] = sorted(names)
        else:
            done = touch(name, run, options.device)
        print("touched", json.dumps(done), flush=True)


if __name__ == "__main__":
    main()

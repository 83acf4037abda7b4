"""What resources are counted of: every Triton kernel in the shapes of real models, compiled without a GPU.

The launchers run on meta tensors and a launch is replaced by a compilation for a chosen target, so what is compiled is
exactly what a user's call would compile: the same specialisation, configuration and options. Not to be run
interpreted. `python benchmarks/kernel_cases.py` compiles every kernel once and prints one JSON line a kernel;
resources.py makes tables of all cases.
"""

import functools
import json
import math
import re
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class PretendDriver:
    """As much of a driver as a compilation asks for."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # the compilation cache is kept by device

    def get_current_stream(self, device):
        return 0


class Launch(NamedTuple):
    kernel: str
    binary: Any  # Triton's compiled kernel
    programs: int
    arguments: dict[str, Any]  # by name; tensors are on the meta device


@contextmanager
def compiling(capability, done=None):
    """Within the block every launch is a compilation; yields the list of Launches.

    With `done`, a set of names, kernels that are in it are passed over and the others join it.
    """
    compiled = []

    def compile_only(kernel, grid):
        def launch(*args, **kwargs):
            if any(isinstance(a, torch.Tensor) and a.device.type != "meta" for a in args):
                raise TypeError("compiling takes meta tensors only")
            name = kernel.fn.__name__
            if done is not None and name in done:
                return
            binary = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            arguments = dict(zip(kernel.arg_names, args)) | kwargs
            compiled.append(Launch(name, binary, math.prod(grid), arguments))
            if done is not None:
                done.add(name)

        return launch

    with (
        patch.object(JITFunction, "__getitem__", compile_only),
        patch.object(driver, "_active", PretendDriver(capability)),
    ):
        yield compiled


def _tool(name, *arguments):
    run = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True)
    return run.stdout + run.stderr if run.returncode == 0 else None


def resources(compiled, capability):
    """Registers, shared memory, bytes spilled, and whether the target's own matrix instructions are used."""
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin, source = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "--dump-resource-usage", cubin)))
        spills = int(numbers["LOCAL"])
        if int(numbers["STACK"]):  # a stack frame may hold spilled registers: ask the assembler
            source.write_text(ptx)
            target = re.search(r"\.target (sm_\w+)", ptx)[1]
            options = ("-v", f"--gpu-name={target}", "-o", Path(folder, "again.cubin"), source)
            said = _tool("ptxas", *options) or _tool("ptxas-blackwell", *options)
            spills += sum(int(bytes) for bytes in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))
    return {
        "registers": int(numbers["REG"]),
        "spills": spills,
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "matrix": bool(re.search(MATRIX[capability], ptx)),
        "mma": len(re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)", ptx)),
    }


def _meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def soft_aggregate_cases(dtype):
    from tokenops.ops.triton.soft_aggregate import soft_aggregate_bwd, soft_aggregate_fwd

    for N, M, C, learned, masked in (
        (196, 98, 384, True, False),
        (196, 98, 768, False, True),
        (49, 24, 192, True, False),
        (98, 196, 384, True, False),  # soft_scatter's direction
        (576, 288, 384, True, False),
    ):
        x, w = _meta(256, N + 1, C, dtype=dtype), _meta(256, N, M, dtype=dtype)
        if M > N:
            w = _meta(256, M, N, dtype=dtype).transpose(1, 2)
        scale = _meta(1, dtype=dtype) if learned else None
        mask = _meta(256, N, dtype=torch.bool) if masked else None

        def run():
            y, stats = soft_aggregate_fwd(x, w, scale, 1.0, mask, 1)
            soft_aggregate_bwd(y, x, w, scale, 1.0, mask, y, stats, 1)

        yield f"N{N}-M{M}-C{C}", run

    for longest, M, C, learned, masked in ((1024, 98, 384, True, False), (197, 98, 768, False, True)):
        x, w = _meta(1, 50000, C, dtype=dtype), _meta(1, 50000, M, dtype=dtype)
        scale = _meta(1, dtype=dtype) if learned else None
        mask = _meta(1, 50000, dtype=torch.bool) if masked else None
        ends = _meta(257, dtype=torch.int32)

        def run():
            y, stats = soft_aggregate_fwd(x, w, scale, 1.0, mask, 1, ends, longest)
            soft_aggregate_bwd(y, x, w, scale, 1.0, mask, y, stats, 1, ends, longest)

        yield f"N{longest}-M{M}-C{C}-packed", run


def token_mlp_cases(dtype):
    from tokenops.ops.triton import token_mlp

    for M, N, C in ((98, 196, 384), (49, 196, 192), (24, 196, 768), (162, 324, 768)):
        z, w1, w2 = _meta(256, M, C, dtype=dtype), _meta(4 * N, M, dtype=dtype), _meta(N, 4 * N, dtype=dtype)
        b1, b2 = _meta(4 * N, dtype=dtype), _meta(N, dtype=dtype)

        def run():
            with patch.object(token_mlp, "HIDDEN_BYTES", math.inf):  # one launch a pass, of all images
                y = token_mlp.token_mlp_fwd(z, w1, b1, w2, b2)
                token_mlp.token_mlp_bwd(y, z, w1, b1, w2)

        yield f"M{M}-N{N}-C{C}", run


def masked_channel_attention_cases(dtype):
    from tokenops.ops.triton.masked_channel_attention import masked_channel_attention_fwd
    from tokenops.ops.triton.masked_channel_attention_bwd import masked_channel_attention_bwd

    for M, N, H, DK, DV, scores, mean, optional in (
        (197, 197, 6, 64, 64, "class", False, False),  # DeiT-S
        (197, 197, 6, 64, 64, "none", False, False),
        (577, 577, 12, 64, 64, "received", False, False),
        (197, 197, 6, 64, 64, "received", True, True),
        (197, 197, 6, 40, 52, "class", False, True),  # compacted, masks, bias and lengths
        (99, 99, 3, 24, 64, "class", True, True),
        (50, 197, 6, 64, 64, "none", False, True),
        (1, 197, 6, 64, 64, "class", False, False),  # a class token's attention
        (197, 197, 6, 64, 64, "class", True, "bias"),  # ToMe
        (197, 197, 12, 80, 80, "received", False, False),
        (257, 257, 16, 80, 80, "class", False, False),  # ViT-H
        (729, 729, 16, 72, 72, "none", False, False),  # SigLIP So400m
        (197, 197, 6, 72, 96, "class", True, True),
        (197, 197, 6, 80, 80, "class", True, "bias"),
        (4096, 4096, 4, 128, 128, "class", True, True),  # the widest and the longest
        (13, 9, 2, 8, 16, "class", True, True),
    ):
        qkv = _meta(256, M, H, 2 * DK + DV, dtype=dtype).transpose(1, 2)
        kv = qkv if M == N else _meta(256, N, H, 2 * DK + DV, dtype=dtype).transpose(1, 2)
        q, k, v = qkv[..., :DK], kv[..., DK : 2 * DK], kv[..., 2 * DK :]
        float32, int64 = torch.float32, torch.int64
        shapes = (H, DK, float32), (H, DV, float32), (256, H, N, float32), (256, int64)
        extras = "all" if optional is True else optional
        given = (False, False, True, False) if optional == "bias" else (optional,) * 4
        extra = [_meta(*size, dtype=d) if there else None for (*size, d), there in zip(shapes, given)]

        def run():
            out, score, lse, _ = masked_channel_attention_fwd(q, k, v, *extra, 0.125, scores, mean, bool(optional))
            dscores = None if scores == "none" else score
            masked_channel_attention_bwd(out, dscores, None, q, k, v, *extra, out, lse, 0.125, scores, mean)

        yield f"M{M}-N{N}-D{DK}-{DV}-{scores}{f'-{extras}' if extras else ''}", run

    boundaries = _meta(65, dtype=torch.int32)
    for T, longest, H, D, scores, mean, optional in (
        (16384, 4096, 12, 64, "received", True, False),  # photographs of mixed sizes
        (16384, 64, 16, 80, "none", False, False),  # windows of Qwen2.5-VL
        (16384, 16384, 16, 80, "received", True, False),  # and an image
        (16384, 4096, 16, 72, "class", True, True),
    ):
        q, k, v = _meta(T, 3, H, D, dtype=dtype).permute(1, 2, 0, 3).unsqueeze(1).unbind()
        given = [_meta(*size, dtype=torch.float32) if optional else None for size in ((H, D), (H, D), (1, H, T))]
        extra = [*given, None]
        bounds = 0, 0, True, boundaries, boundaries, longest, longest

        def run_packed():
            made = masked_channel_attention_fwd(q, k, v, *extra, 0.125, scores, mean, optional, *bounds)
            dscores, lse = None if scores == "none" else made[1], made[2] if optional else None
            given = made[0], dscores, lse, q, k, v, *extra, made[0], made[2], 0.125, scores, mean
            masked_channel_attention_bwd(*given, 0, 0, *bounds[3:])

        yield f"packed-T{T}-most{longest}-D{D}-{scores}{'-all' * optional}", run_packed


def select_tokens_cases(dtype):
    from tokenops.ops.triton.select_tokens import select_tokens_bwd, select_tokens_fwd

    for B, N, k, C, rest, best_first, norm, extras in (
        (256, 196, 98, 384, "none", False, False, False),
        (1, 196, 98, 384, "none", False, False, False),
        (256, 196, 98, 384, "normalized", False, True, True),
        (256, 196, 98, 768, "weighted", True, True, False),
        (256, 196, 98, 1280, "weighted", False, False, False),
        (256, 576, 288, 193, "mean", True, False, True),
        (256, 6000, 500, 64, "none", False, False, False),
    ):
        kind = dtype if extras else torch.float64 if N == 6000 else torch.float32
        x, scores = _meta(B, N + 1, C, dtype=dtype), _meta(B, N, dtype=kind)
        counts = _meta(B, dtype=torch.int64) if extras else None
        companions = [scores, _meta(B, N, dtype=torch.int64)] if extras else []
        channels = _meta(C, dtype=torch.float32) if norm else None

        def run():
            arguments = (k, counts, companions, channels, channels, 1, rest, best_first, norm, 1e-6)
            tokens, index, _, _, fused, made = select_tokens_fwd(x, scores, *arguments)
            given = x if rest in ("weighted", "normalized") else None
            select_tokens_bwd(tokens, made, index, scores, counts, given, fused, 1, rest)

        yield f"{'B1-' * (B == 1)}N{N}-k{k}-C{C}-{rest}{'-norm' * norm}{'-all' * extras}", run


def restore_tokens_cases(dtype):
    from tokenops.ops.triton.restore_tokens import restore_tokens_bwd, restore_tokens_fwd

    for N, k, C in ((196, 98, 384), (576, 288, 193)):
        base, tokens = _meta(256, N + 1, C, dtype=dtype), _meta(256, k, C, dtype=dtype)
        index = _meta(256, k, dtype=torch.int64)
        olds, news = [_meta(256, N, dtype=torch.float32)], [_meta(256, k, dtype=torch.float32)]

        def run():
            y, made = restore_tokens_fwd(base, tokens, index, 1, olds, news)
            restore_tokens_bwd(y, index, 1, 0, made)

        yield f"N{N}-k{k}-C{C}", run


def merge_neighbours_cases(dtype):
    from tokenops.ops.triton.merge_neighbours import merge_neighbours_bwd, merge_neighbours_fwd

    for H, W, C, vertical, kind, sized, norm in (
        (14, 14, 384, False, "average", False, False),
        (14, 7, 384, True, "channels", True, True),
        (14, 14, 768, False, "logits", True, True),
        (7, 7, 193, True, "scalars", False, False),
        (32, 32, 1280, False, "channels", False, True),  # ViT-H
    ):
        x, logits = _meta(256, H * W + 1, C, dtype=dtype), _meta(256, H * W, dtype=dtype)
        channels = _meta(C, dtype=torch.float32)
        weight = {"channels": channels, "scalars": channels[:1]}.get(kind)
        logits = logits if kind == "logits" else None
        sizes = _meta(256, H * W, dtype=torch.float32) if sized else None
        parameters = (channels, channels) if norm else (None, None)
        options = (H, W, vertical, 1, 0.5, 0.5)

        def run():
            y, *_ = merge_neighbours_fwd(x, weight, weight, logits, sizes, *parameters, *options, norm, 1e-6)
            given = None if kind == "average" else x
            merge_neighbours_bwd(y, given, weight, weight, logits, sizes, *options)

        yield f"H{H}-W{W}-C{C}-{kind}{'-sizes' * sized}{'-norm' * norm}", run


def match_bipartite_cases(dtype):
    from tokenops.ops.triton.match_bipartite import match_bipartite_fwd

    for N, D, r in (
        (196, 64, 13),  # DeiT-S
        (196, 80, 8),  # ViT-H
        (31, 24, 13),
        (1024, 200, 100),  # several tiles of everything
    ):
        metric = _meta(256, N + 1, D, dtype=dtype)
        yield f"N{N}-D{D}-r{r}", functools.partial(match_bipartite_fwd, metric, r, 1)
    turned = _meta(256, 64, 197, dtype=dtype).transpose(1, 2)  # of a feature map
    yield "N196-D64-r13-turned", functools.partial(match_bipartite_fwd, turned, 13, 1)


def match_packed_cases(dtype):
    from tokenops.ops.triton.match_packed import match_packed_fwd

    ends = _meta(65, dtype=torch.int32)
    for N, D in (
        (196, 64),  # photographs of DeiT-S
        (8836, 80),  # Qwen2.5-VL's
        (31, 24),
        (1024, 200),  # several tiles of everything
    ):
        yield f"N{N}-D{D}", functools.partial(match_packed_fwd, _meta(64 * N, D, dtype=dtype), ends, N, 1)
    turned = _meta(64, 64 * 196, dtype=dtype).transpose(0, 1)  # of a feature map
    yield "N196-D64-turned", functools.partial(match_packed_fwd, turned, ends, 196, 1)


def merge_bipartite_cases(dtype):
    from tokenops.ops.triton.merge_bipartite import merge_bipartite_bwd, merge_bipartite_fwd

    for N, r, C, sized, norm in (
        (196, 13, 384, True, False),
        (196, 13, 384, True, True),
        (196, 8, 1280, True, True),  # ViT-H
        (49, 20, 193, False, False),
        (1024, 512, 768, False, True),
    ):
        x, index = _meta(256, N + 1, C, dtype=dtype), _meta(256, N, dtype=torch.int64)
        sizes = _meta(256, N + 1, dtype=torch.float32) if sized else None
        channels = _meta(C, dtype=torch.float32) if norm else None

        def run():
            y, merged, *_ = merge_bipartite_fwd(x, index, N - r, sizes, channels, channels, 1, norm, 1e-6)
            merge_bipartite_bwd(y, index, sizes, merged, 1)

        yield f"N{N}-r{r}-C{C}{'-sizes' * sized}{'-norm' * norm}", run


def unmerge_bipartite_cases(dtype):
    from tokenops.ops.triton.merge_bipartite import unmerge_bipartite_bwd, unmerge_bipartite_fwd

    for N, M, C in ((196, 183, 384), (196, 25, 193)):
        y, index = _meta(256, M + 1, C, dtype=dtype), _meta(256, N, dtype=torch.int64)

        def run():
            unmerge_bipartite_bwd(unmerge_bipartite_fwd(y, index, 1), index, M, 1)

        yield f"N{N}-M{M}-C{C}", run


def sum_rows_cases(dtype):
    from tokenops.ops.triton.sum_rows import sum_rows_bwd, sum_rows_fwd

    for T, M, C, weighted, mean, norm in (
        (65536, 20000, 1152, True, True, False),
        (65536, 20000, 1152, True, True, True),
        (65536, 20000, 1280, False, False, True),
        (4096, 1024, 193, False, True, False),
        (4096, 1024, 1, True, True, False),  # of scores
    ):
        x, wide = _meta(T, C, dtype=dtype if C > 1 else torch.float32), torch.float32
        dest, order, offsets = (_meta(rows, dtype=torch.int64) for rows in (T, T, M + 1))
        weight = _meta(T, dtype=wide) if weighted else None
        channels = _meta(C, dtype=wide) if norm else None

        def run():
            arguments = weight, order, offsets, T, channels, channels, mean, norm, 1e-6
            y, totals, *_ = sum_rows_fwd(x, dest, M, *arguments)
            sum_rows_bwd(y, dest, weight, totals if mean else None, x if weighted else None)
            sum_rows_fwd(x, dest, M, None, order, offsets, 1, channels, channels, False, norm, 1e-6)  # a selection

        yield f"T{T}-M{M}-C{C}{'-weighted' * weighted}{'-mean' * mean}{'-norm' * norm}", run


CASES = {
    "soft_aggregate": soft_aggregate_cases,
    "token_mlp": token_mlp_cases,
    "masked_channel_attention": masked_channel_attention_cases,
    "select_tokens": select_tokens_cases,
    "restore_tokens": restore_tokens_cases,
    "merge_neighbours": merge_neighbours_cases,
    "match_bipartite": match_bipartite_cases,
    "match_packed": match_packed_cases,
    "merge_bipartite": merge_bipartite_cases,
    "unmerge_bipartite": unmerge_bipartite_cases,
    "sum_rows": sum_rows_cases,
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


#: whose products belong on matrix units in bf16, and the case of a DeiT-S layer that fills Hopper's own
PRODUCTS = {
    "soft_aggregate": "N196-M98-C384",
    "token_mlp": "M98-N196-C384",
    "masked_channel_attention": "M197-N197-D64-64-class",
    "match_bipartite": "N196-D64-r13",
}

#: a DeiT-S case of each operator, which together launch every kernel
QUICK = (
    *PRODUCTS.items(),
    ("masked_channel_attention", "M577-N577-D64-64-received"),  # only for the kernel of these scores
    ("select_tokens", "N196-k98-C384-none"),
    ("restore_tokens", "N196-k98-C384"),
    ("merge_neighbours", "H14-W14-C384-average"),
    ("match_packed", "N196-D64"),
    ("sum_rows", "T65536-M20000-C1152-weighted-mean"),
    ("merge_bipartite", "N196-r13-C384-sizes"),  # unmerge_bipartite launches the same kernels
)


def case_names(operator):
    return [case for case, _ in CASES[operator](torch.bfloat16)]


def launches(operator, case, dtype, capability, done=None):
    """Every launch of a case, forward and backward."""
    for name, run in CASES[operator](DTYPES[dtype]):
        if name == case:  # run now: the next case changes what it refers to
            with compiling(capability, done) as compiled:
                run()
            return compiled
    raise KeyError(f"{operator} has no case {case}")


def compiled_case(operator, case, dtype, capability, done=None):
    """(kernel name, values) of every launch of a case, forward and backward."""
    compiled = launches(operator, case, dtype, capability, done)
    return [(launch.kernel, resources(launch.binary, capability)) for launch in compiled]


def quick(capability=90, dtype="bf16"):
    """Every kernel, compiled once."""
    done = set()
    for operator, case in QUICK:
        for kernel, values in compiled_case(operator, case, dtype, capability, done):
            yield {"operator": operator, "case": case, "kernel": kernel, "dtype": dtype, "sm": capability, **values}


if __name__ == "__main__":
    for row in quick():
        print(json.dumps(row), flush=True)

"""The table of launch configurations: what it says of which call, and that no entry makes a result wrong."""

import importlib
import itertools
import json
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

import tokenops
from gpu import candidates, results
from support import attention
from tokenops import reference

pytest.importorskip("triton")

import triton
from triton.runtime import driver

from tokenops.ops.triton import common, launch, launches, soft_aggregate, token_mlp
from tokenops.ops.triton import masked_channel_attention as forward
from tokenops.ops.triton import masked_channel_attention_bwd as backward

BF16 = torch.bfloat16
CALL = ("soft_aggregate_fwd", BF16, 256, (196, 98, 384))
ENTRY = "sm_90 soft_aggregate_fwd bfloat16 many N256 M128 C512"


@pytest.fixture
def gpu(monkeypatch):
    """gpu(90): as if kernels ran on a GPU of compute capability 9.0."""

    def pretend(capability):
        target = SimpleNamespace(arch=capability)
        pretended = SimpleNamespace(get_current_device=lambda: capability, get_current_target=lambda: target)
        monkeypatch.setattr(driver, "_active", pretended)
        monkeypatch.setattr(launches, "INTERPRETED", False)
        monkeypatch.setattr(common, "INTERPRETED", False)
        launches._found.cache_clear()

    yield pretend
    launches._found.cache_clear()


# What an entry counts for.


def test_an_entry_is_laid_over_the_default(gpu):
    gpu(90)
    default = {"BLOCK_N": 32, "BLOCK_M": 128, "num_warps": 8}
    with launches.using({ENTRY: {"BLOCK_N": 64, "maxnreg": 128}}):
        assert launches.overlaid(*CALL, default, (False,)) == {**default, "BLOCK_N": 64, "maxnreg": 128}
    assert default["BLOCK_N"] == 32
    with launches.using({}):
        assert launches.overlaid(*CALL, default, (False,)) is default


@pytest.mark.parametrize(
    "change, counts",
    (
        ({}, True),
        ({"images": 64}, True),
        ({"images": 63}, False),
        ({"images": 4}, False),
        ({"sizes": (256, 128, 512)}, True),
        ({"sizes": (129, 65, 257)}, True),
        ({"sizes": (257, 98, 384)}, False),
        ({"sizes": (128, 98, 384)}, False),
        ({"sizes": (196, 64, 384)}, False),
        ({"sizes": (196, 98, 513)}, False),
        ({"dtype": torch.float16}, False),
        ({"kernel": "soft_aggregate_bwd"}, False),
        ({"given": (True,)}, False),
        ({"capability": 80}, False),
        ({"capability": 100}, False),
    ),
    ids=str,
)
def test_where_an_entry_counts(gpu, change, counts):
    call = dict(zip(("kernel", "dtype", "images", "sizes"), CALL)) | {"given": (False,)} | change
    gpu(call.pop("capability", 90))
    with launches.using({ENTRY: {"BLOCK_N": 64}}):
        for _ in range(2):  # the second is answered from what was kept of the first
            assert launches.overlaid(**call, default={"BLOCK_N": 16}) == {"BLOCK_N": 64 if counts else 16}


def test_an_entry_for_optional_arguments(gpu):
    gpu(90)
    call = ("masked_channel_attention_bwd_q", BF16, 1, (197, 197, 64, 64), {})
    entry = "sm_90 masked_channel_attention_bwd_q bfloat16 few M256 N256 DK64 DV64 bias received"
    with launches.using({entry: {"BLOCK_M": 32}}):
        found = [launches.overlaid(*call, (False, False, bias, False, True)) for bias in (True, False)]
    assert found == [{"BLOCK_M": 32}, {}]


def test_a_kernels_name_alone_counts_for_every_call_interpreted_or_not(gpu):
    with launches.using({"soft_aggregate_fwd": {"BLOCK_N": 64}, ENTRY: {"BLOCK_N": 16}}):
        assert launches.overlaid("soft_aggregate_fwd", torch.float32, 1, (1, 1, 1), {}, (True,)) == {"BLOCK_N": 64}
        assert launches.overlaid(*CALL, {}, (False,)) == {"BLOCK_N": 64}  # no GPU is sm_90 yet
        gpu(90)
        assert launches.overlaid(*CALL, {}, (False,)) == {"BLOCK_N": 16}  # the nearer one


def test_using_ends_with_its_block(gpu):
    gpu(90)
    with pytest.raises(KeyError):
        with launches.using({ENTRY: {"BLOCK_N": 64}}):
            with launches.using({ENTRY: {"BLOCK_N": 16}}):
                assert launches.overlaid(*CALL, {}, (False,)) == {"BLOCK_N": 16}
            assert launches.overlaid(*CALL, {}, (False,)) == {"BLOCK_N": 64}
            raise KeyError
    with launches.using({}):
        assert launches.overlaid(*CALL, {}, (False,)) == {}


@pytest.mark.parametrize("images, counts", ((1, True), (4, True), (5, False), (64, False)))
def test_few_images(gpu, images, counts):
    gpu(90)
    with launches.using({ENTRY.replace("many", "few"): {"BLOCK_N": 64}}):
        assert launches.overlaid(*CALL[:2], images, CALL[3], {}, (False,)) == ({"BLOCK_N": 64} if counts else {})


@pytest.mark.parametrize("images", (5, 63))
def test_between_few_and_many_there_is_no_entry(images):
    with pytest.raises(ValueError, match=f"{images} images are neither few nor many"):
        launches.name(90, *CALL[:2], images, CALL[3])


@pytest.mark.parametrize("change", ({}, {"images": 1}, {"sizes": (1, 1, 1)}, {"sizes": (0, 577, 1025)}), ids=str)
def test_names_are_read_as_they_are_written(gpu, change):
    gpu(90)
    call = dict(zip(("kernel", "dtype", "images", "sizes"), CALL)) | change
    with launches.using({launches.name(90, *call.values(), ("mask",)): {"num_warps": 2}}):
        assert launches.overlaid(*call.values(), {}, (True,)) == {"num_warps": 2}


# What the file may say.


@pytest.mark.parametrize(
    "entry, config, words",
    (
        (ENTRY, {"BLOCK_K": 32}, "BLOCK_K cannot be set, but BLOCK_N, BLOCK_M, BLOCK_C, num_warps"),
        (ENTRY, {"HAS_MASK": 1}, "HAS_MASK cannot be set"),
        (ENTRY, {"enable_fp_fusion": 1}, "enable_fp_fusion cannot be set"),
        (ENTRY.replace("soft_aggregate", "soft_gather"), {"BLOCK_N": 32}, "the kernels are soft_aggregate_fwd"),
        ("soft_gather_fwd", {"BLOCK_N": 32}, "not enough values"),
        (ENTRY, {"BLOCK_N": 48}, "BLOCK_N cannot be 48"),
        (ENTRY, {"BLOCK_N": 8}, "BLOCK_N cannot be 8"),
        (ENTRY, {"BLOCK_N": 512}, "BLOCK_N cannot be 512"),
        (ENTRY, {"BLOCK_N": 32.0}, "BLOCK_N cannot be 32.0"),
        (ENTRY, {"num_warps": 3}, "num_warps cannot be 3"),
        (ENTRY, {"num_stages": 0}, "num_stages cannot be 0"),
        (ENTRY, {"num_stages": True}, "num_stages cannot be True"),
        (ENTRY, {"maxnreg": 256}, "maxnreg cannot be 256"),
        (ENTRY, {}, "it sets nothing"),
        (ENTRY.replace("sm_90", "9.0"), {"BLOCK_N": 32}, "a GPU is sm_90, not 9.0"),
        (ENTRY.replace("bfloat16", "bf16"), {"BLOCK_N": 32}, "dtypes are float16, bfloat16, float32, not bf16"),
        (ENTRY.replace("many", "B256"), {"BLOCK_N": 32}, "images are few or many, not B256"),
        (ENTRY.replace("N256", "N196"), {"BLOCK_N": 32}, "ends with N, M, C, each with a power of two"),
        (ENTRY.replace(" M128", ""), {"BLOCK_N": 32}, "invalid literal|ends with N, M, C"),
        (ENTRY.replace("N256 M128", "M128 N256"), {"BLOCK_N": 32}, "invalid literal|ends with N, M, C"),
        (ENTRY + " lengths", {"BLOCK_N": 32}, "are, in this order: mask"),
        (
            "sm_90 masked_channel_attention_fwd bfloat16 few M256 N256 DK64 DV64 bias qk_mask",
            {"BLOCK_N": 32},
            "in this order: qk_mask, v_mask, bias, lengths",
        ),
        (
            "sm_90 masked_channel_attention_fwd bfloat16 few M256 N256 DK64 DV64",
            {"BLOCK_DK": 32},
            "BLOCK_DK cannot be set",
        ),
    ),
)
def test_an_entry_that_cannot_be_is_named(entry, config, words):
    good = {"token_mlp_fwd": {"BLOCK_R": 32}}
    with pytest.raises(ValueError, match=words) as error:
        launches.parsed({**good, entry: config}, "launches.json")
    assert str(error.value).startswith(f"launches.json: {entry!r}: ")


def test_the_committed_file():
    table = json.loads(launches.TABLE.read_text())
    launches.parsed(table)
    assert not set(table) & set(launches.KERNELS), "an entry of the file says where it was measured"
    assert launches.TABLE.read_text() == results.launches_text(table)


@pytest.mark.parametrize("interpreted", (False, True))
def test_the_file_is_read_where_kernels_are_compiled(interpreted, monkeypatch, tmp_path):
    file = tmp_path / "launches.json"
    file.write_text(results.launches_text({ENTRY: {"BLOCK_N": 64}}))
    monkeypatch.setattr(launches, "TABLE", file)
    monkeypatch.setattr(launches, "INTERPRETED", interpreted)
    assert [*launches._committed()] == ([] if interpreted else ["soft_aggregate_fwd"])


# The launchers ask, and take all that follows from the answer.


class Asked:
    """Stands for a kernel: what it is launched with, and nothing runs."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append(kwargs)


@contextmanager
def asked(*modules):
    """In the block each kernel of the modules is one of Asked, by name."""
    stand_ins = {name: Asked() for module in modules for name in vars(module) if name.endswith("_kernel")}
    with ExitStack() as stack:
        for module, (name, stand_in) in itertools.product(modules, stand_ins.items()):
            if hasattr(module, name):
                stack.enter_context(patch.object(module, name, stand_in))
        yield stand_ins


def launched(group, entries):
    """What the group's launch is given, of tensors without memory."""
    known = candidates.KERNELS[group.kernel]
    of_kernel = importlib.import_module(f"tokenops.ops.triton.{known.module}")
    with asked(soft_aggregate, token_mlp, forward, of_kernel) as stand_ins, launches.using(entries):
        known.call(group.size, BF16, "meta")()
    return stand_ins[known.symbol].launches[0]


@pytest.mark.parametrize("kernel", launches.KERNELS)
def test_every_launcher_takes_what_the_table_says(kernel, gpu):
    """By the name that the sweep gives the entry; of each candidate, and of this kernel alone."""
    gpu(90)
    for size in (candidates.DEIT_S, candidates.DEIT_S_ALONE, *candidates.DEIT_S_EDGES):
        group = candidates.Group(kernel, size, "bf16")
        default = launched(group, {})
        for candidate in group.candidates[1:]:
            given = launched(group, {group.entry(90): candidate})
            assert {name: given[name] for name in candidate} == candidate
            settings = {"num_warps", "num_stages", *launches.KERNELS[kernel].tiles} - {*candidate}
            assert {name: given[name] for name in settings} == {name: default[name] for name in settings}
        for other in {*launches.KERNELS} - {kernel}:
            others = {other: {"num_warps": 1}}
            assert launched(group, others) == default, f"{kernel} follows {other}"


@pytest.mark.parametrize("there", (None, "qk_mask", "v_mask", "bias", "lengths"))
def test_attention_says_what_it_was_given(there, monkeypatch):
    said = {}
    monkeypatch.setattr(
        launches,
        "overlaid",
        lambda kernel, dtype, images, sizes, default, given: said.update({kernel: given}) or default,
    )
    q = torch.empty(2, 3, 40, 16, dtype=BF16, device="meta")
    shapes = {"qk_mask": (3, 16), "v_mask": (3, 16), "bias": (2, 3, 40), "lengths": (2,)}
    optional = [torch.empty(shape, device="meta") if name == there else None for name, shape in shapes.items()]
    with asked(forward, backward):
        for scores in ("class", "received"):
            out, score, lse, _ = forward.masked_channel_attention_fwd(q, q, q, *optional, 1.0, scores, False, False)
            backward.masked_channel_attention_bwd(out, score, None, q, q, q, *optional, out, lse, 1.0, scores, False)
            for kernel, given in said.items():
                names = launches.KERNELS[kernel].optional
                expected = {there, "received" if scores == "received" else None} & {*names}
                assert {name for name, is_there in zip(names, given, strict=True) if is_there} == expected, kernel
    assert {*said} == {kernel for kernel in launches.KERNELS if kernel.startswith("masked_channel")}


def attention_launches(dtype, DK, DV):
    """The constants of the launches of both passes, of tensors without memory."""
    q, v = (torch.empty(2, 3, 40, D, dtype=dtype, device="meta") for D in (DK, DV))
    nothing, scores = (None,) * 4, ("received", False)
    with asked(forward, backward) as stand_ins:
        out, score, lse, _ = forward.masked_channel_attention_fwd(q, q, v, *nothing, 1.0, *scores, False)
        backward.masked_channel_attention_bwd(out, score, None, q, q, v, *nothing, out, lse, 1.0, *scores)
    return [constants for stand_in in stand_ins.values() for constants in stand_in.launches]


def test_heads_of_65_to_96_are_two_chunks_on_triton(gpu):
    for capability in (80, 90, 100):
        gpu(capability)
        launch.forget()
        for dtype in (BF16, torch.float32):
            for D in range(1, 129):
                chunked = dtype == BF16 and 64 < D <= (80 if capability == 80 else 96)
                expected = (64, 16 if D <= 80 else 32) if chunked else (max(16, triton.next_power_of_2(D)), 0)
                constants = attention_launches(dtype, D, D)
                assert len(constants) == 4
                for given in constants:
                    for name in "DK", "DV":
                        if name in given:
                            assert (given[f"BLOCK_{name}"], given[f"TAIL_{name}"]) == expected
        given = attention_launches(BF16, 40, 72)[0]
        assert [given[f"{part}_{name}"] for name in ("DK", "DV") for part in ("BLOCK", "TAIL")] == [64, 0, 64, 16]


# Whatever the tiles, the results are right.


def aggregation(sizes, extras, device, dtype):
    B, N, M, C = sizes
    tensors = [torch.randn(B, N + 1, C), torch.randn(B, N, M), torch.tensor([1.25])][: 3 if extras else 2]
    mask = torch.rand(B, N, device=device) > 0.3 if extras else None

    def run(operator, x, w, scale=None):
        return (operator.soft_aggregate(x, w, scale=scale, mask=mask, prefix=1),)

    return run, [t.to(device, dtype) for t in tensors]


def mlp(sizes, extras, device, dtype):
    B, N, M, C = sizes
    R = N + 9
    tensors = [torch.randn(B, M, C), torch.randn(R, M) / M**0.5, torch.randn(N, R) / R**0.5]
    tensors += [torch.randn(R), torch.randn(N)] if extras else []

    def run(operator, z, w1, w2, b1=None, b2=None):
        return (operator.token_mlp(z, w1, b1, w2, b2),)

    return run, [t.to(device, dtype) for t in tensors]


def attend(sizes, extras, device, dtype):
    """The scores of one query, which leave the gradients two loops; with all there is, and means, one."""
    B, N, M, C = sizes
    tensors = attention.inputs((B, 2, N, M, 8, 16, ""), dtype, device, everything=extras)
    names = list(tensors)
    options = dict(scores="received", heads="mean", return_key_mean=True) if extras else dict(scores="class")

    def run(operator, *tensors):
        return operator.masked_channel_attention(**dict(zip(names, tensors)), **options)

    return run, list(tensors.values())


OPERATORS = {"soft_aggregate": aggregation, "token_mlp": mlp, "masked_channel_attention": attend}


def results_and_gradients(run, operator, tensors):
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    results = run(operator, *leaves)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(r.shape, generator=generator).to(r) for r in results]
    wanted = [t for t in leaves if t.requires_grad]
    return [*results, *torch.autograd.grad(results, wanted, upstream)]


def assert_right(operator, sizes, extras, entries, device):
    dtype = BF16 if device == "cuda" else torch.float32
    run, tensors = OPERATORS[operator](sizes, extras, device, dtype)
    with launches.using(entries), tokenops.use_backend("triton"):
        ours = results_and_gradients(run, tokenops, tensors)
    double = [t.double() if t.is_floating_point() else t for t in tensors]
    truth = results_and_gradients(run, reference, double)
    for i, (a, b) in enumerate(zip(ours, truth, strict=True)):
        error = (a.double() - b).norm() / b.norm()
        # one number, the sum of many that cancel, has lost more
        limit = (0.05 if dtype == BF16 else 1e-5) * (10 if b.numel() == 1 else 1)
        assert error <= limit, f"result {i} of {operator}: relative L2 {error:.1e} with {entries}"


def everywhere(**tiles):
    """Entries for all kernels with these tiles, as far as a kernel has them."""
    entries = {
        kernel: {f"BLOCK_{name}": size for name, size in tiles.items() if f"BLOCK_{name}" in known.tiles}
        for kernel, known in launches.KERNELS.items()
    }
    return {kernel: config for kernel, config in entries.items() if config}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "tiles", (dict(M=16, N=16, R=16, C=16), dict(M=32, N=64, R=64, C=32), dict(M=128, N=16, R=16, C=16)), ids=str
)
@pytest.mark.parametrize(
    "operator, extras",
    (
        ("soft_aggregate", False),
        ("soft_aggregate", True),
        ("token_mlp", True),
        ("masked_channel_attention", False),
        ("masked_channel_attention", True),
    ),
)
def test_results_do_not_depend_on_tiles(operator, extras, tiles, device):
    assert_right(operator, (2, 37 if operator != "token_mlp" else 21, 18, 40), extras, everywhere(**tiles), device)


def tile_sets():
    """(kernel, tiles) of all candidates: warps and stages mean nothing to the interpreter."""
    found = {}
    for kernel, known in candidates.KERNELS.items():
        for candidate in (*known.many, *known.few):
            tiles = {name: size for name, size in candidate.items() if name.startswith("BLOCK_")}
            if tiles:
                found[kernel, str(tiles)] = tiles
    return [pytest.param(kernel, tiles, id=f"{kernel}-{text}") for (kernel, text), tiles in found.items()]


@pytest.mark.cpu_only  # on a GPU, where a tile may not fit another dtype, the sweep itself compares them
@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kernel, tiles", tile_sets())
def test_no_candidate_of_the_sweep_changes_results(kernel, tiles, device):
    """Of sizes that take several of all but the largest tiles, and do not end with one."""
    operator = next(name for name in OPERATORS if kernel.startswith(name))
    entries = everywhere(M=64, N=64, R=64, C=64)  # of the others, which are there only to be compared
    entries[kernel] |= tiles
    mlp = operator == "token_mlp"
    for extras in (True,) if mlp else (False, True):
        assert_right(operator, (1, 150, 133, 40 if mlp else 72), extras, entries, device)


def test_the_sweep_tries_every_kernel_that_has_entries():
    assert set(candidates.KERNELS) == set(launches.KERNELS)
    for kernel, known in candidates.KERNELS.items():
        for tried in (known.many, known.few):
            assert 5 <= len(tried) < 16 and len({str(c) for c in tried}) == len(tried)
            launches.parsed(dict.fromkeys([kernel], tried[0]))
            assert not [c for c in tried if set(c) - {"num_warps", "num_stages", *launches.KERNELS[kernel].tiles}]

"""The evidence run's look with compute-sanitizer: every kernel is launched, and what the tools print is understood."""

import os
import sys

import pytest
import torch

import tokenops
from gpu import sanitize, touch
from gpu.record import Lines
from support.process import ROOT, python


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The lines of a rehearsal."""
    file = tmp_path_factory.mktemp("gpu") / "lines.jsonl"
    python("-m", "gpu.sanitize", "--device", "cpu", GPU_LINES=file, TRITON_INTERPRET="1")
    return {line["key"]: line for line in Lines(file).read("sanitize")}


@pytest.mark.slow
def test_rehearsal_launches_every_triton_kernel(rehearsed):
    assert all(line["rehearsal"] for line in rehearsed.values())
    outcomes = {key: line["outcome"] for key, line in rehearsed.items()}
    assert outcomes == {
        **{f"plain/{case}": "ok" for case in sanitize.cases("cpu")},
        "launched": "ok",
        **dict.fromkeys(sanitize.TOOLS, "skipped"),
    }, rehearsed
    launched = {}
    for key, line in rehearsed.items():
        launched |= {kernel: key.removeprefix("plain/") for kernel in line.get("kernels", ())}
    assert set(launched) == sanitize.triton_kernels()
    assert launched == {kernel: sanitize.case_of(kernel, False) for kernel in launched}


def test_every_kernel_is_listed():
    """A new __global__ function needs a call in touch.py, and its name there beside."""
    listed = {kernel: name for name, kernels in touch.CUDA_KERNELS.items() for kernel in kernels}
    assert set(listed) == sanitize.cuda_kernels()
    assert {kernel: f"{name}.native" for kernel, name in listed.items()} == {
        kernel: sanitize.case_of(kernel, True) for kernel in listed
    }
    sources = [path.read_text() for path in (ROOT / "csrc" / "cuda").iterdir()]
    assert len(listed) == sum(source.count("__global__") for source in sources), "a name was not found"
    sources = [path.read_text() for path in (ROOT / "tokenops" / "ops" / "triton").glob("*.py")]
    assert len(sanitize.triton_kernels()) == sum(source.count("_kernel(\n") for source in sources)
    for device in ("cpu", "cuda"):
        assert list(touch.cases(device)) == sanitize.cases(device)


@pytest.mark.parametrize("run", touch.OPERATORS, ids=lambda run: run.__name__)
def test_calls_are_valid_at_the_sizes_for_a_gpu(run):
    with tokenops.use_backend("reference"):
        run(touch.Inputs("cpu", tiny=False))


def test_one_image_is_matched_by_several_blocks(monkeypatch):
    """Only then match_bipartite_choice_kernel is launched: csrc/cuda/match_bipartite.cuh, plan()."""
    seen = []
    monkeypatch.setattr(tokenops, "match_bipartite", lambda metric, r: seen.append((metric.shape, r)))
    with tokenops.use_backend("reference"):
        touch.merge_bipartite(touch.Inputs("cpu", tiny=False))
    (((images, rows, D), r),) = seen
    tiles = -(-((rows - 1) // 2) // 128)
    assert images == 1 and r > 0 and tiles > 1 and (tiles - 1) * tiles * -(-D // 64) > 3


MEMCHECK = """========= COMPUTE-SANITIZER
touched {"case": "planted.triton", "seconds": 0.5}
========= Invalid __global__ write of size 4 bytes
=========     at planted_kernel+0x110 in touch.py:181
=========     by thread (100,0,0) in block (0,0,0)
=========     Access at 0x7f2c1ba00190 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f2c1ba00000 of size 400 bytes
=========
something torch had to say
========= Invalid __global__ read of size 16 bytes
=========     at void tokenops::select_tokens_fwd_kernel<tokenops::BFloat16, (int)8, (bool)1>\
(tokenops::SelectTokens)+0x2a0
=========     by thread (0,0,0) in block (1,0,0)
=========     Address 0x7f6510c00010 is out of bounds
=========     and is 1,025 bytes after the nearest allocation at 0x7f6510c00000 of size 1,024 bytes
=========
touched {"case": "select_tokens.native", "seconds": 1.5}
========= Invalid __shared__ read of size 4 bytes
=========     at _helper+0x40 in masked_channel_attention.py:42
=========     by thread (1,0,0) in block (1,0,0)
=========     Address 0x10 is out of bounds
=========         Device Frame: masked_channel_attention_bwd_q_kernel+0x120 in masked_channel_attention_bwd.py:122
=========
========= Target application returned an error
========= ERROR SUMMARY: 1,031 errors
========= ERROR SUMMARY: 1,028 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""

RACECHECK = """========= COMPUTE-SANITIZER
touched {"case": "planted.triton", "seconds": 0.5}
========= Error: Race reported between Write access at planted_kernel+0xf0 in touch.py:176
=========     and Read access at planted_kernel+0x100 in touch.py:176 [508 hazards]
=========
========= Error: Race reported between Write access at \
void tokenops::match_bipartite_kernel<float, (int)4>(tokenops::MatchBipartite)+0x90
=========     and Read access at \
void tokenops::match_bipartite_kernel<float, (int)4>(tokenops::MatchBipartite)+0x100 [4 hazards]
=========
========= Warning: (Warp Level Programming) Potential RAW hazard detected at __shared__ 0x8c in block (0,0,0) :
=========     Write Thread (35,0,0) at sum_rows_kernel+0x90 in merge_bipartite.py:44
=========     Read Thread (32,0,0) at sum_rows_kernel+0x120 in merge_bipartite.py:56
=========     Current Value : 35
=========
touched {"case": "merge_bipartite.native", "seconds": 0.5}
========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)
"""

REFUSED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the sanitizer documentation
=========
touched {"case": "planted.triton", "seconds": 0.5}
========= ERROR SUMMARY: 1 error
"""

INITCHECK = """========= COMPUTE-SANITIZER
touched {"case": "planted.triton", "seconds": 0.5}
========= Uninitialized __global__ memory read of size 4 bytes
=========     at planted_kernel+0x70 in touch.py:177
=========     by thread (31,0,0) in block (0,0,0)
=========     Address 0x7f3c7ec000fc
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::elementwise_kernel<(int)128, (int)4>(int)+0x70
=========     by thread (31,0,0) in block (1,0,0)
=========     Address 0x7f3c7ec000fc
=========
touched {"case": "token_mlp.triton", "seconds": 0.5}
========= ERROR SUMMARY: 2 errors
"""


def understood(text):
    output = sanitize.Output()
    for line in text.splitlines():
        output.take(line + "\n")
    return output


def judged(tool, text, *wanted, named=True):
    return sanitize.verdict(tool, understood(text), KNOWN, list(wanted), named)


KNOWN = sanitize.cuda_kernels() | sanitize.triton_kernels() | {"planted_kernel"}


def test_memcheck_is_understood():
    output = understood(MEMCHECK)
    assert sanitize.planted(output, KNOWN) and output.total == 1031 and output.unprinted == 1028
    assert [finding.kernel(KNOWN) for finding in output.findings] == [
        ("planted_kernel", "planted.triton"),
        ("select_tokens_fwd_kernel", "select_tokens.native"),
        ("masked_channel_attention_bwd_q_kernel", "masked_channel_attention.triton"),
    ]
    assert list(output.rest) == ["something torch had to say"]
    line = judged("memcheck", MEMCHECK, "select_tokens.native", "token_mlp.triton")
    assert line["outcome"] == "failed" and line["errors"] == 2
    assert line["message"] == "2 errors; not reached: token_mlp.triton"
    assert line["kernels_found"] == {
        "select_tokens.native select_tokens_fwd_kernel": 1,
        "masked_channel_attention.triton masked_channel_attention_bwd_q_kernel": 1,
    }
    assert line["text"].startswith("Invalid __global__ read of size 16 bytes\nat void tokenops::select_tokens_fwd")


def test_racecheck_is_understood():
    line = judged("racecheck", RACECHECK, "merge_bipartite.native")
    assert line["outcome"] == "failed" and (line["errors"], line["warnings"], line["total"]) == (1, 1, 2)
    assert set(line["kernels_found"]) == {
        "merge_bipartite.native match_bipartite_kernel",
        "merge_bipartite.triton sum_rows_kernel",
    }
    clean = RACECHECK.replace("match_bipartite_kernel", "planted_kernel")
    line = judged("racecheck", clean, "merge_bipartite.native")
    assert line["outcome"] == "ok" and line["warnings"] == 1, line


def test_initcheck_passes_over_the_kernels_of_others():
    line = judged("initcheck", INITCHECK, "token_mlp.triton", named=False)
    assert line["outcome"] == "ok" and (line["errors"], line["elsewhere"]) == (0, 1), line
    silent = "\n".join(INITCHECK.splitlines()[7:])
    assert judged("initcheck", silent, "token_mlp.triton", named=False)["message"] == "the planted fault was not found"


@pytest.mark.parametrize(
    "text, reason",
    [
        ("========= ERROR SUMMARY: 0 errors", ""),
        ("========= ERROR SUMMARY: 3 errors", "3 errors summed up"),
        ("", "the sanitizer did not sum up"),
        (
            "========= Internal Sanitizer Error: something\n========= ERROR SUMMARY: 0 errors",
            "Internal Sanitizer Error",
        ),
    ],
)
def test_silence_is_not_enough(text, reason):
    line = judged("synccheck", f'touched {{"case": "a.triton", "seconds": 1}}\n{text}', "a.triton")
    assert line["message"].startswith(reason) and line["outcome"] == ("failed" if reason else "ok")


#: as much of the sanitizer as the step asks for: it finds the planted fault, and what FAKE says
FAKE = """#!{python}
import json, os, sys
if "--help" in sys.argv:
    print("Version 2025.3.1.0\\n --tool\\n --kernel-name arg\\n --target-processes\\n --error-exitcode\\n --padding")
    raise SystemExit
tool, fake = sys.argv[2], os.environ["FAKE"]
if fake == "refuses":
    print('========= Error: Device not supported. Please refer to the "Supported Devices" section')
    print('touched {{"case": "planted.triton", "seconds": 0.5}}')
    raise SystemExit
assert all("kns=" + name in sys.argv for name in ("8tokenops", "sum_rows_kernel")) == (tool != "initcheck")
if "--planted" in sys.argv and (fake != "follows children" or "all" in sys.argv):
    print('touched {{"case": "planted.triton", "seconds": 0.5}}')
    print("========= Error: Race reported between\\n=========     at planted_kernel+0x110")
for case in sys.argv[sys.argv.index("--cases") + 1 :]:
    if fake == "dies" and case == "merge_bipartite.native":
        sys.exit(3)
    if fake == "fault" and case == "merge_bipartite.native":
        print("========= Invalid __global__ read of size 2 bytes")
        print("=========     at void tokenops::unmerge_bipartite_kernel<x>")
    print("touched", json.dumps({{"case": case, "seconds": 0.1}}), flush=True)
print("========= ERROR SUMMARY: 0 errors" if fake != "fault" else "========= ERROR SUMMARY: 1 error")
"""


@pytest.fixture
def faked(tmp_path, monkeypatch):
    """faked(what): the lines of the tools by a sanitizer that does what."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE.format(python=sys.executable))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    file = Lines(tmp_path / "lines.jsonl", "sanitize")

    def run(what, seconds=100):
        monkeypatch.setenv("FAKE", what)
        sanitize.Step("cuda", seconds, file).sanitize()
        return {line["key"]: line for line in file.read()}

    return run


def test_tools_are_run_and_resumed(faked):
    lines = faked("fault")
    failed = {key for key, line in lines.items() if line["outcome"] == "failed"}
    assert failed == {name for tool in sanitize.TOOLS for name in (tool, f"{tool}/merge_bipartite.native")}
    assert lines["planted/memcheck"]["version"] == ["2025.3.1.0"] and lines["planted/memcheck"]["named"]
    assert (
        lines["memcheck"]["errors"] == 1
        and "unmerge_bipartite_kernel" in lines["memcheck/merge_bipartite.native"]["text"]
    )
    lines = faked("nothing else")
    assert {line["outcome"] for line in lines.values()} == {"ok"}
    assert len(lines) == len(sanitize.TOOLS) * (1 + len(sanitize.cases("cuda"))) + 3
    assert lines["memcheck"]["seconds"] >= 0 and not lines["memcheck"]["said"]


def test_where_a_run_ended_is_told(faked):
    lines = faked("dies")
    assert lines["memcheck/merge_neighbours.triton"]["outcome"] == "ok"
    assert lines["memcheck/merge_bipartite.native"]["message"].startswith("ended in it, 3")
    assert "memcheck/merge_bipartite.triton" not in lines
    assert lines["memcheck"]["message"].startswith("the sanitizer did not sum up; not reached: merge_bipartite.native")


def test_another_form_is_tried(faked):
    lines = faked("follows children")
    assert lines["planted/memcheck"]["processes"] == "all" and lines["memcheck"]["outcome"] == "ok"


def test_a_refusal_skips_the_tools(faked):
    lines = faked("refuses")
    assert set(lines) == {"planted/memcheck", *sanitize.TOOLS}
    assert all(line["outcome"] == "skipped" and "Device not supported" in line["message"] for line in lines.values())


def test_without_time_what_is_needed_has_failed(faked, monkeypatch):
    monkeypatch.setattr(sanitize.Step, "probe", lambda step: ("ok", ""))
    lines = faked("nothing else", seconds=1)
    assert [lines[tool]["outcome"] for tool in sanitize.TOOLS] == ["failed", "failed", "skipped", "skipped"]


def test_without_a_sanitizer_the_tools_are_skipped(faked, monkeypatch):
    monkeypatch.setattr(sanitize, "find", lambda: None)
    assert {line["message"] for line in faked("").values()} == {"there is no compute-sanitizer"}


@pytest.mark.slow
def test_the_planted_kernel_compiles(tmp_path):
    """To a race in shared memory that the assembler takes."""
    program = (
        "import torch\nfrom gpu.touch import planted_kernel\nfrom kernel_cases import compiling\n"
        "x = torch.empty(128, dtype=torch.int32, device='meta')\n"
        "with compiling(90) as compiled:\n    planted_kernel[(1,)](x, x, True)\n"
        "print(compiled[0][1].asm['ptx'])"
    )
    said = python("-c", program, TRITON_CACHE_DIR=tmp_path)
    assert "st.volatile.shared" in said and ".entry planted_kernel" in said


@pytest.mark.slow
def test_launches_are_seen(monkeypatch):
    """With a profiler that sees no GPU, too."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with touch.all_launches("cuda") as names, tokenops.use_backend("triton"):
        tokenops.match_bipartite(torch.randn(1, 5, 3), 1)
    assert names == {"match_bipartite_fwd_kernel"}

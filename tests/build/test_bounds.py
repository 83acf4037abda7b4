"""benchmarks/bounds.py and sass.py: loops of a listing, what a warp issues, the arithmetic, and no loop is missed."""

import importlib
import json
import pkgutil

import pytest

import bounds
import reference_passes
import tokenops.ops.triton
from resources import OF_NOTES, TABLES, read_bounds
from sass import Irreducible, parse
from support.process import python
from tokenops.ops import native

LISTING = """
//--------------------- .text.twice_kernel --------------------------
	.section	.text.twice_kernel,"ax",@progbits
        .size           twice_kernel,(.L_x_1 - twice_kernel)
twice_kernel:
.text.twice_kernel:
	//## File "/somewhere/twice.py", line 7
        /*0000*/                   LDC R1, c[0x0][0x28] ;               /* 0x00000a00ff017b82 */
                                                                        /* 0x000e700000000800 */
.L_x_0:
	//## File "/somewhere/twice.py", line 9
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;     /* 0x0000000402048981 */
                                                                        /* 0x000ea2000c1e1d00 */
        /*0020*/              @!P1 BRA `(.L_x_0) ;                      /* 0xfffffffc00f89947 */
                                                                        /* 0x000fea000383ffff */
        /*0030*/                   EXIT ;                               /* 0x000000000000794d */
                                                                        /* 0x000fea0003800000 */
.L_x_1:
"""


def code(*lines):
    """A kernel of `label:` and `instruction` lines; `instruction |5` stalls for 5 cycles, others for 1."""
    text = [".text.kernel:"]
    for line in lines:
        if line.endswith(":"):
            text.append(f".L_{line}")
            continue
        instruction, _, stall = line.partition(" |")
        upper = int(stall or 1) << 41
        text.append(f"        /*0000*/   {instruction.replace('(', '(.L_')} ; /* 0x{0:016x} */\n /* 0x{upper:016x} */")
    return parse("\n".join(text))["kernel"]


def issued(one, trips, full=()):
    operations, stalls = one.counts(one.executions(trips, full))
    return dict(operations), stalls


def test_a_listing():
    (one,) = parse(LISTING).values()
    assert [i.operation for i in one.instructions] == ["LDC", "LDG.E.128", "BRA", "EXIT"]
    assert [i.stall for i in one.instructions] == [8, 1, 5, 5]
    assert [i.line[1] for i in one.instructions] == [7, 9, 9, 9]
    (loop,) = one.loops
    assert one.block(loop.header) == range(1, 3)
    assert issued(one, [10]) == ({"LDC": 1, "LDG.E.128": 10, "BRA": 10, "EXIT": 1}, 8 + 10 * 6 + 5)


NESTED = code(
    "S2R R0, SR_TID.X |2",
    "outer:",
    "IADD3 R1, R1, 0x1, RZ |4",
    "inner:",
    "FADD R2, R2, R3 |3",
    "@P0 BRA `(inner) |5",
    "@P1 BRA `(around)",
    "MUFU.EX2 R4, R4",
    "around:",
    "@P2 BRA `(outer)",
    "EXIT",
)


def test_nested_loops_and_what_a_branch_skips():
    assert [loop.depth for loop in NESTED.loops] == [0, 1]
    operations, stalls = issued(NESTED, [3, 4])
    assert operations == {"S2R": 1, "IADD3": 3, "FADD": 12, "BRA": 12 + 3 + 3, "EXIT": 1}
    assert stalls == 2 + 3 * 4 + 12 * (3 + 5) + 3 + 3 + 1


@pytest.mark.parametrize("trips, times", ((0, 0), (0.25, 0.25), (6, 1)))
def test_what_leads_to_a_loop_runs_if_the_loop_does(trips, times):
    one = code("@P0 BRA `(end)", "MOV R1, R2", "loop:", "FADD R1, R1, R1", "@P1 BRA `(loop)", "end:", "EXIT")
    assert issued(one, [trips])[0] == pytest.approx(
        {"BRA": 1 + trips, "EXIT": 1} | ({"MOV": times, "FADD": trips} if trips else {})
    )


def test_the_fullest_way():
    for wide in ("LDG.E.128", "LDSM.16.M88.4"):
        lines = ("loop:", "@P0 BRA `(short)", f"{wide} R4", "STG.E.128 R4", "BRA `(next)", "short:", "STG.E.128 R4")
        one = code(*lines, "next:", "@P1 BRA `(loop)", "EXIT")
        assert issued(one, [2])[0] == {"BRA": 4, "EXIT": 1}
        assert issued(one, [2], {0})[0] == {"BRA": 6, wide: 2, "STG.E.128": 2, "EXIT": 1}


def test_branches_of_other_kinds():
    one = code(
        "BSSY B0, `(joined)", "@P0 BRA `(aside)", "FADD R1, R1, R1", "BSYNC B0", "aside:", "FMUL R1, R1, R1",
        "BSYNC B0", "joined:", "BRA.DIV UR4, `(parted)", "back:", "BRX R32 -0x10 (*\"BRANCH_TARGETS .L_a,.L_b\"*)",
        "a:", "MOV R1, R2", "EXIT", "b:", "SEL R1, R2", "@P3 EXIT", "IMAD R1, R1", "EXIT", "parted:",
        "WARPSYNC.ALL", "BRA `(back)",
    )  # fmt: skip
    successors = {one.starts[block]: [one.starts[i] for i in after] for block, after in enumerate(one.successors)}
    assert successors == {
        0: [2, 4], 2: [6], 4: [6], 6: [7], 7: [8, 10], 8: [], 10: [12], 12: [], 14: [7],
    }  # fmt: skip
    assert one.loops == [] and issued(one, [])[0] == {"BSSY": 1, "BRA": 1, "BRA.DIV": 1, "BRX": 1}


def test_a_loop_with_two_entries_is_refused():
    one = code("@P0 BRA `(middle)", "loop:", "FADD R1", "middle:", "FMUL R1", "@P1 BRA `(loop)", "EXIT")
    with pytest.raises(Irreducible, match="several entries"):
        print(one.loops)


def kernel(one, trips, **changed):
    sizes = {"programs": 1000, "warps": 8, "registers": 128, "shared": 40_000}
    return bounds.Kernel(one, trips, **{**sizes, **changed})


@pytest.mark.parametrize(
    "changed, blocks",
    (
        ({}, 2),  # 16 warps of 4096 registers
        ({"registers": 129}, 1),  # given out in units of 256 a warp: 12 warps
        ({"registers": 32, "shared": 0}, 8),  # 64 warps
        ({"registers": 32, "warps": 1, "shared": 0}, 32),
        ({"registers": 32, "shared": 77_000}, 2),  # 1 KiB more a block
    ),
)
def test_resident_blocks(changed, blocks):
    assert bounds.resident(kernel(NESTED, [1, 1], **changed)) == blocks


def test_the_arithmetic():
    one = code(
        "loop:", "HGMMA.64x128x16.F32.BF16 R4 |2", "MUFU.EX2 R1 |4", "FADD R1 |15", "@P0 BRA `(loop) |5", "EXIT |9"
    )
    made = bounds.bound(kernel(one, [100]), bytes=4.3e6)
    # 8 blocks on the busiest multiprocessor: 16 warps a scheduler, in 4 waves of 2 blocks
    assert made["issue"] == pytest.approx(16 * 401 / 1900, abs=0.05)
    assert made["stalls"] == pytest.approx(4 * (100 * 26 + 9) / 1900, abs=0.05)
    assert made["special"] == pytest.approx(16 * 100 * 8 / 1900, abs=0.05)
    # 64 x 128 x 16 products of four warps, 512 a cycle by each of 4 schedulers
    assert made["matrix"] == made["bound"] == pytest.approx(16 * 100 * 64 / 1900, abs=0.05)
    assert made["limit"] == "matrix" and made["bytes"] == 1.0 and made["blocks"] == 2 and made["waves"] == 3.8
    assert bounds.bound(kernel(one, [1]), bytes=8.6e6)["limit"] == "bytes"
    three = bounds.bound(kernel(one, [100], registers=32, shared=60_000), bytes=0)  # 3 of 8 blocks at once: 3 waves
    assert three["stalls"] == pytest.approx(3 * (100 * 26 + 9) / 1900, abs=0.05)


def test_a_matrix_instruction_of_another_kind_is_no_guess():
    one = code("QGMMA.64x128x32.F32.E4M3.E4M3 R4", "HFMA2.MMA R1", "EXIT")
    with pytest.raises(bounds.Unknown, match="QGMMA"):
        bounds.bound(kernel(one, []), bytes=0)


SOURCE = """
def some_kernel(N, K, BLOCK: int, TAIL: int):
    if tile == 0:
        for start in range(0, N, BLOCK):
            pass
    else:
        for start in range(0, limit, BLOCK):
            pass
    if TAIL:
        for step in range(unknown):
            pass
"""


@pytest.fixture
def trips(tmp_path, monkeypatch):
    """Of the one loop of a kernel that says it comes from a line of SOURCE."""
    path = tmp_path / "some.py"
    path.write_text(SOURCE)
    monkeypatch.setitem(bounds.LOCALS, "some_kernel", {"limit": "2 * N"})
    monkeypatch.setitem(bounds.CONDITIONS, ("some_kernel", "tile == 0"), "1 / 4")

    def of(line):
        one = code("loop:", "FADD R1", "@P0 BRA `(loop)", "EXIT")
        one.instructions[:] = [i._replace(line=(str(path), line)) for i in one.instructions]
        return bounds.source_trips("some_kernel", one.loops[0], one, {"N": 100, "BLOCK": 32, "TAIL": 1})

    return of


def test_trips_are_those_of_the_source(trips):
    assert trips(4) == (4, 0.25)  # in a quarter of the programs
    assert trips(7) == (7, 0.75)


@pytest.mark.parametrize("line, words", ((10, "'unknown' is not defined"), (5, "comes from no `for`")))
def test_a_loop_without_trips_is_unknown(trips, line, words):
    with pytest.raises(bounds.Unknown, match=words):
        trips(line)


def test_a_native_kernel_with_other_loops_is_unknown():
    known = bounds.Native(100, "3! >4")
    assert bounds.of_native(NESTED, known, 32, 0).trips == [3, 4]
    assert bounds.of_native(NESTED, known._replace(threads=240), 32, 0).warps == 8
    with pytest.raises(bounds.Unknown, match="2 loops found, 3 known"):
        bounds.of_native(NESTED, known._replace(loops="3 >4 1"), 32, 0)
    with pytest.raises(bounds.Unknown, match="2 loops found, 2 known: 1 >2"):
        bounds.of_native(NESTED, known._replace(loops="3 4"), 32, 0)


def test_an_unknown_bound_is_told(tmp_path):
    one = bounds.PASSES[0]
    (name,) = one.triton
    assert "unknown" in bounds._row(one, name, lambda kernel: bounds.Unknown("3 loops found"), None)
    notes = tmp_path / "NOTES.md"
    notes.write_text("before\n<!-- bounds -->\nold\n<!-- /bounds -->\nbehind\n")
    bounds.fill_notes({f"{one.operator}, {one.name}: {name}": {"unknown": "3 loops found, 2 known"}}, notes)
    text = notes.read_text()
    assert text.startswith("before\n<!-- bounds -->\n| kernel") and text.endswith("|\n<!-- /bounds -->\nbehind\n")
    assert f"| {name} | | | unknown | 3 loops found, 2 known |" in text and "old" not in text


def test_every_kernel_has_a_bound():
    package = tokenops.ops.triton
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert kernels - reference_passes.UNBOUND == {
        name.removesuffix("#2") for one in bounds.PASSES for name in one.triton
    }
    assert {one.native for one in bounds.PASSES if one.native} == set(bounds.NATIVE)


def test_notes_show_the_committed_bounds():
    made = read_bounds(TABLES / f"triton-{OF_NOTES}.json")
    assert bounds.table(made) in bounds.NOTES.read_text()
    for file in TABLES.glob("triton-*.json"):
        names = [f"{one.operator}, {one.name}: {name}" for one in bounds.PASSES for name in one.triton]
        assert [name for name in names if "bound" not in read_bounds(file).get(name, {})] == [], file.name


@pytest.mark.parametrize("one", [one for one in bounds.PASSES if one.products], ids=lambda one: one.operator)
def test_loops_make_the_products_that_there_are(one):
    """Too few trips would leave some out; what tiles are padded by, and what is computed again, is less than thrice."""
    peak = 2 * bounds.PRODUCTS * bounds.SCHEDULERS * bounds.MULTIPROCESSORS * bounds.CLOCK / 1e6  # a microsecond
    for file in TABLES.glob("triton-*.json"):
        rows = [read_bounds(file)[f"{one.operator}, {one.name}: {name}"] for name in one.triton]
        ours = (one.products if one.made is None else one.made) / peak
        assert 1 <= sum(row["matrix"] for row in rows) / ours < 4, file.name


def compiled(tmp_path, *arguments):
    """In a process that does not interpret."""
    return json.loads(python(bounds.__file__, "--json", *arguments, TRITON_CACHE_DIR=tmp_path))


@pytest.mark.slow
def test_the_loops_of_one_operator_are_known(tmp_path):
    made = compiled(tmp_path, "--operators", "restore_tokens")
    rows = {name: row for name, row in made.items() if "unknown" not in row}
    assert len(made) == 4 and len(rows) == (4 if "9.0" in native.info().get("architectures", ()) else 2), made
    # it cannot be quicker than its bytes, and each warp of a row's 128 threads issues some hundred instructions
    assert all(row["bound"] >= row["bytes"] > 15 and 3 < row["issue"] < 100 for row in rows.values()), rows


@pytest.mark.slow
def test_all_loops_are_known(tmp_path):
    made = compiled(tmp_path)
    assert {name: row for name, row in made.items() if "unknown" in row and "<" not in name} == {}
    missing = {name: row for name, row in made.items() if "unknown" in row}
    assert missing == {} or "9.0" not in native.info().get("architectures", ())
    assert len(made) == sum(len(one.triton) + bool(one.native) for one in bounds.PASSES)

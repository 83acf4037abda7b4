"""Machine code as nvdisasm prints it: blocks, loops, and how often a warp issues each instruction, given the trips.

What is counted is a least: a block that some way through its loop goes around (a slow path, a branch not taken, what a
loop that might have no trips is wrapped in) counts only as far as a loop with known trips needs it.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/")
UPPER = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
LABEL = re.compile(r"(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")
WIDE = re.compile(r".*\.128|LDSM\..*\.4")
LINE = re.compile(r'\s*//## File "(.*?)", line (\d+)')


class Instruction(NamedTuple):
    text: str
    stall: int  # cycles until the same warp may issue again, as the assembler wrote them
    line: tuple[str, int] | None = None  # of the source, where the code tells

    @property
    def guarded(self) -> bool:
        return self.text.startswith("@")

    @property
    def operation(self) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @property
    def conditional(self) -> bool:
        """A branch that may fall through: guarded, by a second predicate, uniform or divergent."""
        operands = re.sub(r"^@!?U?P\w+\s+", "", self.text)
        return self.guarded or not re.match(r"BRA\s+`", operands)


@dataclass
class Loop:
    header: int
    latches: list[int]
    blocks: set[int]
    parent: "Loop | None" = None

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else 1 + self.parent.depth


class Irreducible(ValueError):
    pass


@dataclass
class Code:
    """One kernel."""

    instructions: list[Instruction]
    labels: dict[str, int]
    starts: list[int] = field(init=False)

    def __post_init__(self):
        ends = [i + 1 for i, one in enumerate(self.instructions) if self._ends(one)]
        starts = {0, *ends, *self.labels.values()}
        self.starts = sorted(start for start in starts if start < len(self.instructions))

    @staticmethod
    def _ends(one: Instruction) -> bool:
        kind = one.operation.split(".")[0]
        return kind in ("BRA", "BRX", "EXIT", "RET", "BSYNC")

    def block(self, number: int) -> range:
        following = [*self.starts[1:], len(self.instructions)]
        return range(self.starts[number], following[number])

    def joined(self, sync: int) -> int:
        """Where a BSYNC goes: what the innermost BSSY around it says, or the nearest before it."""
        barrier = self.instructions[sync].text.split()[-1]
        pairs = []
        for i, one in enumerate(self.instructions[:sync]):
            if re.search(rf"BSSY\S*\s+{barrier},", one.text):
                pairs.append((i, self.labels[TARGET.search(one.text)[1]]))
        around = [pair for pair in pairs if sync < pair[1]]
        return (around or pairs)[-1][1]

    @cached_property
    def successors(self) -> list[list[int]]:
        number = {start: i for i, start in enumerate(self.starts)}
        following: list[list[int]] = []
        for i in range(len(self.starts)):
            last = self.block(i)[-1]
            one, kind = self.instructions[last], self.instructions[last].operation.split(".")[0]
            targets, falls = [], True
            if one.operation.startswith("BRA.DIV"):
                pass  # the detour of a warp whose lanes have parted
            elif kind == "BRA":
                targets, falls = [number[self.labels[TARGET.search(one.text)[1]]]], one.conditional
            elif kind == "BRX":
                targets, falls = [number[self.labels[label]] for label in re.findall(r"\.L_\w+", one.text)], False
            elif kind == "BSYNC":
                targets, falls = [number[self.joined(last)]], one.guarded
            elif kind in ("EXIT", "RET"):
                falls = one.guarded
            following.append(sorted({*targets, *([i + 1] if falls and i + 1 < len(self.starts) else [])}))
        return following

    def reached(self, start: int, within: set[int] | None = None, without: int | None = None) -> set[int]:
        """Blocks on ways from `start` through some blocks, but not through one of them."""
        seen, left = set(), [start]
        while left:
            block = left.pop()
            if block == without or block in seen or (within is not None and block not in within):
                continue
            seen.add(block)
            left += self.successors[block]
        return seen

    @cached_property
    def alive(self) -> set[int]:
        return self.reached(0)

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops in the order of their code, the outer before the inner."""
        by_header: dict[int, Loop] = {}
        for latch in sorted(self.alive):
            for header in self.successors[latch]:
                if header > latch or latch not in self.reached(header):
                    continue
                if latch in self.reached(0, without=header):
                    raise Irreducible(f"the loop at instruction {self.starts[header]} has several entries")
                loop = by_header.setdefault(header, Loop(header, [], {header}))
                loop.latches.append(latch)
                predecessors = {b: [p for p in self.alive if b in self.successors[p]] for b in self.alive}
                left = [latch]
                while left:
                    block = left.pop()
                    if block not in loop.blocks:
                        loop.blocks.add(block)
                        left += predecessors[block]
        loops = sorted(by_header.values(), key=lambda loop: (loop.header, -len(loop.blocks)))
        for loop in loops:
            outer = [other for other in loops if other is not loop and loop.header in other.blocks]
            loop.parent = min(outer, key=lambda other: len(other.blocks), default=None)
        return loops

    def fullest(self, region: Loop) -> set[int]:
        """The blocks of the way through a loop with the most accesses of 16 bytes, the shortest of these."""
        headers = {loop.header for loop in self.loops}
        inner = set().union(*(loop.blocks for loop in self.loops if loop.parent is region))

        @cache
        def best(block: int) -> tuple[int, int, tuple[int, ...]] | None:
            operations = [self.instructions[i].operation for i in self.block(block)] if block not in inner else []
            wide = sum(bool(WIDE.fullmatch(operation)) for operation in operations)
            ahead = [best(after) for after in self.successors[block] if after in region.blocks - {region.header}
                     and not (after in headers and after <= block)]  # fmt: skip
            ways = [way for way in ahead if way is not None] + ([(0, 0, ())] if block in region.latches else [])
            if not ways:
                return None
            accesses, length, blocks = max(ways, key=lambda way: way[:2])
            return accesses + wide, length - len(operations), (block, *blocks)

        return set(best(region.header)[2])

    def executions(
        self, trips: list[float], full: Collection[int] = (), shares: list[float] | None = None
    ) -> list[float]:
        """How often a warp issues the instructions of each block at least; `trips` of each loop, once it is entered.

        Of the loops that are numbered in `full` the fullest way is taken. `shares` of the warps come to each loop, a
        factor of its trips: without them all warps do, or as many as have a trip.
        """
        share = [0.0] * len(self.starts)
        of_all = Loop(0, [b for b in self.alive if not set(self.successors[b]) & self.alive], self.alive)
        times = {id(of_all): 1.0}
        for loop, count in zip(self.loops, trips, strict=True):
            times[id(loop)] = count * times[id(loop.parent or of_all)]
        for place, region in enumerate((of_all, *self.loops), start=-1):
            coming = zip(self.loops, map(min, shares or trips, trips))
            inner = [(o, min(1.0, count)) for o, count in coming if (o.parent or of_all) is region]
            way = self.fullest(region) if place in full else set()
            for block in region.blocks.difference(*(loop.blocks for loop, _ in inner)) if times[id(region)] else ():
                around = self.reached(region.header, region.blocks, without=block)
                needed = 1.0 if block in way or not around & set(region.latches) else 0.0
                for loop, count in inner:  # what leads to a loop, or away from it, runs when the loop does
                    left = self.reached(loop.header, region.blocks, without=block)
                    if loop.header not in around or not left & set(region.latches):
                        needed = max(needed, count)
                share[block] = needed * times[id(region)]
        return share

    def counts(self, executions: list[float]) -> tuple[Counter, float]:
        """Instructions of each operation that a warp issues, and the cycles it takes with nothing in its way."""
        operations: Counter = Counter()
        cycles = 0.0
        for number, times in enumerate(executions):
            for one in self.block(number) if times else ():
                operations[self.instructions[one].operation] += times
                cycles += times * max(1, self.instructions[one].stall)
        return operations, cycles


def parse(listing: str, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Code]:
    """The kernels of a listing by name."""
    _, *parts = re.split(r"^\.text\.(\S+):$", listing, flags=re.M)
    return {name: _code(part) for name, part in zip(parts[::2], parts[1::2]) if wanted(name)}


def _code(part: str) -> Code:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    line = None
    for text in part.splitlines():
        if found := INSTRUCTION.match(text):
            instructions.append(Instruction(found[1], 0, line))
        elif (upper := UPPER.match(text)) and instructions:
            instructions[-1] = instructions[-1]._replace(stall=int(upper[1], 16) >> 41 & 0xF)
        elif place := LINE.match(text):
            line = (place[1], int(place[2]))
        elif label := LABEL.match(text):
            labels[label[1]] = len(instructions)
    return Code(instructions, labels)


def disassembled(cubin: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Code]:
    command = [TOOLS / "nvdisasm", "--print-code", "--print-instruction-encoding", "--print-line-info", cubin]
    return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout, wanted)

"""compute-sanitizer on every kernel: memcheck and racecheck, and synccheck and initcheck where time is left.

touch.py launches the kernels. It runs by itself first: each case must pass, every kernel be launched, and what Triton
compiles is then in its cache. A planted fault that a tool must find comes before its silence is believed. Where there
is no sanitizer, or it refuses the machine, the tools are skipped. `--device cpu` rehearses: no tool.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu.processes import die_with_parent
from gpu.record import FAILED, OK, SKIPPED, Lines, lines

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
NEEDED = TOOLS[:2]
PLANTED = ("memcheck", "racecheck", "initcheck")  # the tools that touch.py has a fault for
NATIVE = ("select_tokens", "restore_tokens", "merge_neighbours", "merge_bipartite", "sum_rows")  # with CUDA C++ kernels
OPERATORS = (*NATIVE, "masked_channel_attention", "soft_aggregate", "token_mlp")  # as touch.py has them
LEAST = 12  # seconds within which nothing is worth starting
EXIT_CODE = 86  # of the sanitizer that found something

#: how the planted fault is looked for until it is found: the processes that are followed; whether kernels are named
FORMS = (("application-only", True), ("all", True), ("all", False))
#: the option that names kernels, the newest first; all take kns=, a part of the mangled name, and may be repeated
FILTERS = ("--kernel-name", "--kernel-regex", "--filter")


def cases(device: str) -> list[str]:
    native = OPERATORS if device == "cpu" else NATIVE
    return [f"{name}.{backend}" for name in OPERATORS for backend in ("native", "triton")[name not in native :]]


def cuda_kernels() -> set[str]:
    pattern = r"__global__\s+void\s+(?:__launch_bounds__\([^()]*\)\s*)?(\w+)\s*\("
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu*"))
    return {name for source in sources for name in re.findall(pattern, source.read_text())}


def triton_kernels() -> set[str]:
    pattern = r"^@(?:triton\.jit|for_any\([^)]*\))(?:\s+#.*)?\s+def (\w+_kernel)\("
    sources = sorted((ROOT / "tokenops" / "ops" / "triton").glob("*.py"))
    return {name for source in sources for name in re.findall(pattern, source.read_text(), re.MULTILINE)}


def case_of(kernel: str, native: bool) -> str:
    """The case of touch.py that launches a kernel."""
    known = {name: name for name in (*OPERATORS, "planted") if name != "sum_rows"} | {"packed": "sum_rows"}
    operator = next((known[name] for name in known if kernel.startswith(name)), "merge_bipartite")
    return f"{operator}.{'native' if native else 'triton'}"


class Finding:
    """What a tool reports at one place: its lines, and which kernel of ours they name."""

    def __init__(self, title: str) -> None:
        self.lines = [title]

    @property
    def warning(self) -> bool:
        return self.lines[0].lower().startswith("warning")

    def kernel(self, known: set[str]) -> tuple[str, str] | None:
        """(name, case)"""
        for line in self.lines:
            for scope, name in re.findall(r"(tokenops::)?\b(\w+_kernel)\b", line):
                if name in known:
                    return name, case_of(name, bool(scope))
        return None


def number(text: str) -> int:
    return int(re.sub(r"\D", "", text))  # thousands are set apart as the locale has it


class Output:
    """What a process printed, line by line: touch.py's own lines and, behind "=========", the sanitizer's."""

    #: of the sanitizer about itself or the process, not of a kernel
    TALK = (
        r"COMPUTE-SANITIZER$|Target app|Internal Sanitizer|Tracking kernels|Default timeout|Wait for|Try using|"
        r"Program hit|LEAK SUMMARY|(Error|Warning): (?!.*(Race reported|hazard detected))"
    )

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.touched: list[dict[str, Any]] = []
        self.said: list[str] = []
        self.rest: deque[str] = deque(maxlen=30)
        self.total: int | None = None  # of errors, as the sanitizer sums up; None: it did not
        self.unprinted = 0
        self.within = False  # a finding's lines

    def take(self, line: str) -> dict[str, Any] | None:
        """Returns what touch.py said, if that is the line."""
        line = line.rstrip()
        if line.startswith("touched {"):
            self.touched.append(json.loads(line.removeprefix("touched ")))
            return self.touched[-1]
        match = re.match(r"={6,} ?(.*)", line)
        if not match:
            self.rest.append(line)
            return None
        text = match[1]
        if not text.strip():
            self.within = False
        elif text.startswith(" "):
            if self.within:
                self.findings[-1].lines.append(text.strip())
        elif found := re.match(r"ERROR SUMMARY: ([\d.,]+) errors?$", text):
            self.total = number(found[1])
        elif found := re.match(r"ERROR SUMMARY: ([\d.,]+) errors? were not printed", text):
            self.unprinted = number(found[1])
        elif found := re.match(r"RACECHECK SUMMARY: .*\(([\d.,]+) errors?, [\d.,]+ warnings?\)", text):
            self.total = number(found[1]) if self.total is None else self.total
        elif re.match(self.TALK, text):
            self.within = False
            self.said.append(text)
        else:
            self.within = True
            self.findings.append(Finding(text))
        return None

    def complaints(self) -> str:
        """Why there may be nothing, in the sanitizer's words."""
        return "; ".join(text for text in self.said if text != "COMPUTE-SANITIZER")

    def last_words(self) -> str:
        return "\n".join(list(self.rest)[-12:])


def run(command: list[str], device: str, seconds: float, heard: Callable[[dict, Output], None]) -> tuple[Output, int]:
    """Listens to a process to its end, which touch.py makes in time itself; `heard` gets what touch.py said."""
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": str(int(device == "cpu"))}
    if device == "cpu":
        settings["OMP_NUM_THREADS"] = "1"
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | settings,
        preexec_fn=die_with_parent,
    )
    output = Output()
    killer = threading.Timer(seconds + 15, process.kill)
    killer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            done = output.take(line)
            if done is not None:
                heard(done, output)
        return output, process.wait()
    finally:
        killer.cancel()


def touch(device: str, seconds: float, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "gpu.touch", "--device", device, "--seconds", f"{seconds:.0f}", *arguments]


class Step:
    def __init__(self, device: str, seconds: float, file: Lines) -> None:
        self.device, self.file, self.done = device, file, file.done()
        self.ends = time.monotonic() + seconds
        self.known = cuda_kernels() | triton_kernels() | {"planted_kernel"}
        self.marks = {"rehearsal": True} if device == "cpu" else {}

    def left(self) -> float:
        return self.ends - time.monotonic()

    def write(self, key: str, outcome: str, **values: Any) -> None:
        self.file.write(key, outcome, **values, **self.marks)

    def plain(self) -> None:
        """touch.py by itself; on a GPU the operators side by side, since they compile."""
        waiting = [case for case in cases(self.device) if f"plain/{case}" not in self.done]
        groups = [[case for case in waiting if case.startswith(f"{name}.")] for name in OPERATORS]
        groups = [waiting] if self.device == "cpu" else groups
        with ThreadPoolExecutor(len(groups)) as threads:
            list(threads.map(self.plain_cases, [group for group in groups if group]))
        self.launched()

    def plain_cases(self, group: list[str]) -> None:
        def heard(done: dict, output: Output) -> None:
            if done["case"] in group:
                values = {"message": done["failed"]} if "failed" in done else {}
                outcome = FAILED if values else OK
                self.write(f"plain/{done['case']}", outcome, seconds=done["seconds"], kernels=done["kernels"], **values)

        seconds = max(self.left(), LEAST)
        options = ("--launches", "--planted", "none", "--cases", *group)
        output, code = run(touch(self.device, seconds, *options), self.device, seconds, heard)
        for case in missed(group, output)[:1]:
            self.write(f"plain/{case}", FAILED, message=f"ended in it, {code}: {output.last_words()}")

    def launched(self) -> None:
        """Was every kernel launched?"""
        names = {name for line in self.file.read(self.file.step) for name in line.get("kernels", ())}
        native = {name.removeprefix("tokenops::") for name in names if name.startswith("tokenops::")}
        missing = sorted(triton_kernels() - names)
        values: dict[str, Any] = {"triton": len(triton_kernels() & names), "cuda": len(native)}
        if native:
            missing += sorted(f"tokenops::{name}" for name in cuda_kernels() - native)
        else:
            values["message"] = "CUDA C++ kernels were not looked for: " + (
                "a rehearsal" if self.device == "cpu" else "the profiler saw none"
            )
        self.write("launched", FAILED if missing else OK, missing=missing, **values)

    def sanitize(self) -> None:
        waiting = [tool for tool in TOOLS if tool not in self.done]
        if not waiting:
            return
        binary = find()
        if self.device == "cpu" or binary is None:
            reason = "a rehearsal: there is no GPU" if self.device == "cpu" else "there is no compute-sanitizer"
            return self.leave(waiting, SKIPPED, reason)
        self.binary = binary
        self.help = subprocess.run([binary, "--help"], capture_output=True, text=True).stdout
        self.version = re.findall(r"Version ([\d.]+)", self.help)[:1]
        outcome, reason = self.probe()
        if outcome != OK:
            return self.leave(waiting, outcome, reason)
        for tool in waiting:
            if self.left() >= LEAST:
                self.check(tool)
            else:
                self.write(tool, FAILED if tool in NEEDED else SKIPPED, message="no time was left")

    def leave(self, tools: list[str], outcome: str, reason: str) -> None:
        for tool in tools:
            self.write(tool, outcome, message=reason)

    def options(self, tool: str, processes: str, named: bool) -> list[str]:
        """Those of compute-sanitizer that this version has."""
        wanted = {
            "--tool": tool,
            "--target-processes": processes,
            "--launch-timeout": "60",  # torch is long in loading
            "--destroy-on-device-error": "kernel",  # what follows a fault is looked at as well
            "--show-backtrace": "device",
            "--report-api-errors": "no",  # torch tries what it may not have
            "--print-limit": "5000",
            "--error-exitcode": str(EXIT_CODE),
        }
        if tool == "memcheck":
            wanted["--padding"] = "4096"  # between allocations, or what is past one may be in the next
        chosen = [word for option, value in wanted.items() if self.has(option) for word in (option, value)]
        name = next((option for option in FILTERS if self.has(option)), None)
        if named and name:
            parts = ("8tokenops", *sorted(triton_kernels()), "planted_kernel")  # 8tokenops: of our namespace
            chosen += [word for part in parts for word in (name, f"kns={part}")]
        return chosen

    def has(self, option: str) -> bool:
        return re.search(rf"{option}(?![\w-])", self.help) is not None

    def probe(self) -> tuple[str, str]:
        """Finds the form in which memcheck finds the planted fault; the outcome, and why it does not."""
        output = Output()
        for self.processes, self.named in FORMS:
            if self.left() < LEAST:
                break
            seconds = min(self.left(), 45)
            command = [self.binary, *self.options("memcheck", self.processes, self.named)]
            command += touch("cuda", seconds, "--planted", "memcheck", "--cases")
            output, code = run(command, "cuda", seconds, lambda done, output: None)
            if planted(output, self.known):
                self.write("planted/memcheck", OK, found=True, **self.form(), text=texts(output.findings))
                return OK, ""
            if "not supported" in output.complaints():
                break
        failed = [done["failed"] for done in output.touched if "failed" in done]
        refused = not failed and "Error:" in output.complaints()
        outcome = SKIPPED if refused else FAILED  # without complaints it believes that all is well
        reason = "the planted fault was not found: " + "; ".join((output.complaints() or output.last_words(), *failed))
        self.write("planted/memcheck", outcome, found=False, version=self.version, message=reason)
        return outcome, reason

    def form(self) -> dict[str, Any]:
        return {"version": self.version, "processes": self.processes, "named": self.named}

    def check(self, tool: str) -> None:
        """A line for each case of a tool as soon as the next one has begun, and one for the tool."""
        waiting = [case for case in cases(self.device) if f"{tool}/{case}" not in self.done]
        written: set[str] = set()

        def settle(done: dict, output: Output) -> None:
            case, found = done["case"], []
            for finding in output.findings:
                place = finding.kernel(self.known)
                if place and place[1] == case and not finding.warning:
                    found.append(finding)
            if case in waiting and case not in written:
                written.add(case)
                values = {"message": done["failed"]} if "failed" in done else {}
                values |= {"text": texts(found)} if found else {}
                outcome = FAILED if values else OK
                self.write(f"{tool}/{case}", outcome, seconds=done["seconds"], errors=len(found), **values)

        def heard(done: dict, output: Output) -> None:
            for before in output.touched[:-1]:
                settle(before, output)

        # what initcheck does not follow would be unwritten to it, so it follows torch's kernels too
        named = self.named and tool != "initcheck"
        seconds = self.left() * (0.6 if tool == "memcheck" else 1)
        arguments = ("--planted", tool) if tool in PLANTED and tool != "memcheck" else ()
        command = [self.binary, *self.options(tool, self.processes, named)]
        command += touch("cuda", seconds, *arguments, "--cases", *waiting)
        began = time.monotonic()
        output, code = run(command, "cuda", seconds, heard)
        for done in output.touched:
            settle(done, output)
        for case in missed(waiting, output)[:1]:
            self.write(f"{tool}/{case}", FAILED, message=f"ended in it, {code}: {output.last_words()}")
        if tool in PLANTED and tool != "memcheck":
            found = planted(output, self.known)
            self.write(f"planted/{tool}", OK if found else FAILED, found=found)
        seconds = round(time.monotonic() - began, 1)
        self.write(tool, **verdict(tool, output, self.known, waiting, named), code=code, seconds=seconds, **self.form())


def missed(wanted: list[str], output: Output) -> list[str]:
    touched = {done["case"] for done in output.touched}
    return [case for case in wanted if case not in touched]


def planted(output: Output, known: set[str]) -> bool:
    return any((finding.kernel(known) or ("",))[0] == "planted_kernel" for finding in output.findings)


def texts(findings: list[Finding]) -> str:
    return "\n\n".join("\n".join(finding.lines[:6]) for finding in findings[:5])


def verdict(tool: str, output: Output, known: set[str], wanted: list[str], named: bool) -> dict[str, Any]:
    """What a tool's output comes to, as values of its line."""
    errors, warnings, elsewhere = [], [], 0
    kernels: Counter[str] = Counter()
    for finding in output.findings:
        place = finding.kernel(known)
        if place and place[0] == "planted_kernel":
            continue
        if place is None and not named:
            elsewhere += 1
            continue
        (warnings if finding.warning else errors).append(finding)
        kernels[f"{place[1]} {place[0]}" if place else "unknown"] += 1
    reasons = []
    if output.total is None:
        reasons.append("the sanitizer did not sum up")
    if missing := missed(wanted, output):
        reasons.append(f"not reached: {', '.join(missing)}")
    if failed := [done["case"] for done in output.touched if "failed" in done and "planted" not in done["case"]]:
        reasons.append(f"failed: {', '.join(failed)}")
    if untracked := [text for text in output.said if text.startswith("Internal Sanitizer")]:
        reasons.append(untracked[0])
    if tool in PLANTED and tool != "memcheck" and not planted(output, known):
        reasons.append("the planted fault was not found")
    if errors:
        reasons.insert(0, f"{len(errors)} errors")
    elif output.total and (tool not in PLANTED or tool == "memcheck"):
        reasons.append(f"{output.total} errors summed up")
    return {
        "outcome": FAILED if reasons else OK,
        "errors": len(errors),
        "warnings": len(warnings),
        "elsewhere": elsewhere,
        "total": output.total,
        "unprinted": output.unprinted,
        "kernels_found": dict(kernels),
        "text": texts(errors or warnings),
        "said": output.complaints(),
        "message": "; ".join(reasons),
    }


def find() -> str | None:
    """compute-sanitizer: on the PATH, or in a CUDA toolkit."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    homes += [Path(nvcc).resolve().parents[1]] if nvcc else []
    homes += [Path("/usr/local/cuda")]
    folders = [str(home / place) for home in homes for place in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=150, help="all together")
    options = parser.parse_args()
    step = Step(options.device, options.seconds, lines("sanitize"))
    step.plain()
    step.sanitize()


if __name__ == "__main__":
    main()

"""Result files: rows by name, the runs they came from, and what else ran on the device."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def store(path: Path, runs: Mapping[str, Any], rows: Mapping[str, Any], evidence: Mapping[str, Any] = {}) -> None:
    """Merge rows into a result file; earlier ones stay, with the run they came from."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    parts = {
        "runs": kept.get("runs", {}) | runs,
        "rows": kept.get("rows", {}) | rows,
        "evidence": kept.get("evidence", {}) | evidence,
    }
    used = {row["run"] for part in ("rows", "evidence") for row in parts[part].values()}
    parts["runs"] = {run: facts for run, facts in parts["runs"].items() if run in used}
    texts = (
        f"{json.dumps(part)}: {{\n"
        + ",\n".join(f"{json.dumps(key)}: {json.dumps(values[key])}" for key in sorted(values))
        + "\n}"
        for part, values in parts.items()
        if values
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{" + ",\n".join(texts) + "}\n")


def rounded(value: Any) -> Any:
    """Floats to four digits, all the way down."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def slug_of(name: str, device: str) -> str:
    """A device's name as that of a file: nvidia-h200, cpu-amd-epyc."""
    name = re.sub(r"\((R|TM)\)|@.*|\bCPU\b|\bProcessor\b", " ", name, flags=re.IGNORECASE)
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(words if device == "cuda" else ["cpu", *words])


def strongest(row: Mapping[str, Any]) -> str:
    """Of the dense forms in a model's row the one that ours is least ahead of."""
    return min((n for n, peer in row["peers"].items() if "realised" in peer), key=lambda n: row["peers"][n]["ratio"][0])

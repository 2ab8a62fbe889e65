"""`python -m benchmarks [NAME ...]`: measure, print one JSON line a claim, and exit with 0 if all hold.

Each benchmark is a module with `claims()`, which yields dicts: claim, ours, peer, unit, ratio (> 1 always means
that ours is better), goal, holds. Both arms run in one go on the same data: ratios travel between machines, seconds
do not.
"""

import json
import os
import pkgutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import benchmarks
from cadx import SPINS


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all of them; 0 if every claim holds."""
    known = sorted(
        m.name for m in pkgutil.iter_modules([str(Path(benchmarks.__file__).parent)]) if m.name[0] != "_"
    )
    if unknown := sorted(set(names) - set(known)):
        print(
            f"benchmarks: no benchmark {', '.join(unknown)}; there are: {', '.join(known)}", file=sys.stderr
        )
        return 2
    for name, value in SPINS.items():
        os.environ.setdefault(name, value)  # as `cadx` does
    rows: list[dict[str, Any]] = []
    silent = []
    for name in names or known:
        before = len(rows)
        for claim in import_module(f"benchmarks.{name}").claims():
            print(json.dumps(claim), flush=True)
            rows.append(claim)
        if len(rows) == before:
            silent.append(name)
    table = Table("claim", "ours", "peer", "unit", "ratio", "goal", "holds")
    for row in rows:
        numbers = [f"{row[key]:.4g}" for key in ("ours", "peer")]
        table.add_row(
            row["claim"],
            *numbers,
            row["unit"],
            f"{row['ratio']:.2f}",
            f"{row['goal']:.2f}",
            "yes" if row["holds"] else "NO",
        )
    Console(stderr=True).print(table)
    if silent:
        print(f"benchmarks: nothing was measured by {', '.join(silent)}", file=sys.stderr)
    return 0 if all(row["holds"] for row in rows) and not set(silent) & set(names) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

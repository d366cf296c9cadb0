"""Run the benchmarks and write what they measured into the table of benchmarks/README.md.

    python benchmarks/run.py                        # all of them
    python benchmarks/run.py head_only ddp_step     # some: the other rows stay as they are
    python benchmarks/run.py --table-only           # write the tables again from benchmarks/results.json

Each benchmark is a program of its own, which one can run alone. Their figures stand in results.json, with the date, the
machine and the versions; the tables here and in the project's README are written from it and nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _common import Figure

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"

BENCHMARKS = (
    "gradual_unfreezing",
    "head_only",
    "validation_heavy",
    "lp_ft",
    "dynamic_padding",
    "transition_restore",
    "checkpoint_size",
    "scale",
    "restore_scale",
    "callback_overhead",
    "compiled",
    "ddp_step",
)
IN_README = ("gradual_unfreezing", "head_only", "validation_heavy", "lp_ft", "callback_overhead", "ddp_step")


def processor() -> str:
    """Name the processor, and how many threads it runs."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} threads"


def conditions() -> dict[str, str]:
    """When and where figures were measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": processor(),
        "load": f"{os.getloadavg()[0]:.1f}",
        "versions": f"Python {platform.python_version()}, torch {version('torch')}, Lightning {version('lightning')}",
    }


def measure(name: str, extra: list[str]) -> dict[str, Any]:
    """Run one benchmark; what it says besides its figures goes to the terminal."""
    where = conditions()
    command = [sys.executable, str(HERE / f"{name}.py"), "--json", *extra]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for line in lines:
        print(Figure(**line).line(), file=sys.stderr, flush=True)
    return {**where, "figures": lines}


def table(results: dict[str, Any], names: tuple[str, ...]) -> str:
    """Write figures as a table: claim, ratio with its spread, limit, goal."""
    lines = ["| claim | measured: median (quartiles) | limit | goal | |", "|---|---|---|---|---|"]
    for name in names:
        for line in results.get(name, {"figures": []})["figures"]:
            figure = Figure(**line)
            claim = f"[{figure.claim}]({name}.py)"
            lines.append(
                f"| {claim} | {figure.measured} | {figure.best} | {figure.aim} | {'' if figure.met else 'missed'} |"
            )
    return "\n".join(lines)


def footnotes(results: dict[str, Any], names: tuple[str, ...]) -> str:
    """Say when, on what and with which versions the figures of a table were measured, and what to know of them."""
    measured = [results[name] for name in names if name in results]
    notes = [
        f"- {figure['claim']}: {figure['note']}." for each in measured for figure in each["figures"] if figure["note"]
    ]
    where = sorted({f"{each['date']}, {each['machine']}, {each['versions']}" for each in measured})
    return "\n".join([*notes, "", "Measured: " + "; ".join(where) + "."]).strip()


def write(path: Path, text: str) -> bool:
    """Put text between the marks of a page, if it has them."""
    page = path.read_text(encoding="utf-8")
    if BEGIN not in page:
        return False
    before, _, rest = page.partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return True


def write_tables(results: dict[str, Any]) -> None:
    """Write the tables of both pages."""
    write(HERE / "README.md", f"{table(results, BENCHMARKS)}\n\n{footnotes(results, BENCHMARKS)}")
    shown = table(results, IN_README).replace("](", "](benchmarks/")
    write(HERE.parent / "README.md", f"{shown}\n\n{footnotes(results, IN_README)}")


def main() -> int:
    """Run, and write; 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--table-only", action="store_true")
    arguments, extra = parser.parse_known_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"expected names of benchmarks, got {', '.join(sorted(unknown))}")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    failed = []
    for name in () if arguments.table_only else arguments.names or BENCHMARKS:
        try:
            results[name] = measure(name, extra)
        except subprocess.CalledProcessError as error:
            failed.append(f"{name}: exit status {error.returncode}")
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_tables(results)
    print("\n".join([table(results, BENCHMARKS), footnotes(results, BENCHMARKS), *failed]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

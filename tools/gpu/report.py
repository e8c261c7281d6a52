"""The report of a check: report.json, and report.md with one table of all measurements."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu.files import replace_text

DETAILS = "\n## Details\n"


def write_report(report: dict[str, Any], output: Path) -> None:
    """Write both files; each is whole whenever it is read."""
    replace_text(output / "report.json", json.dumps(report, indent=1))
    replace_text(output / "report.md", markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    stages = report["stages"]
    statuses = [stage["status"] for stage in stages]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in ("passed", "failed", "skipped", "not run"))
    words = " A rehearsal on a CPU at tiny size: no number here is a result." if report["rehearsal"] else ""
    lines = [
        f"# GPU check, {report['date']}, stages: {counts}",
        "",
        f"`{report['command']}`.{words}",
        "",
        "| stage | measurement | status | result |",
        "|---|---|---|---|",
        *(_row(*cells) for stage in stages for cells in _rows(stage)),
    ]
    details = [line for stage in stages for line in _details(stage)]
    if details:
        lines += [DETAILS.strip("\n"), *details]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in cells)} |"


def _rows(stage: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """The row of the stage, then one for each measurement."""
    spent = f"{stage['seconds']:.0f} s of {stage['limit_s']:.0f}" if stage["limit_s"] else ""
    yield f"**{stage['name']}**", "", f"**{stage['status']}**", "; ".join(filter(None, [spent, stage["line"]]))
    for each in stage["measurements"]:
        yield stage["name"], each["name"], each["status"], each["line"]


def _details(stage: dict[str, Any]) -> Iterator[str]:
    """The tables of a stage's measurements, and the last lines of one that failed."""
    for each in stage["measurements"]:
        for table in each["tables"]:
            yield from ("", f"### {stage['name']}, {each['name']}: {table['title']}", "")
            yield from (_row(*table["columns"]), f"|{'---|' * len(table['columns'])}")
            yield from (_row(*row) for row in table["rows"])
    if stage["last_lines"]:
        yield from ("", f"### {stage['name']}: last lines", "", "```", *stage["last_lines"], "```")

"""What every benchmark prints: the machine, a table, and as its last line everything as JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from llamagen_unitok.evaluation.provenance import code_version, command_line

COLUMN_WIDTH = 7  # at least, of a table whose rows are printed as they come
BUSY_LOAD = 0.3  # load average above which a CPU figure is not worth much


def machine(device: torch.device) -> dict[str, Any]:
    """Processor or GPU, threads, torch, date, load, code version and command."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "load": round(os.getloadavg()[0], 2),
        "code": code_version(),
        "command": command_line(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def warn_if_busy(facts: dict[str, Any], device: torch.device) -> None:
    if device.type == "cpu" and facts["load"] > BUSY_LOAD:
        print(f"the machine is busy (load {facts['load']}): take ratios only, and wide", file=sys.stderr)


def print_report(facts: dict[str, Any], rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """The facts in a line, the rows as a Markdown table, and all of it as one JSON line.

    columns: key of a row → format of its value; a key that a row lacks prints as a dash.
    """
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}, {facts['code']}")
    cells = [[_cell(row.get(key), spec) for key, spec in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(list(columns), *cells, strict=True)]
    print_header(columns, widths)
    for row in cells:
        _print_line(row, widths)
    print_json(facts, rows)


def print_header(columns: dict[str, str], widths: list[int] | None = None) -> None:
    """The two lines that a Markdown table begins with."""
    widths = [max(len(name), COLUMN_WIDTH) for name in columns] if widths is None else widths
    _print_line(list(columns), widths)
    _print_line(["-" * width for width in widths], widths)


def print_row(row: dict[str, Any], columns: dict[str, str]) -> None:
    """One row below a header, as soon as it is known."""
    widths = [max(len(name), COLUMN_WIDTH) for name in columns]
    _print_line([_cell(row.get(key), spec) for key, spec in columns.items()], widths)


def print_json(facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    print(json.dumps({**facts, "rows": [{key: _rounded(value) for key, value in row.items()} for row in rows]}))


def _print_line(cells: list[str], widths: list[int]) -> None:
    print("| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |", flush=True)


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _cell(value: Any, spec: str) -> str:
    return "–" if value is None else format(value, spec)

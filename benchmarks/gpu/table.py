"""What a run found, as text for the screen and as the GPU section of RESULTS.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import last_line
from benchmarks.measure import table

BEGIN = "<!-- begin: written by `python -m benchmarks gpu --write-results` -->"
END = "<!-- end: written by `python -m benchmarks gpu --write-results` -->"
Row = tuple[str, ...]


def as_text(found: Mapping[str, Any]) -> str:
    """The device, then a table for each part."""
    lines = [about(found)]
    for number, part in found["parts"].items():
        lines += ["", f"{number} {part['title']}: {_status(part)}"]
        rows = rows_of(number, part["results"])
        if len(rows) > 1:
            lines.append(table(rows))
        lines += [f"  {name}: {why}" for name, why in _missing(part["results"])]
    return "\n".join(lines)


def as_markdown(found: Mapping[str, Any]) -> str:
    """A section for RESULTS.md: a heading, the device, then a table for each part."""
    lines = [f"## `python -m benchmarks gpu`, {_device(found)}, {found['date']}", "", about(found)]
    if found["settings"]["device"] == "cpu":
        lines += ["", "**Run with `--device cpu` at small sizes: these numbers mean nothing.**"]
    for number, part in found["parts"].items():
        lines += ["", f"### Part {number}: {part['title']} ({_status(part)})", ""]
        header, *rows = rows_of(number, part["results"])
        if rows:
            lines += [_line(header), _line(("---",) * len(header)), *map(_line, rows)]
        missing = [f"- {name}: {why}" for name, why in _missing(part["results"])]
        lines += ["", *missing] if rows and missing else missing
    return "\n".join(lines) + "\n"


def write_section(found: Mapping[str, Any], path: Path) -> None:
    """Replace the text between the two markers of the file.

    Raises:
        SystemExit: the markers are not there, once each, in this order.
    """
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise SystemExit(f"{path} must have the lines {BEGIN!r} and {END!r} once each, in this order.")
    path.write_text(f"{before}{BEGIN}\n{as_markdown(found)}{END}{after}", encoding="utf-8")


def about(found: Mapping[str, Any]) -> str:
    """Device, versions, commit and command in one line."""
    environment = found.get("environment") or {}
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    return (
        f"{_device(found)}, CUDA {environment.get('cuda')}, {environment.get('cores')} cores of "
        f"{environment.get('processor')}, Python {environment.get('python')}, {versions}; commit "
        f"{environment.get('commit')}; `{found['command']}`"
    )


def rows_of(number: str, results: Mapping[str, Any]) -> list[Row]:
    """The table of a part, header first; cases without numbers are left out."""
    known = {name: value for name, value in results.items() if not _why(value)}
    try:
        return _TABLES.get(number, _timings)(known)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # the numbers are safe in the file
        return [("no table", ""), ("it could not be made of these results", last_line(error))]


def _device(found: Mapping[str, Any]) -> str:
    return str((found.get("environment") or {}).get("gpu") or "CPU")


def _status(part: Mapping[str, Any]) -> str:
    error = f": {part['error']}" if "error" in part else ""
    return f"{part['status']} after {part['seconds']:.0f} s{error}"


def _why(value: Any) -> str | None:
    """Why a case has no numbers, or None if it has."""
    kinds = ("error", "skipped", "not here")
    return next((f"{kind}: {value[kind]}" for kind in kinds if isinstance(value, dict) and kind in value), None)


def _missing(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, why) for name, value in results.items() if (why := _why(value)) is not None]


def _line(row: Row) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _milliseconds(timing: Mapping[str, Any]) -> str:
    """Median and spread."""
    how = f", {timing['by']}" if timing.get("by", "graph") != "graph" else ""
    return f"{timing['median'] * 1e3:.3f} ({timing['spread']:.0%}{how})"


def _ceilings(results: Mapping[str, Any]) -> list[Row]:
    peaks = results.get("device", {}).get("peaks", {})
    rows: list[Row] = [("ceiling", "measured", "data sheet")]
    for name, value in results.items():
        for unit, key in (("TFLOP/s", "tflops"), ("GB/s", "gb_per_second")):
            if key in value:
                sheet = peaks.get(name.removeprefix("product ") if key == "tflops" else key)
                rows.append((name, f"{value[key]:.4g} {unit}", "" if sheet is None else f"{sheet:g} {unit}"))
    return rows


def _compilation(results: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = [("kernel", "seconds to compile", "registers", "spilled bytes", "shared bytes")]
    for name, value in results.items():
        if "registers" in value:
            numbers = (str(value[column]) for column in ("registers", "spilled bytes", "shared bytes"))
            rows.append((name, f"{value['seconds']:.1f}", *numbers))
        else:
            rows.append((f"{name}: {value['summary']}", f"{value['seconds']:.1f}", "", "", ""))
    return rows


def _timings(results: Mapping[str, Any]) -> list[Row]:
    """A row for each contestant of each case; ratios to the first of its case."""
    rows: list[Row] = [("case", "contestant", "ms (spread)", "time, first = 1", "")]
    for case, value in results.items():
        groups = {"": value} | {f"{name}: ": one for name, one in value.items() if name in ("forward", "backward")}
        for prefix, group in groups.items():
            leaves = {
                name: one for name, one in group.items() if isinstance(one, dict) and ("median" in one or _why(one))
            }
            first = next((one["median"] for one in leaves.values() if "median" in one), None)
            for name, one in leaves.items():
                median = one.get("median")
                notes = [_why(one) or "", *_notes(one)]
                if prefix and one is group.get("kernel") and median is not None:
                    notes += _of_kernel(value, prefix.removesuffix(": "))
                rows.append(
                    (
                        case,
                        prefix + name,
                        "" if median is None else _milliseconds(one),
                        f"{median / first:.2f}" if median and first else "",
                        "; ".join(note for note in notes if note),
                    )
                )
    return rows


def _notes(one: Mapping[str, Any]) -> list[str]:
    off = one.get("off")
    notes = [] if off is None else ["off by " + ", ".join(f"{name} {value:.1e}" for name, value in off.items())]
    return notes + ([f"no graph: {one['no graph']}"] if "no graph" in one else [])


def _of_kernel(case: Mapping[str, Any], way: str) -> list[str]:
    notes = [f"{case[f'{way} GB/s']:.0f} GB/s at least"]
    projected = case.get("projection for A10G", {}).get(way)
    return notes + ([] if projected is None else [f"A10G, projected: {projected * 1e3:.3f} ms"])


def _steps(results: Mapping[str, Any]) -> list[Row]:
    compiled = any("seconds to compile" in value for value in results.values())
    rows: list[Row] = [
        ("step", "images/s", "ms a step (spread)", "GiB", "kernels", "busy", "of the peak", "A10G, projected images/s")
        + (("seconds to compile", "graphs after the first round") if compiled else ())
    ]
    for name, value in results.items():
        seconds = value["seconds"]
        share, projected = value.get("share of peak"), value.get("projection for A10G")
        row = (
            name,
            f"{value['images per second']:.1f}",
            f"{seconds['median'] / value['steps'] * 1e3:.1f} ({seconds['spread']:.0%})",
            f"{value['peak memory in bytes'] / 2**30:.2f}",
            str(value.get("kernels", "")),
            f"{value['busy']:.0%}" if "busy" in value else "",
            "" if share is None else f"{share:.1%}",
            "" if projected is None else f"{projected['images per second']:.1f}",
        )
        if compiled:
            row += (f"{value['seconds to compile']:.0f}", str(value["graphs after the first round"]))
        rows.append(row)
    return rows


def _fit(results: Mapping[str, Any]) -> list[Row]:
    shown = {
        "images per second": "{:.1f}",
        "seconds_per_batch": "{:.3f}",
        "batch_size": "{}",
        "waiting": "{:.0%}",
        "seconds_per_val_image": "{:.3f}",
        "seconds_to_start": "{:.1f}",
        "seconds of fit": "{:.0f}",
    }
    found = results.get("fit", {})
    return [("fit", "")] + [(name, form.format(found[name])) for name, form in shown.items() if name in found]


def _profile(results: Mapping[str, Any]) -> list[Row]:
    shown = re.compile(r"Duration|Registers|Occupancy|Throughput|Hit Rate|Issued|Eligible|Grid Size")
    found = results.get("backward kernel", {})
    return [("metric", "value")] + [(name, value) for name, value in found.items() if shown.search(name)]


_TABLES: dict[str, Callable[[Mapping[str, Any]], list[Row]]] = {
    "0": _ceilings,
    "1": _compilation,
    "4": _steps,
    "5": _steps,
    "8": _fit,
    "10": _profile,
}

"""Indexing, opening and reading a JSON file of millions of rows, and how each grows.

    python benchmarks/index.py

Files of LLaVA's layout are written into a temporary folder (4 GB for 8 million rows, in the system's cache when they are read). Each
figure is from fresh processes: one that scans the file, one that opens it with the index in place, notes its memory, reads rows at random
and notes its memory again. "Own memory" is what the process cannot share (RssAnon); "with mapped pages" adds those of the index that it
touched, which all processes share (VmRSS). What is said of 16 million rows is not measured: seconds and bytes of a scan and mapped pages
are drawn out along a line through the two sizes that are; the others are those of the larger size.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import arguments, rounded, write

SIZES, EXTRAPOLATED = (2_000_000, 8_000_000), 16_000_000
QUICK_SIZES = (2_000, 8_000)
GOALS = {"build_mb_per_second": 100, "open_seconds": 1.0}
READS = 20_000
_DISTINCT = 20_000  # rows that differ; the file repeats them


def make(path: Path, rows: int) -> None:
    """A file of conversations about images, one a line, or as an array with an indent of 1."""
    draw = random.Random(0)
    array = path.suffix == ".json"
    blocks = []
    for number in range(min(rows, _DISTINCT)):
        question = '<image>\nWhat are the "colors" of the bus in the image?' + " Answer briefly." * draw.randint(0, 5)
        answer = "The bus in the image is white and red.\n" * draw.randint(1, 9)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        row = {"id": f"{number:012d}", "image": f"coco/train2017/{number:012d}.jpg", "conversations": turns}
        blocks.append(json.dumps(row, indent=1 if array else None))
    glue = ",\n" if array else "\n"
    with path.open("w") as file:
        file.write("[\n" if array else "")
        for start in range(0, rows, _DISTINCT):
            part = glue.join(blocks[: rows - start])
            file.write(part + ("\n" if start + _DISTINCT >= rows and array else glue))
        file.write("]\n" if array else "")


def memory(name: str) -> float:
    """A line of this process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def measure(path: Path, reads: int) -> dict[str, Any]:
    """What one process has to do with a file; the first to come builds the index."""
    from metamorph.data.json_files import JsonArray, JsonLines

    own, peak = memory("RssAnon"), memory("VmHWM")
    start = time.perf_counter()
    rows = (JsonArray if path.suffix == ".json" else JsonLines)(path)
    number = len(rows)
    opened = time.perf_counter() - start
    found = {"number": number, "seconds": opened, "own_mib": memory("RssAnon") - own, "peak_mib": memory("VmHWM") - peak}
    draw, both = random.Random(1), memory("VmRSS")
    rows[0]
    seconds = []
    for _ in range(reads):
        index = draw.randrange(number)
        start = time.perf_counter()
        rows[index]
        seconds.append(time.perf_counter() - start)
    found |= {"own_after_mib": memory("RssAnon") - own, "rss_after_mib": memory("VmRSS") - both}
    return found | ({"read_us": statistics.median(seconds) * 1e6} if seconds else {})


def apart(path: Path, reads: int) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(path), "--reads", str(reads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def row_of(path: Path, number: int, repeats: int, reads: int) -> dict[str, Any]:
    """All figures of one file."""
    make(path, number)
    index = path.with_name(f"{path.name}.index")
    built = []
    for _ in range(repeats):
        index.unlink(missing_ok=True)
        built.append(apart(path, 0))
    opened = [apart(path, reads) for _ in range(repeats)]
    assert all(found["number"] == number for found in built + opened), "every row must be found"
    size, seconds = path.stat().st_size, statistics.median(found["seconds"] for found in built)

    def middle(key: str) -> float:
        return rounded(statistics.median(found[key] for found in opened))

    return {
        "layout": "array" if path.suffix == ".json" else "lines",
        "rows": number,
        "measured": "yes",
        "file_mb": rounded(size / 1e6),
        "index_mb": rounded(index.stat().st_size / 1e6),
        "build_seconds": rounded(seconds),
        "build_mb_per_second": rounded(size / 1e6 / seconds),
        "build_peak_mib": rounded(statistics.median(found["peak_mib"] for found in built)),
        "open_seconds": middle("seconds"),
        "open_own_mib": middle("own_mib"),
        "read_us": middle("read_us"),
        "own_after_mib": middle("own_after_mib"),
        "rss_after_mib": middle("rss_after_mib"),
        "goals": GOALS,
    }


def drawn_out(small: dict[str, Any], large: dict[str, Any], number: int) -> dict[str, Any]:
    """The figures of more rows: what grows with them along a line, the rest as it is."""
    share = (number - small["rows"]) / (large["rows"] - small["rows"])
    lines = {key: small[key] + share * (large[key] - small[key]) for key in ("file_mb", "index_mb", "build_seconds", "rss_after_mib")}
    speed = lines["file_mb"] / lines["build_seconds"]
    found = {key: rounded(value) for key, value in {**lines, "build_mb_per_second": speed}.items()}
    return {**large, "rows": number, "measured": "extrapolated", **found}


def main() -> None:
    parser = arguments(__doc__, "index")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--reads", type=int, default=READS, help="rows read at random")
    given = parser.parse_args()
    if given.measure is not None:
        print(json.dumps(measure(given.measure, given.reads)))
        return
    sizes, repeats, reads = (QUICK_SIZES, 1, 100) if given.quick else (SIZES, given.repeats, given.reads)
    rows = []
    with tempfile.TemporaryDirectory(prefix="metamorph-index-") as folder:
        for layout, numbers in (("rows.jsonl", sizes), ("rows.json", sizes[:1])):
            for number in numbers:
                path = Path(folder, layout)
                rows.append(row_of(path, number, repeats, reads))
                path.unlink()
    rows.insert(len(sizes), drawn_out(rows[0], rows[1], sizes[-1] * EXTRAPOLATED // SIZES[-1]))
    write(given.out, rows, repeats=repeats, reads=reads)


if __name__ == "__main__":
    main()

"""The rhythm of our notebooks beside that of well-known courses, from the stored notebooks alone.

python benchmarks/rhythm.py [FOLDER …]        (default: lessons)

Words are those of the prose, without what is folded away (hints, solutions). Lines are non-blank lines of a code cell, as a median. Checks are
assertions, fastcore's tests and `check(…)`. Seconds are what the lesson itself said at its end when it was stored.
"""
import json, re, statistics, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = [  # means over their notebooks, counted in autumn 2026: cells, words, median lines, pictures, checks, exercises ('–': none)
    ("course22p2 (miniai), 36", 61, 173, 2.4, 7.5, 1, "–"), ("fastcore, 20", 131, 1123, 3.9, .2, 76, "–"), ("claudette, 4", 115, 962, 2.2, .5, 1, "–"),
    ("rasbt, LLM chapters, 8", 109, 2374, 6, 1.4, .6, "in the book"), ("ARENA exercises, 34", 130, 16243, 19, 0, 20, "yes"),
    ("GPU-Puzzles, 1", 72, 952, 3, 17, 14, "14"), ("smol-course, 10", 13, 336, 9, .1, 0, "yes")]


def lines(source: str) -> int: return sum(bool(line.strip()) for line in source.splitlines())


def measure(path: Path) -> tuple:
    "Cells, words, median lines, pictures, checks, exercises and seconds of a stored notebook"
    cells = json.loads(path.read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    sources, shown = ["".join(cell["source"]) for cell in code], [output.get("data", {}) for cell in code for output in cell["outputs"]]
    pictures = sum("image/png" in data or "<svg" in "".join(data.get("text/html", "")) for data in shown)
    checks = sum(len(re.findall(r"^ *assert |\btest_\w+\(|^check\(", source, re.M)) for source in sources)
    seconds = [found[1] for data in shown if (found := re.match(r"'(\d+) seconds \(", "".join(data.get("text/plain", ""))))]
    return (len(cells), len(re.sub(r"<details>.*?</details>", "", text, flags=re.S).split()), statistics.median(map(lines, sources)), pictures, checks,
            len(re.findall(r"^### Exercise", text, re.M)) or "–", seconds[-1] if seconds else "–")


def main() -> None:
    rows = [("notebook", "cells", "words", "lines", "pictures", "checks", "exercises", "seconds")]
    for folder in sys.argv[1:] or ["lessons"]: rows += [(path.stem, *measure(path)) for path in sorted((ROOT / folder).glob("*.ipynb"))]
    rows += [(*peer, "") for peer in PEERS]
    for name, *numbers in rows: print(f"{name:26}" + "".join(f"{number:>12}" for number in numbers))


if __name__ == "__main__": main()

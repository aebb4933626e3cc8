"""Turn the JSON of pytest-benchmark into the tables of docs/benchmarks.md.

Usage: ``python -m pytest tests/benchmarks --benchmark-json=results.json`` and then
``python tests/benchmarks/report.py results.json``.
"""

import json
import sys
from itertools import groupby


def main(path: str) -> None:
    """Print one Markdown table per group of rows."""
    with open(path) as file:
        rows = json.load(file)["benchmarks"]
    for name, group in groupby(rows, key=lambda row: row["name"].partition("[")[0]):
        print(f"\n### {name}\n\n| row | median s | min s | accuracy |\n| --- | --- | --- | --- |")
        for row in group:
            label = row["name"].partition("[")[2].rstrip("]")
            stats = row["stats"]
            accuracy = row["extra_info"].get("accuracy", "")
            print(f"| {label} | {stats['median']:.4f} | {stats['min']:.4f} | {accuracy} |")


if __name__ == "__main__":
    main(sys.argv[1])

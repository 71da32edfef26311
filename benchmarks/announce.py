"""Entry points of this checkout for a Python environment in which it is not installed.

``python benchmarks/announce.py FOLDER`` writes ``flashdreams-0.dist-info`` there; with the folder
and the checkout on ``PYTHONPATH``, the shipped slugs are found. Needs Python 3.11.
"""

import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def announce(folder: Path) -> None:
    """Write the metadata of a distribution that has only entry points."""
    import tomllib

    groups = tomllib.loads(PROJECT.read_text())["project"]["entry-points"]
    info = folder / "flashdreams-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flashdreams\nVersion: 0\n")
    lines = []
    for group, entries in groups.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    announce(Path(sys.argv[1]))

"""Compare the built distributions with the source tree.

::

    python -m tests.distribution dist
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parent.parent
#: What only the source distribution holds.
SOURCE_ONLY = ("tests", "example_project", "docs", "benchmarks")
#: The kinds of file that setuptools forgets when MANIFEST.in does.
KINDS = {".html", ".json", ".mo", ".po", ".py", ".sql", ".typed"}


def _tree(*folders: str) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and path.relative_to(ROOT).parts[1] != "var"
    }


def _wheel(dist: Path) -> set[str]:
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return {name for name in names if not name.split("/")[0].endswith(".dist-info")}


def _sdist(dist: Path) -> set[str]:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = [member.name for member in archive if member.isfile()]
    return {name.partition("/")[2] for name in names}


def main(dist: str) -> int:
    package = _tree("django_meterly")
    wheel, sdist = _wheel(Path(dist)), _sdist(Path(dist))
    problems = {
        "missing in the wheel": package - wheel,
        "too much in the wheel": wheel - package,
        "missing in the sdist": (package | _tree(*SOURCE_ONLY)) - sdist,
        "kinds of file the wheel lacks": KINDS
        - {PurePosixPath(name).suffix for name in wheel},
        "folders the wheel lacks": {
            f"django_meterly/{name}"
            for name in ("migrations", "ledger/migrations")
            if f"django_meterly/{name}/0001_initial.py" not in wheel
        },
        "folders the sdist lacks": {
            folder
            for folder in SOURCE_ONLY
            if not any(name.startswith(f"{folder}/") for name in sdist)
        },
    }
    for problem, names in problems.items():
        for name in sorted(names):
            print(f"{problem}: {name}")
    print(f"{len(wheel)} files in the wheel, {len(sdist)} in the sdist")
    return int(any(problems.values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

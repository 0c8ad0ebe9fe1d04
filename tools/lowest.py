"""The lowest versions that pyproject.toml allows, one requirement a line.

python tools/lowest.py                         the base
python tools/lowest.py pages test > low.txt    and these extras

What has no lower bound is printed without a version, and comes as the newest.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lowest(requirement: str) -> str:
    """`name>=1.2,<2` -> `name==1.2`; `name==1.2` and `name` stay as they are."""
    return requirement.split(",")[0].replace(">=", "==")


def main(extras: list[str]) -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
    optional = project["optional-dependencies"]
    wanted = list(project["dependencies"])
    for extra in extras:
        if extra not in optional:
            print(f"expected an extra of {sorted(optional)}, got {extra!r}", file=sys.stderr)
            return 2
        wanted += optional[extra]
    print(*(lowest(r) for r in wanted if not r.startswith(project["name"])), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

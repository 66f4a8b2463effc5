"""Start the command line, as ``mamldata`` or as ``python -m mamldata``.

This is the only module here that imports from ``cli``: otherwise ``cli`` depends on ``trainer``, and ``trainer`` on
``mamldata``. The command starts here because other packages may be called ``cli``, but not ``mamldata``.
"""

from __future__ import annotations

import sys

from mamldata.siblings import foreign_siblings


def main() -> None:
    """Run the command line, unless Python would import other modules in its place."""
    foreign = list(foreign_siblings())
    if foreign and ("'cli'" in foreign[0] or sys.argv[1:2] != ["doctor"]):
        sys.exit("Error: " + "\n".join(foreign))
    from cli.main import main as start

    start(prog_name="mamldata")


if __name__ == "__main__":
    main()

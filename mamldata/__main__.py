"""Start the command line, as ``mamldata`` or as ``python -m mamldata``.

This is the only module here that imports from ``cli``: everything else depends downwards, ``cli`` on ``trainer`` on
``mamldata``. It starts here because ``cli`` is a name that others use too, and ``mamldata`` is not.
"""

from __future__ import annotations

import sys

from mamldata.siblings import foreign_siblings


def main() -> None:
    """Run the command line, unless Python would run somebody else's modules in place of it."""
    foreign = list(foreign_siblings())
    if foreign and ("'cli'" in foreign[0] or sys.argv[1:2] != ["doctor"]):
        sys.exit("Error: " + "\n".join(foreign))
    from cli.main import main as start

    start(prog_name="mamldata")


if __name__ == "__main__":
    main()

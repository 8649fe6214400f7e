"""Report what this machine lacks before anything is installed. Runs on any Python 3 with the standard library alone.

No f-strings and no annotations: an old Python must run far enough to report that it is too old.
"""

# ruff: noqa: UP032

import os
import shutil
import sys

NEEDED_PYTHON = (3, 11)
NEEDED_DISK_GB = 9  # PyTorch with its libraries takes 5.5 GB, everything else about 2


def main():
    folder = os.path.dirname(os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else ".venv"))
    while not os.path.isdir(folder):  # the environment's folder may not exist yet
        folder = os.path.dirname(folder)
    problems = []
    if sys.version_info[:2] < NEEDED_PYTHON:
        problems.append(
            "Python {}.{} is too old: qwen-distill needs 3.11 or newer; try `make PYTHON=python3.11 ...`".format(
                *sys.version_info[:2]
            )
        )
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < NEEDED_DISK_GB:
        problems.append(
            "only {:.1f} GB free in {}: the environment needs about {} GB; "
            "`make VENV=/other/disk/venv ...` puts it elsewhere".format(free_gb, folder, NEEDED_DISK_GB)
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        problems.append("Python's venv module is missing: on Debian and Ubuntu, `apt install python3-venv`")
    for problem in problems:
        print("error: " + problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

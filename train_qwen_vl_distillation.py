"""The training platform's entry point: the same as `cli distill`; see docs/platform.md."""

import sys

from backend.task.main import main

if __name__ == "__main__":
    sys.exit(main())

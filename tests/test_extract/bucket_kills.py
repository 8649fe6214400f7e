"""A process that has imported everything and forks one `cli extract` for each command line on its standard input.

So that killing an extraction 50 times does not cost 50 times the import of torch. Each line is a JSON list: the file for
the output, then the arguments. The child's process id is printed, then, when it has ended, its status.
"""

from __future__ import annotations

import json
import os
import sys
import traceback


def serve() -> None:
    import s3fs  # noqa: F401
    import timm  # noqa: F401

    import extract.bucket
    import extract.teachers.timm_encoder  # noqa: F401
    from cli import main

    print("ready", flush=True)
    for line in sys.stdin:
        output, *arguments = json.loads(line)
        child = os.fork()
        if not child:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.argv = ["cli", *arguments]
            code = 0
            try:
                main()
            except SystemExit as ended:
                code = int(ended.code or 0)
            except BaseException:
                traceback.print_exc()
                code = 70
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()

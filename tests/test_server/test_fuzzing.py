"""schemathesis against the OpenAPI description of a real server: no answer is a 500 or other than described."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_server.server_process import ServerProcess
from tests.test_server.test_api import TASK

CHECKS = "not_a_server_error,status_code_conformance,response_schema_conformance,use_after_free"
# Event streams have no end; test_api.py reads them.
STREAMS = "events$"
EXAMPLES = "20"


@pytest.mark.slow
def test_no_request_is_answered_with_an_error_of_the_server(folders: Path, tmp_path: Path) -> None:
    server = ServerProcess(folders).start()
    try:
        server.post("/tasks", TASK)
        done = subprocess.run(
            [
                *(
                    sys.executable,
                    "-m",
                    "schemathesis.cli",
                    "run",
                    f"http://127.0.0.1:{server.port}/openapi.json",
                ),
                *("--exclude-path-regex", STREAMS, "--checks", CHECKS, "--max-examples", EXAMPLES),
                *(
                    "--phases",
                    "examples,coverage,fuzzing,stateful",
                    "--warnings",
                    "off",
                    "--no-color",
                    "--seed",
                    "1",
                ),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        tested = re.search(r"Tested: (\d+)", done.stdout)
        assert tested is not None
        assert int(tested[1]) > 20, done.stdout
        assert server.answers()
        log = server.log.read_text()
        assert "Traceback" not in log, log[-5000:]
    finally:
        server.close()

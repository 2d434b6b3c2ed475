"""Starts ranks as forks of a process that holds what MindSpeed-LLM imports from others: most of its start.

Reads one JSON line a run, ``{"argv": [...], "environments": [one of each rank], "log": file, "timeout_s": ...}``, and
answers with the exit code. Nothing of Megatron, MindSpeed or MindSpeed-LLM is imported before the fork.
"""

import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

PRELOADED = ("torch._dynamo", "torch.distributed._tensor", "transformers", "peft", "datasets", "scipy.stats")


def rank(argv, environment, log):
    """Become one rank; never returns."""
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        os.environ.update(environment)
        sys.argv[:] = argv
        sys.path.insert(0, str(Path(argv[0]).parent))
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(argv, environments, log, timeout_s):
    """Exit code of the first rank that failed, after which the others are stopped; 0 if none did."""
    ranks = set()
    for environment in environments:
        pid = os.fork()
        if pid == 0:
            rank(argv, environment, log)
        ranks.add(pid)
    code, deadline = 0, time.monotonic() + timeout_s
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        ranks.discard(pid)
        if pid and code == 0:
            code = os.waitstatus_to_exitcode(status)
        if code or time.monotonic() > deadline:
            code = code or 124
            for other in ranks:
                os.kill(other, signal.SIGKILL)
        if not pid:
            time.sleep(0.05)
    return code


def main():
    """Serve until standard input ends."""
    for module in PRELOADED:
        __import__(module)
    for line in sys.stdin:
        sys.stdout.write(f"{run(**json.loads(line))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Other people's work: processes that never rest, each in a session of its own.

Linux shares cores by session first, so busy processes in one session leave a runner in another a
whole core. A third of them does arithmetic, a third matrix products, a third moves memory.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

ARITHMETIC = "x = 1\nwhile True: x = (x * 1103515245 + 12345) % 2147483648"
PRODUCTS = "import numpy as n\na = n.random.rand(400, 400)\nwhile True: a = a @ a % 1.0"
MEMORY = "import numpy as n\na = n.zeros(2**24)\nb = a.copy()\nwhile True: b[:] = a; a[:] = b"
KINDS = (ARITHMETIC, PRODUCTS, MEMORY)
# They end with whoever started them, however that ends: its end of the pipe is closed then.
UNTIL_ALONE = """import os, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
"""


@contextmanager
def busy_sessions(n_processes: int) -> Iterator[None]:
    """That many of them, until the context ends."""
    one = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", UNTIL_ALONE + KINDS[i % len(KINDS)]],
            env=one,
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        for i in range(n_processes)
    ]
    time.sleep(2 if processes else 0)
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def main() -> None:
    """Runs a command beside them, and ends as it does: `python -m benchmarks.busy 8 make demo`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("n_processes", type=int)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    with busy_sessions(args.n_processes):
        code = subprocess.run(args.command, check=False).returncode
    raise SystemExit(code)


if __name__ == "__main__":
    main()

"""A process that runs trials: a task a line on standard input, a record a line on standard output.

Ends at once when its input does: whoever asked is gone, killed perhaps, and the next search would find the cores taken.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading


def _read(tasks: queue.SimpleQueue[str]) -> None:
    with os.fdopen(os.dup(sys.stdin.fileno()), encoding="utf-8") as lines:
        for line in lines:
            tasks.put(line)
    os._exit(0)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cores", type=lambda text: {int(core) for core in text.split(",")})
    options = parser.parse_args()
    # What libraries print must not come between the records.
    records = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if options.cores:
        # Before any library counts them: two that pin their threads to the first core would share it.
        os.sched_setaffinity(0, options.cores)
    tasks: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(tasks,), daemon=True).start()
    from diffpress.benchmarks.search import trial

    while True:
        records.write(json.dumps(trial.run(json.loads(tasks.get()))) + "\n")
        records.flush()


if __name__ == "__main__":
    main()

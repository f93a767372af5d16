"""A process that runs trials: a task a line on standard input, a record a line on standard output.

Ends at once when its input does: whoever asked is gone, killed perhaps, and the next search would find the cores taken.
"""

from __future__ import annotations

import argparse
import json
import os

from diffpress.benchmarks.peers_link import channel, questions


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cores", type=lambda text: {int(core) for core in text.split(",")})
    options = parser.parse_args()
    records = channel()
    if options.cores:
        # Before any library counts them: two that pin their threads to the first core would share it.
        os.sched_setaffinity(0, options.cores)
    tasks = questions()
    from diffpress.benchmarks.search import trial

    for task in tasks:
        records.write(json.dumps(trial.run(json.loads(task))) + "\n")
        records.flush()


if __name__ == "__main__":
    main()

"""torchrun for the processes of this host, with a failure record for a process that was killed by a signal.

A process that fails with an exception writes its own record; one that the system kills cannot.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from sagemaker_entry.container.failure import Failure, write_record


def main(host: str, folder: Path, arguments: Sequence[str]) -> int:
    """Run torchrun; returns its exit code.

    Args:
        host: the name of this host.
        folder: where failure records are written.
        arguments: torchrun's command line.
    """
    try:
        torchrun(list(arguments))
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode < 0:
            name = signal.Signals(-first.exitcode).name
            memory = ": the host probably ran out of memory; lower data.num_workers" if name == "SIGKILL" else ""
            write_record(Failure(f"The process was killed ({name}){memory}.", host=host, rank=rank), folder)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))

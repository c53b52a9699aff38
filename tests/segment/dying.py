"""The command medssm, of which one process ends or stops in the middle of its work: dying.py RANK SIGNAL TIME word…

RANK: of the process. SIGNAL: what it sends itself. TIME: at which backward pass of a training, or at which volume of a prediction.
"""

import itertools
import multiprocessing
import os
import signal
import sys

from lightning.fabric import Fabric

from medssm import cli
from medssm.segment import ranks


def prepare(own, rank, name, time):
    """The process of rank `own` gets the signal of that name at its call number `time`, if `rank` is its own."""

    def dying(function):
        calls = itertools.count(1)

        def called(*args, **kwargs):
            if own == rank and next(calls) == time:
                os.kill(os.getpid(), getattr(signal, name))
            return function(*args, **kwargs)

        return called

    Fabric.backward, ranks.finest_first = dying(Fabric.backward), dying(ranks.finest_first)


def member(rank, count, port, folder, how, words):
    """The command in a process that was started as one of several on this machine, its standard error in the file `folder`/rank."""
    os.dup2(os.open(f"{folder}/{rank}", os.O_CREAT | os.O_WRONLY), 2)
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    prepare(rank, *how)
    sys.exit(cli.main(words))


if __name__ in ("__main__", "__mp_main__"):  # the latter: a process that a prediction starts
    prepare(int(multiprocessing.parent_process() is not None or os.environ.get("LOCAL_RANK", 0)), int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[4:]))

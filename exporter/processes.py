"""The processes that torchrun starts for one export: they join, work together and end together.

All print nothing but the first, or the one that fails first, whose exit code becomes that of all.

Must not know: what an export does.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from calibrators.errors import InputError
from exporter.console import exit_code_of

if TYPE_CHECKING:
    from calibrators.execution.ranks import Ranks

__all__ = ["SAME_DATA", "SAME_MACHINES", "check_same", "joined", "launched", "silence_all_but_the_first"]

PATIENCE = timedelta(days=1)
"""Longest wait for another process: the first measures and writes alone. A process that ends is noticed at once."""

SAME_DATA = "give a shuffled loader a fixed seed, and every process the same files"
SAME_MACHINES = "run all on processors of one kind, with the same versions and numbers of threads"
"""Advice where two processes do not have the same."""

FAILED, CODE = "intact/failed", "intact/code"
"""Keys of the store that torchrun keeps: how many processes failed, and the exit code of the first of them."""


def launched() -> int:
    """Return the number of processes that torchrun started, 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def silence_all_but_the_first() -> None:
    """Discard what this process prints, unless it is the first or the only one.

    Until it has joined the others, it goes on where one of them has failed: it fails in the same way.
    """
    if launched() == 1:
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.environ["RANK"] != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open to the end)


def check_same(ranks: Ranks, what: str, digest: Callable[[], str], advice: str) -> None:
    """Raise InputError unless all processes have the same, each by its digest."""
    if ranks.count > 1:
        first, *others = ranks.gathered(digest())
        if differing := [str(index) for index, other in enumerate(others, 1) if other != first]:
            raise InputError(f"{what} of process {', '.join(differing)} differs from that of process 0; {advice}.")


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes for the body; a failure in one of them ends the bodies of all.

    raises: InputError for a number of processes that cannot share an export; ProcessLost where another one was killed;
            typer.Exit where another one failed, and has said why.
    """
    from calibrators.execution.ranks import ALONE, COUNTS, Ranks

    if (count := launched()) == 1:
        yield ALONE
        return
    if count not in COUNTS:
        counts = ", ".join(map(str, COUNTS[1:]))
        raise InputError(
            f"torchrun started {count} processes, but an export is shared by {counts}; give --nproc-per-node one of "
            "them."
        )
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, index, _ = next(rendezvous("env://"))
    dist.init_process_group("gloo", store=store, rank=index, world_size=count, timeout=PATIENCE)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())  # what "cuda" means
    ranks = Ranks(index, count)
    signal.signal(signal.SIGTERM, _end)
    try:
        try:
            yield ranks
        except typer.Exit:
            ranks.gathered(None)  # none leaves before all are done
            raise
        ranks.gathered(None)
    except typer.Exit:
        raise
    except BaseException as error:
        raise _answer(store, error) from error
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the others when the first has left
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _end(*_: Any) -> NoReturn:
    """Answer the signal by which torchrun ends processes when one of them has ended before its time."""
    from calibrators.execution.ranks import ProcessLost

    raise ProcessLost


def _answer(store: Any, error: BaseException) -> BaseException:
    """Return the error, to be printed, of the first process that fails; for others, the exit with its code."""
    with suppress(RuntimeError):  # the store goes with torchrun
        if store.add(FAILED, 1) > 1:
            return typer.Exit(int(store.get(CODE)))
        store.set(CODE, str(exit_code_of(error)))
    sys.stderr = sys.__stderr__
    return error

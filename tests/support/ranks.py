"""Processes that share work, forked from the test so that they start at once, and connected as torchrun's are."""

from __future__ import annotations

import multiprocessing
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from calibrators.execution.ranks import ALONE, Ranks

__all__ = ["together"]

Result = TypeVar("Result")

PATIENCE_S = 120


def together(count: int, work: Callable[[Ranks], Result]) -> list[Result]:
    """Return what each of `count` processes makes of the work, which they share.

    raises: what one of them raises.
    """
    if count == 1:
        return [work(ALONE)]
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads; ours only wait
        pipes = [fork.Pipe(duplex=False) for _ in range(count)]
        store = Path(folder) / "store"
        processes = [
            fork.Process(target=_run, args=(work, Ranks(index, count), store, write), daemon=True)
            for index, (_, write) in enumerate(pipes)
        ]
        for each in processes:
            each.start()
        found = [read.recv() if read.poll(PATIENCE_S) else TimeoutError() for read, _ in pipes]
        for each in processes:
            each.kill()
            each.join()
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


def _run(work: Callable[[Ranks], Any], ranks: Ranks, store: Path, write: Connection) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(store)), rank=ranks.index, world_size=ranks.count)
    try:
        write.send(work(ranks))
    except Exception as error:
        write.send(error)
    finally:
        ranks.gathered(None)  # none breaks the connection before all are done

"""Processes that stand for the ranks of a distributed job: started once, then given one piece of work after another."""

from __future__ import annotations

import multiprocessing as mp
import pickle
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 60.0  # seconds for one piece of work; past them a rank hangs, which is a failure


class RankError(Exception):
    """What a rank raised, as text, beside the exception itself where it can be pickled."""

    def __init__(self, rank: int, error: BaseException | None, text: str) -> None:
        super().__init__(f"rank {rank}: {text}")
        self.error = error


def _serve(pipe: Connection, rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE)
    )
    groups: dict[tuple[int, ...], Any] = {}
    while (work := pipe.recv_bytes()) != b"":
        members, function, arguments = pickle.loads(work)
        try:
            if members not in groups:  # every process of the job takes part in making a group
                groups[members] = dist.new_group(list(members))
            result = function(groups[members], *arguments) if rank in members else None
            answer = pickle.dumps((True, result))
        except Exception as error:
            try:
                answer = pickle.dumps((False, (error, traceback.format_exc())))
                pickle.loads(answer)
            except Exception:  # an exception that cannot travel
                answer = pickle.dumps((False, (None, traceback.format_exc())))
        pipe.send_bytes(answer)
    dist.destroy_process_group()


class Ranks:
    """`world` processes with gloo between them; any group of them can do a piece of work."""

    def __init__(self, world: int, folder: Path) -> None:
        # Forked from a server that has imported torch, so a rank starts quickly. The server does not import sn_ops: it
        # searches the current folder first, where a source checkout would hide the installed package. A rank searches
        # where this process does.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed"])
        self.world = world
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            near, far = context.Pipe()
            process = context.Process(target=_serve, args=(far, rank, world, str(folder / "store")), daemon=True)
            process.start()
            far.close()
            self._pipes.append(near)
            self._processes.append(process)

    def outcomes(self, members: Sequence[int], function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(group, *arguments)` on every member: its result, or a `RankError`."""
        work = pickle.dumps((tuple(members), function, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(work)
        answers: list[Any] = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(PATIENCE):
                raise AssertionError(f"rank {rank} of {list(members)} hangs in {function.__name__}")
            fine, result = pickle.loads(pipe.recv_bytes())
            answers.append(result if fine else RankError(rank, *result))
        return [answers[rank] for rank in members]

    def run(self, members: Sequence[int], function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results of `outcomes`; the first error is raised."""
        results = self.outcomes(members, function, *arguments)
        for result in results:
            if isinstance(result, RankError):
                raise result
        return results

    def close(self) -> None:
        """End the processes, and kill one that does not end."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send_bytes(b"")
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()

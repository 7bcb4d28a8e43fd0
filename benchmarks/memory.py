"""Peak memory of one forward + backward, in a process of its own that has done nothing else.

`python memory.py` is a server: it imports once, then forks a fresh process for each request (a line of JSON on stdin)
and answers with a line of JSON. Forking is safe because the server itself never runs a tensor operation, so it has no
threads. `Server` is its client.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import harness
from baselines import Recipe
from contestants import backend_contestants, rival_contestants
from inputs import Batch, Spec, make, tiny

SECONDS = 120


def measure(request: dict[str, Any]) -> int:
    """Bytes beyond the inputs of the contestant of a request."""
    device = torch.device("cpu")
    torch.set_num_threads(request["threads"])
    found = [*backend_contestants([], request["capabilities"], device), *rival_contestants()]
    contestant = next(c for c in found if c.name == request["contestant"])
    recipe = Recipe(**request["recipe"])
    contestant.enter()

    def step(batch: Batch) -> None:
        feats = batch.feats.requires_grad_()
        torch.autograd.grad(contestant.run(batch, feats, recipe, "mean"), feats)

    dtype = getattr(torch, request["dtype"])
    # What every first call pays once (libraries, thread pools, autograd) is not the contestant's.
    step(tiny(64, 32, None, 0).to(device, dtype))
    batch = make(Spec(**request["spec"])).to(device, dtype)
    return harness.peak_bytes(lambda: step(batch), device)


def serve() -> None:
    """Answer requests until stdin ends."""
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                answer: dict[str, Any] = {"bytes": measure(json.loads(line))}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            os.write(writer, json.dumps(answer).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        print(text or json.dumps({"error": f"the process died with status {status}"}), flush=True)


class Server:
    """Client side; a context manager."""

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return self

    def ask(
        self, spec: Spec, contestant: str, recipe: Recipe, dtype: str, threads: int, capabilities: list[str]
    ) -> dict[str, Any]:
        """{"bytes": n} or {"error": why}."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {
            "spec": dataclasses.asdict(spec),
            "contestant": contestant,
            "recipe": dataclasses.asdict(recipe),
            "dtype": dtype,
            "threads": threads,
            "capabilities": capabilities,
        }
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as error:
            return {"error": f"no answer from the measuring process ({error})"}
        return answer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=SECONDS)


if __name__ == "__main__":
    serve()

"""Ranks of a launch as forked processes: a function comes in, what it returned or raised on each rank goes out."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def on_ranks(num_ranks: int, body: Callable[[int], Any], *, timeout_s: float = 120.0) -> list[Any]:
    """Call ``body`` with the rank in that many processes, set up as by a launcher; exceptions come back as objects.

    A process that dies without a word gives None. One rank is the process of the test itself.
    """
    if num_ranks == 1:
        return [body(0)]
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(num_ranks)]
    port = free_port()

    def run(rank: int) -> None:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
        torch.set_num_threads(1)
        try:
            told = body(rank)
        except BaseException as error:
            traceback.print_exc()
            told = error
        pipes[rank][1].send((told, getattr(told, "said_elsewhere", None)))

    children = [fork.Process(target=run, args=(rank,)) for rank in range(num_ranks)]
    for child in children:
        child.start()
    results: list[Any] = []
    for receiver, sender in pipes:
        sender.close()
        try:
            told: Any = None
            if receiver.poll(timeout_s):
                told, said_elsewhere = receiver.recv()
                if said_elsewhere is not None:
                    told.said_elsewhere = said_elsewhere
        except EOFError:
            told = None
        results.append(told)
    for child in children:
        child.join(timeout_s)
        if child.is_alive():
            child.kill()
            child.join()
    return results

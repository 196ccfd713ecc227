"""A function applied to many tasks in worker processes that can be killed, each call under a hard time limit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import deque
from contextlib import suppress
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from joblib import effective_n_jobs
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

START_LIMIT_S = 120.0  # a worker that has not said hello by then never will


def _serve(connection: Any, function: Callable, tasks: Sequence[tuple]) -> None:
    """Life of a worker: receive task numbers, send (number, result) one by one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    warnings.simplefilter("ignore")
    parent = os.getppid()
    connection.send("ready")
    while True:
        while not connection.poll(5.0):
            if os.getppid() != parent:  # the parent was killed: do not wait for ever
                return
        try:
            for number in connection.recv():
                try:
                    result = function(*tasks[number])
                except Exception as error:  # raised again in the parent
                    result = error
                connection.send((number, result))
        except (EOFError, OSError):
            return


class _Worker:
    """One process and the numbers of its unanswered tasks; the first of them is in progress since ``since``."""

    def __init__(self, function: Callable, tasks: Sequence[tuple]) -> None:
        # fork starts in milliseconds and needs no importable __main__; elsewhere than on Linux it is not safe
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.connection, child = context.Pipe()
        self.process = context.Process(target=_serve, args=(child, function, tasks), daemon=True)
        self.process.start()
        child.close()  # so that the death of the worker is seen as the end of the stream
        self.pending: deque[int] = deque()
        self.ready = False

    def give(self, numbers: Sequence[int]) -> None:
        if not self.ready and not self.connection.poll(START_LIMIT_S):
            raise RuntimeError(f"a worker process did not start within {START_LIMIT_S} s")
        with suppress(OSError, EOFError):  # a dead worker is noticed when its answer is read
            self.ready = self.ready or bool(self.connection.recv())
            self.connection.send(list(numbers))
        self.pending.extend(numbers)
        self.since = time.monotonic()

    def answers(self) -> list[tuple[int, Any]]:
        """All answers that have arrived; raises EOFError or OSError if the worker is dead and has none left."""
        received = [self.connection.recv()]
        with suppress(EOFError, OSError):
            while self.connection.poll():
                received.append(self.connection.recv())
        for _ in received:
            self.pending.popleft()
        self.since = time.monotonic()
        return received

    def kill(self) -> None:
        self.process.kill()  # SIGKILL: also ends a loop in compiled code, which no Python signal handler can
        self.process.join()
        self.connection.close()


def run_with_time_limit(
    function: Callable,
    tasks: Sequence[tuple],
    n_jobs: int = -1,
    time_limit_s: float = 10.0,
    description: str = "",
    progress: bool = True,
) -> list[Any]:
    """``function(*task)`` for every task, in worker processes, each call under a hard time limit.

    A worker that exceeds the limit, or dies, is replaced; its other tasks go back to the queue.

    Args:
        n_jobs: number of processes, as in joblib (-1: all cores).
        time_limit_s: wall-clock limit of one call, s.
        description: label of the progress bar on standard error; ``progress=False`` hides it.

    Returns:
        one result per task, in order; None where the worker was killed or died (so ``function`` must not return None).

    Raises:
        ValueError: if the limit is not positive.
        Exception: the first one raised by ``function``.
    """
    if not time_limit_s > 0:
        raise ValueError(f"time_limit_s is {time_limit_s}, expected a positive number of seconds")
    results: list[Any] = [None] * len(tasks)
    queue = deque(range(len(tasks)))
    n_workers = max(1, min(effective_n_jobs(n_jobs), len(tasks)))
    batch_size = max(1, min(32, len(tasks) // (4 * n_workers)))
    workers = [_Worker(function, tasks) for _ in range(n_workers)]
    try:
        with tqdm(total=len(tasks), desc=description, disable=not progress) as bar:
            while queue or any(worker.pending for worker in workers):
                _hand_out(queue, workers, batch_size)
                busy = [worker for worker in workers if worker.pending]
                first_deadline = min(worker.since for worker in busy) + time_limit_s
                arrived = wait([worker.connection for worker in busy], max(0.0, first_deadline - time.monotonic()))
                for worker in busy:
                    answers = _collect(worker, worker.connection in arrived, time_limit_s)
                    if answers is None:  # replace the worker: its first task is lost, the others wait for another one
                        worker.kill()
                        queue.extendleft(reversed(list(worker.pending)[1:]))
                        workers[workers.index(worker)] = _Worker(function, tasks)
                    for number, result in answers or []:
                        if isinstance(result, Exception):
                            raise result
                        results[number] = result
                    bar.update(1 if answers is None else len(answers))
    finally:
        for worker in workers:
            worker.kill()
    return results


def _hand_out(queue: deque[int], workers: Sequence[_Worker], batch_size: int) -> None:
    for worker in workers:
        if queue and not worker.pending:
            worker.give([queue.popleft() for _ in range(min(batch_size, len(queue)))])


def _collect(worker: _Worker, has_arrived: bool, time_limit_s: float) -> list[tuple[int, Any]] | None:
    """Answers of a worker, or None if it is dead or out of time."""
    if not has_arrived:
        return None if time.monotonic() - worker.since > time_limit_s else []
    try:
        return worker.answers()
    except (EOFError, OSError):
        return None

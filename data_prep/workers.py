"""Units to worker processes: spawned, one unit each at a time, stopped gracefully, their failures told in one line."""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NoReturn

from data_prep.mapping import Job, Mapper, write_scan
from data_prep.shards import DataError
from data_prep.stop import StoppedError, StopWish, listening

POLL_S = 0.2

Progress = Callable[[int, int, int], None]  # bytes of text, ids, finished units since the last call


def run_units(stage: str, job: Job, numbers: Sequence[int], n_workers: int, progress: Progress) -> None:
    """Run a stage, "scan" or "map", over units: in this process when it is alone, else in worker processes.

    Raises: DataError on bad input; StoppedError after a wish to stop; RuntimeError when a worker died.
    """
    n_workers = min(n_workers, len(numbers))
    with listening() as wish:
        if n_workers > 1:
            _Pool(stage, job, n_workers).run(numbers, progress, wish)
        elif numbers:
            run_unit = _unit_function(stage, job)
            for number in numbers:
                wish.check()
                run_unit(number, lambda n_bytes, n_ids: progress(n_bytes, n_ids, 0), wish)
                progress(0, 0, 1)


def _unit_function(stage: str, job: Job) -> Callable[[int, Callable[[int, int], None], StopWish], None]:
    if stage == "map":
        return Mapper(job).map_unit
    return lambda number, report, wish: write_scan(job, number, report, wish)


class _Pool:
    """Worker processes and what each is doing."""

    def __init__(self, stage: str, job: Job, n_workers: int) -> None:
        # spawn: nothing of this process, no thread pool of a tokenizer and no lock, is half there in a worker
        context = multiprocessing.get_context("spawn")
        self.workers: dict[Connection, SpawnProcess] = {}
        self.at_work: dict[Connection, int] = {}
        for _ in range(n_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(stage, job, theirs), daemon=True)
            process.start()
            theirs.close()
            self.workers[ours] = process

    def run(self, numbers: Sequence[int], progress: Progress, wish: StopWish) -> None:
        waiting = list(reversed(numbers))
        try:
            for worker in self.workers:
                self._give(worker, waiting)
            while self.at_work:
                ready = wait(list(self.at_work), POLL_S)
                for worker in [worker for worker in self.at_work if worker in ready]:
                    if self._take(worker, progress, wish) and not wish.asked:
                        self._give(worker, waiting)
                if wish.asked:
                    self._ask_to_stop()
            if wish.asked:
                raise StoppedError
        finally:
            self._end()

    def _give(self, worker: Connection, waiting: list[int]) -> None:
        if waiting:
            self.at_work[worker] = waiting.pop()
            try:
                worker.send(self.at_work[worker])
            except OSError:
                self._died(worker)

    def _take(self, worker: Connection, progress: Progress, wish: StopWish) -> bool:
        """Take one message; return whether the worker is free."""
        try:
            kind, value = worker.recv()
        except (EOFError, OSError):
            if not wish.asked:  # else it was told to stop before it could listen
                self._died(worker)
            kind, value = "stopped", None
        if kind == "report":
            progress(value[0], value[1], 0)
            return False
        if kind == "error":
            raise value
        del self.at_work[worker]
        if kind == "done":
            progress(0, 0, 1)
        return bool(kind == "done")

    def _died(self, worker: Connection) -> NoReturn:
        process = self.workers[worker]
        process.join(5)
        code = process.exitcode
        how = f"signal {-code} ({signal.Signals(-code).name})" if code is not None and code < 0 else f"exit code {code}"
        raise RuntimeError(
            f"worker of unit {self.at_work[worker]}: died by {how}; if memory ran out use fewer --workers; "
            "run it again to go on where it was"
        )

    def _ask_to_stop(self) -> None:
        for worker, process in self.workers.items():
            if worker in self.at_work and process.is_alive():
                process.terminate()

    def _end(self) -> None:
        for worker, process in self.workers.items():
            worker.close()
            if process.is_alive():
                process.terminate()
        for process in self.workers.values():
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def _work(stage: str, job: Job, parent: Connection) -> None:
    """Be a worker: take unit numbers until the other end is closed."""
    with listening() as wish:
        try:
            run_unit = _unit_function(stage, job)
            while True:
                number = parent.recv()
                run_unit(number, lambda n_bytes, n_ids: parent.send(("report", (n_bytes, n_ids))), wish)
                parent.send(("done", number))
        except EOFError:
            return
        except (StoppedError, KeyboardInterrupt):
            _tell(parent, ("stopped", None))
        except (DataError, OSError) as error:
            _tell(parent, ("error", error))
        except BaseException as error:
            traceback.print_exc()
            _tell(parent, ("error", RuntimeError(f"{type(error).__name__}: {error}")))


def _tell(parent: Connection, message: tuple[str, Any]) -> None:
    try:
        parent.send(message)
    except OSError:
        return  # nobody is left to be told

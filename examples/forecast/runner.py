"""Many independent training runs, on all cores, with a progress bar."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from examples.common import Progress
from examples.forecast.experiments import LAYERS, Method, Outcome, Problem, train_and_score
from examples.forecast.models import build
from examples.forecast.train import fit


@dataclass(frozen=True)
class Run:
    """One method on one problem with one seed."""

    problem: Problem
    method: Method
    seed: int
    device: str
    checkpoint: Path
    resume: bool
    layers: str

    def execute(self, on_epoch: Callable[[], None]) -> Outcome:
        return train_and_score(
            self.problem, self.method, self.seed, self.device, self.checkpoint, self.resume, self.layers, on_epoch
        )


def execute_all(runs: Sequence[Run], workers: int) -> list[Outcome]:
    """The outcomes of the runs, in their order.

    The models are far too small to fill two cores each: one thread per run and as many runs as cores is fastest.
    """
    progress = RunProgress(len(runs), sum(run.method.recipe.epochs for run in runs))
    if workers == 1:
        outcomes = []
        for run in runs:
            outcomes.append(run.execute(progress.epoch))
            progress.run(run.method.recipe.epochs - len(outcomes[-1].history.train))
        progress.close()
        return outcomes
    # spawn, not fork: a forked child inherits locks of threads that it does not have, and CUDA refuses it.
    spawn = multiprocessing.get_context("spawn")
    epochs = spawn.Queue()
    with ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(epochs,)) as pool:
        # The longest first, so that no core idles while another one works on the last run.
        order = sorted(range(len(runs)), key=lambda index: _cost(runs[index]), reverse=True)
        futures: dict[int, Future[Outcome]] = {i: pool.submit(_execute_in_worker, runs[i]) for i in order}
        pending = set(futures.values())
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                _drain(epochs, progress)
                for index, future in futures.items():
                    if future in done:
                        progress.run(runs[index].method.recipe.epochs - len(future.result().history.train))
        except BaseException:
            # An error or Ctrl-C: stop the remaining runs. The checkpoints keep what is done.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    progress.close()
    return [futures[index].result() for index in range(len(runs))]


def estimate_seconds(problem: Problem, method: Method, device: str, layers: str) -> float:
    """The most seconds of one training run and its scoring: measured on four batches, times their number."""
    split, config, recipe = problem.split, method.config, method.recipe
    model = build(config, LAYERS[layers]).to(device)
    sizes = (4 * recipe.batch_size, config.context), (4 * recipe.batch_size, config.horizon)
    windows = tuple(torch.zeros(size, device=device) for size in sizes)
    one_epoch = replace(recipe, epochs=1, patience=None)
    horizon = problem.tests["test"].horizon

    def seconds(call: Callable[[], Any]) -> float:
        call()  # the first call of anything is slower
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    train_end = split.train_end if recipe.patience is not None else split.test_start
    batch = seconds(lambda: fit(model, (windows[0], windows[1]), None, one_epoch)) / 4
    forecast = seconds(lambda: model.forecast(windows[0], horizon)) / len(windows[0])
    epoch = math.ceil((train_end - config.context) / recipe.batch_size) * batch
    epoch += 0 if recipe.patience is None else (split.test_start - train_end) * forecast
    scored = sum(len(test.origins) * test.horizon / horizon for test in problem.tests.values())
    return recipe.epochs * epoch + scored * forecast


def _cost(run: Run) -> float:
    """Rough, for sorting only."""
    config = run.method.config
    factor = {"lstm": 1, "encoder": 2, "encoder-decoder": 4}[config.kind]
    return factor * len(run.problem.series.values) * (config.context // config.patch + config.horizon)


_epochs: Any = None  # in a worker: the queue to the main process


def _start_worker(epochs: Any) -> None:
    global _epochs
    _epochs = epochs
    torch.set_num_threads(1)


def _execute_in_worker(run: Run) -> Outcome:
    return run.execute(lambda: _epochs.put(1))


def _drain(epochs: Any, progress: RunProgress) -> None:
    while True:
        try:
            epochs.get_nowait()
        except Empty:
            return
        progress.epoch()


class RunProgress(Progress):
    """Of all epochs of all runs."""

    def __init__(self, runs: int, epochs: int) -> None:
        super().__init__(epochs)
        self.runs, self.runs_done, self.epochs_done = runs, 0, 0

    def epoch(self) -> None:
        """One epoch of some run is done."""
        self.epochs_done += 1
        self._show()

    def run(self, unused_epochs: int) -> None:
        """A run is done, by early stopping that many epochs before its last."""
        self.runs_done += 1
        self.epochs_done = min(self.epochs_done + unused_epochs, self.total)
        self._show()

    def _show(self) -> None:
        self.show(self.epochs_done, f"{self.runs_done}/{self.runs} runs")

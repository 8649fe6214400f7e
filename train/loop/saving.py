"""When and how a run's checkpoints are written: at intervals, from copies, in a background thread.

A student that trains for a second an epoch must not write its optimizer's state every second. `last.pt` is written when
the last write is `checkpoint_minutes` ago, at the end, and on a stop signal; a resumed run repeats what happened since.
`best.pt` is written together with it: its file is complete beside the old one before `last.pt` names it as the best, and
replaces the old one afterwards. So whenever the process is killed, `adopt_best` finds a matching pair.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from files.writing import publish
from train.checkpoint import ADAPTERS, BEST, LAST, load_checkpoint, save_checkpoint
from train.events import CheckpointSaved

NEXT_BEST = f".{BEST}.next"
#: Copies of a run's state that may wait for the disk at once.
WAITING = 2

Content = Mapping[str, Any]


@torch.no_grad()
def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy each source into its target; one kernel for each kind of tensors instead of one for each tensor.

    `_foreach_copy_` does so only for lists of one device and dtype; batch norm's counters are integers.
    """
    groups: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        group = groups.setdefault((target.dtype, target.device), ([], []))
        group[0].append(target)
        group[1].append(source.detach())
    for target_list, source_list in groups.values():
        torch._foreach_copy_(target_list, source_list)


class StepGuard:
    """Knows when weights are consistent, and what the buffers were after the last finished step.

    Weights, optimizer state and progress change only inside `update`, so whoever holds `lock` may save them. Buffers
    (batch-norm statistics) change in every forward pass, without the lock; they are copied at the end of each step, and
    a snapshot in the middle of a step puts the copies back.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.lock = threading.Lock()
        self.whole = True  # false after an error in the middle of an update
        self.buffers: dict[str, Tensor] = {}
        self.copy_buffers()

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """Held while weights, optimizer state and progress change together."""
        with self.lock:
            self.whole = False
            yield
            self.copy_buffers()
            self.whole = True

    def copy_buffers(self) -> None:
        named = dict(self.module.named_buffers())
        if self.buffers.keys() != named.keys():
            self.buffers = {name: value.detach().clone() for name, value in named.items()}
            return
        copy_all(self.buffers.values(), (named[name] for name in self.buffers))

    def restore_buffers(self) -> None:
        """Put the buffers of the last finished step back; the running step is abandoned. Hold the lock."""
        named = dict(self.module.named_buffers())
        copy_all(named.values(), (self.buffers[name] for name in named))


class HostCopy:
    """A copy of plain values and tensors as they are now, on the host.

    From a GPU the copies are only queued here, in the order of its kernels: what is queued later cannot change them, and
    the loop goes on at once. `content()`, called by the writing thread, waits for them.
    """

    def __init__(self, content: Content) -> None:
        self.copied, self.copies = copy_to_host(content), None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.copies = torch.cuda.Event()
            self.copies.record()

    def content(self) -> dict[str, Any]:
        if self.copies is not None:
            self.copies.synchronize()
        copied: dict[str, Any] = self.copied
        return copied


def copy_to_host(value: Any) -> Any:
    """The same structure with copies of its tensors in host memory; copies from a GPU may still be in progress."""
    if isinstance(value, Tensor):
        value = value.detach()
        return value.clone() if value.device.type == "cpu" else value.to("cpu", non_blocking=True)
    if isinstance(value, Mapping):
        return {key: copy_to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copy_to_host(item) for item in value)
    return value


class Best(NamedTuple):
    """Copies of the best student so far, and of its LoRA adapters alone where it has some."""

    student: HostCopy
    adapters: HostCopy | None
    epoch: int


class CheckpointWriter:
    """Writes the checkpoints of one run folder in the background.

    An error of the writing thread is raised by the next call of `due`, `submit`, `finished` or `finish`.
    """

    def __init__(self, folder: Path, every_s: float) -> None:
        self.folder, self.every_s = folder, every_s
        self.saved_at, self.has_saved = time.monotonic(), False
        self.best: Best | None = None
        # The stop deadline's thread may write a snapshot while the background thread writes: one at a time, or a file
        # would be a mixture of both.
        self.disk = threading.Lock()
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self.pending: deque[Future[list[CheckpointSaved]]] = deque()
        self.reports: list[CheckpointSaved] = []

    def due(self, *, after_epoch: bool) -> bool:
        """Whether it is time for `last.pt`: after the first epoch, and every `every_s` seconds; not while one is written."""
        self.collect()
        if self.pending:
            return False
        first = after_epoch and not self.has_saved
        return first or time.monotonic() - self.saved_at >= self.every_s

    def note_best(self, student: Content, adapters: Content | None, epoch: int) -> None:
        """Keep a copy of the best student so far, for the next `save`."""
        self.best = Best(HostCopy(student), None if adapters is None else HostCopy(adapters), epoch)

    def save(self, last: Content, epoch: int, *, wait: bool) -> None:
        """Write `last.pt` from a copy, and `best.pt` if there is a better student since the last `save`.

        wait: return when both are on disk.
        """
        best, self.best = self.best, None
        self.saved_at, self.has_saved = time.monotonic(), True
        copied = HostCopy(last)
        if wait:
            self.reports += self.write_pair(copied, epoch, best)
        else:
            self.submit(partial(self.write_pair, copied, epoch, best))

    def save_beside(self, path: Path, content: Content, epoch: int) -> None:
        """Write another checkpoint, from a copy, in the background."""
        self.submit(partial(self.write_one, path, HostCopy(content), epoch))

    def write_one(self, path: Path, content: HostCopy, epoch: int) -> list[CheckpointSaved]:
        with self.disk:
            save_checkpoint(path, content.content())
        return [CheckpointSaved(path, epoch, False)]

    def write_pair(self, last: HostCopy, epoch: int, best: Best | None) -> list[CheckpointSaved]:
        """The order matters: see the top of the file."""
        with self.disk:
            if best is not None:
                save_checkpoint(self.folder / NEXT_BEST, best.student.content())
            save_checkpoint(self.folder / LAST, last.content())
            saved = [CheckpointSaved(self.folder / LAST, epoch, False)]
            if best is not None:
                publish(self.folder / NEXT_BEST, self.folder / BEST)
                saved.insert(0, CheckpointSaved(self.folder / BEST, best.epoch, True))
                if best.adapters is not None:
                    save_checkpoint(self.folder / ADAPTERS, best.adapters.content())
        return saved

    def submit(self, work: Callable[[], list[CheckpointSaved]]) -> None:
        """Hand work to the background thread; waits while `WAITING` writes are pending."""
        self.collect(most=WAITING - 1)
        self.pending.append(self.pool.submit(work))

    def collect(self, most: int | None = None) -> None:
        """Take the results of finished writes, and wait until at most `most` are pending.

        Raises CheckpointError of the background thread.
        """
        while self.pending and (self.pending[0].done() or (most is not None and len(self.pending) > most)):
            self.reports += self.pending.popleft().result()

    def finished(self) -> list[CheckpointSaved]:
        """The checkpoints completed since the last call."""
        self.collect()
        reports, self.reports = self.reports, []
        return reports

    def finish(self) -> list[CheckpointSaved]:
        """Wait for all writes; the checkpoints completed since the last call of `finished`."""
        self.collect(most=0)
        return self.finished()

    def close(self) -> None:
        """End the thread when all it was given is written. Raises nothing: the run ends with another error."""
        self.pool.shutdown(wait=True)


def adopt_best(folder: Path, best_epoch: int) -> None:
    """Complete what a killed process left: `last.pt` names the best epoch, whose file may still be beside `best.pt`."""
    written = folder / NEXT_BEST
    if not written.exists():
        return
    if load_checkpoint(written)["epoch"] == best_epoch:
        publish(written, folder / BEST)
    else:
        written.unlink()

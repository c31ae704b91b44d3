"""The calls that run in one pipeline: threads share it, and each has a state of its own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline


class RunningCall:
    """One call: what can be asked while it runs, and that it can be stopped.

    Its denoiser answers what diffusers' pipelines answer: `guidance_scale`, `num_timesteps`, ... Before there is one
    everything is None.
    """

    def __init__(self):
        self.interrupted = False
        self.denoiser: Any = None
        self.device: Any = None
        self._answers: dict[str, Any] = {}

    def ask(self, name: str) -> Any:
        return self._answers.get(name) if self.denoiser is None else getattr(self.denoiser, name, None)

    @property
    def interrupt(self) -> bool:
        return self.interrupted or bool(self.ask("interrupt"))

    def end(self, names: tuple[str, ...]):
        """Keeps the answers, and lets go of the denoiser with all that it holds."""
        answers = {name: self.ask(name) for name in names}
        self.denoiser, self._answers = None, answers


class RunningCalls:
    """The calls of a pipeline, by thread. A copy of the pipeline, in this process or another, begins without any."""

    # what remains readable after a call
    NAMES = ("interrupt", "guidance_scale", "guidance_rescale", "num_timesteps", "cross_attention_kwargs")

    def __init__(self):
        self._of_threads: dict[int, list[RunningCall]] = {}
        self._last = RunningCall()
        self.turn = threading.RLock()

    def __reduce__(self):
        return type(self), ()

    @contextmanager
    def begin(self, one_at_a_time: bool, join: bool = False) -> Iterator[RunningCall]:
        """A new call of this thread, or with `join` its running one, if there is one; with `one_at_a_time` it waits
        until those of other threads have ended."""
        if join and self.current:
            yield self.current
            return
        with self.turn if one_at_a_time else nullcontext():
            call, thread = RunningCall(), threading.get_ident()
            own = self._of_threads.setdefault(thread, [])
            own.append(call)
            try:
                yield call
            finally:
                call.end(self.NAMES)
                own.pop()
                if not own:
                    del self._of_threads[thread]
                self._last = call

    @property
    def current(self) -> RunningCall | None:
        """The innermost call of this thread."""
        own = self._of_threads.get(threading.get_ident())
        return own[-1] if own else None

    @property
    def latest(self) -> RunningCall:
        """The call of this thread, or the one that ended last."""
        return self.current or self._last

    def interrupt(self, value: bool):
        """Stops the call of this thread, where one runs (from its callbacks), else those of all threads."""
        chosen = [self.current] if self.current else [call for own in list(self._of_threads.values()) for call in own]
        for call in chosen:
            call.interrupted = value


class LavitCallsMixin(DiffusionPipeline if TYPE_CHECKING else object):
    """A pipeline's answers about the call of the thread that asks, and offloading that threads share by turns."""

    _calls: RunningCalls
    _takes_turns = False

    @property
    def interrupt(self) -> bool:
        """Whether the call of this thread, or the last one, was stopped: by `pipe._interrupt = True` in a callback.

        Set where no call of its own runs, by a button's thread, it stops those of all threads.
        """
        return self._calls.latest.interrupt

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool):
        self._calls.interrupt(value)

    @property
    def guidance_scale(self) -> float | None:
        """Of the denoising, in the call of this thread or the last one; None before any."""
        return self._calls.latest.ask("guidance_scale")

    @property
    def guidance_rescale(self) -> float | None:
        return self._calls.latest.ask("guidance_rescale")

    @property
    def num_timesteps(self) -> int | None:
        """Number of denoising steps of the call of this thread, or of the last one; None before any."""
        return self._calls.latest.ask("num_timesteps")

    @property
    def cross_attention_kwargs(self) -> dict | None:
        return self._calls.latest.ask("cross_attention_kwargs")

    @property
    def _execution_device(self):
        # the base class walks through all modules to find it: once a call is enough
        call = self._calls.current
        if call is None:
            return super()._execution_device
        if call.device is None:
            call.device = super()._execution_device
        return call.device

    def enable_model_cpu_offload(self, *args, **kwargs):
        """See `DiffusionPipeline.enable_model_cpu_offload`. Threads then draw one after the other."""
        self._takes_turns = True
        super().enable_model_cpu_offload(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *args, **kwargs):
        """See `DiffusionPipeline.enable_sequential_cpu_offload`. Threads then draw one after the other."""
        self._takes_turns = True
        super().enable_sequential_cpu_offload(*args, **kwargs)

    def enable_group_offload(self, *args, **kwargs):
        """See `DiffusionPipeline.enable_group_offload`. Threads then draw one after the other."""
        self._takes_turns = True
        super().enable_group_offload(*args, **kwargs)

"""Timing two ways of one thing beside each other."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Way:
    """One way of doing something.

    Args:
        name: as the table says it.
        run: does it once; a string that it returns is a remark for the table.
        work: how much one run does, where the two ways do different amounts (floating-point operations).
    """

    name: str
    run: Callable[[], Any]
    work: float = 1.0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    remark: str | None = None

    def time_once(self):
        started, cpu_started = time.perf_counter(), time.process_time()
        result = self.run()
        self.seconds.append(time.perf_counter() - started)
        self.cpu_seconds.append(time.process_time() - cpu_started)
        self.remark = result if isinstance(result, str) else None

    @property
    def median(self) -> float:
        """Wall seconds."""
        return statistics.median(self.seconds)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu_seconds)


@dataclass
class Comparison:
    """Two ways, and by how much the first should be faster.

    Args:
        target: the least ratio asked for.
    """

    ours: Way
    other: Way
    target: float | None = None

    def measure(self, repeats: int):
        """Runs both in turn, so that whatever else the machine does falls on both; the first run of each is not
        counted."""
        for way in (self.ours, self.other):
            way.run()
        for _ in range(repeats):
            self.ours.time_once()
            self.other.time_once()

    def release(self):
        """Lets go of the models that were measured."""
        self.ours.run = self.other.run = None

    @property
    def ratio(self) -> float:
        """Of speeds, or of rates of work, by CPU time: other processes of the machine change it least."""
        return self.ours.work / self.other.work * self.other.cpu_median / self.ours.cpu_median

    @property
    def wall_ratio(self) -> float:
        return self.ours.work / self.other.work * self.other.median / self.ours.median

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the greatest ratio of one repeat."""
        ratios = [
            self.ours.work / ours / (self.other.work / other)
            for ours, other in zip(self.ours.cpu_seconds, self.other.cpu_seconds, strict=True)
        ]
        return min(ratios), max(ratios)


@dataclass
class Curve:
    """CPU seconds of one thing at growing sizes.

    Args:
        size_name: what grows.
        points: sizes and what runs at each.
    """

    size_name: str
    points: dict[int, Callable[[], Any]]
    seconds: dict[int, float] = field(default_factory=dict)

    def measure(self, repeats: int):
        ways = {size: Way(str(size), run) for size, run in self.points.items()}
        for way in ways.values():
            way.run()
        for _ in range(repeats):
            for way in ways.values():
                way.time_once()
        self.seconds = {size: way.cpu_median for size, way in ways.items()}

    def release(self):
        """Lets go of the models that were measured."""
        self.points = {}

"""Curves of training runs, from the `log.jsonl` that `lavit train` writes."""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image


try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("curves need matplotlib: pip install matplotlib") from error

Curve = tuple[np.ndarray, np.ndarray]
WIDTH, HEIGHT, DPI = 4.2, 2.6, 100  # inches of one panel, pixels per inch


def read_run(source: str | Path, num_patches: int) -> dict[str, Curve]:
    """The curves of a run: metric to (steps, values), finite values alone.

    `keep_rate` is `kept` of a picture's patches. Where a step was logged twice, by a run that was cut and went on,
    the later record counts.

    Args:
        source: a run's folder, or its log.
        num_patches: patches of a picture.

    Raises:
        ValueError: there is no log, a line of it is no JSON object, it has no step of training, or more patches are
            kept than a picture has.
    """
    path = Path(source)
    path = path / "log.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no log of a run at {path}")
    steps = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"line {number} of {path} is no record of a step")
        if "loss" in record and "step" in record:
            steps[record["step"]] = record
    curves = {}
    for step, record in sorted(steps.items()):
        if "kept" in record:
            record["keep_rate"] = record["kept"] / num_patches
            if record["keep_rate"] > 1:
                raise ValueError(f"{path} keeps {record['kept']} patches, but a picture of --model has {num_patches}")
        for name, value in record.items():
            if name not in ("step", "epoch") and isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, ([], []))[0].append(step)
                curves[name][1].append(value)
    if not curves:
        raise ValueError(f"{path} has no step of training yet")
    return {name: (np.array(steps), np.array(values, dtype=float)) for name, (steps, values) in curves.items()}


def run_names(sources: list[str]) -> list[str]:
    """Short names of runs: the folder's or the log's, or the whole path where these are not distinct."""
    paths = [
        path.parent if path.name == "log.jsonl" else path for path in (Path(source).resolve() for source in sources)
    ]
    names = [path.name.removesuffix(".jsonl") for path in paths]
    return names if len(set(names)) == len(names) else list(map(str, sources))


def rolling_median(values: np.ndarray, window: int) -> np.ndarray:
    """The median of the `window` values around each, of fewer at the ends."""
    before, after = (window - 1) // 2, window // 2 + 1
    return np.array([np.median(values[max(0, i - before) : i + after]) for i in range(len(values))])


def draw_curves(runs: dict[str, dict[str, Curve]], metrics: list[str] | None = None, smooth: int = 1) -> Image.Image:
    """A panel for each metric with the curves of all runs that have it.

    Args:
        runs: name to curves, see [`read_run`].
        metrics: loss and keep_rate, as far as there are any, when None; every one for `["all"]`.
        smooth: records of a rolling median, drawn over the values themselves; 1 for none.

    Raises:
        ValueError: no run has one of the metrics.
    """
    known = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    if metrics is None:
        metrics = [name for name in ("loss", "keep_rate") if name in known]
    elif metrics == ["all"]:
        metrics = known
    unknown = [name for name in metrics if name not in known]
    if unknown:
        raise ValueError(f"no run has the metric {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
    columns = min(len(metrics), 2 if len(metrics) <= 4 else 3)
    lines = -(-len(metrics) // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * lines + 0.3), dpi=DPI, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    handles = {}
    last = max(int(steps[-1]) for curves in runs.values() for steps, _ in curves.values())
    for metric, panel in zip(metrics, panels, strict=False):
        for i, (name, curves) in enumerate(runs.items()):
            if metric not in curves:
                continue
            steps, values = curves[metric]
            if smooth > 1:
                panel.plot(steps, values, color=f"C{i}", linewidth=0.8, alpha=0.35)
                values = rolling_median(values, smooth)
            (handles[name],) = panel.plot(steps, values, color=f"C{i}", linewidth=1.5)
        panel.set_title(metric, fontsize=11)
        panel.set_xlabel("step")
        panel.set_xlim(0, last)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels:
        panel.remove()
    figure.legend(
        handles.values(), handles, loc="outside upper left", ncols=min(len(handles), 2 * columns), frameon=False
    )
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

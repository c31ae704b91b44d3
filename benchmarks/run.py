"""Every row two ways in one run, and their ratio.

    python -m benchmarks.run [--only ROW ...] [--repeats 5] [--output FOLDER]

Prints a table; with `--output` writes it as `benchmark.md`, with the machine's description, and its plot as
`benchmark.png`, after every row. `--list` names the rows. All models but the embedded checkpoint have random weights.
"""

import argparse
import gc
import os
import platform
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import diffusers
import torch
import transformers

from benchmarks.full_width import FULL_DEPTH, derived
from benchmarks.measure import Comparison, Curve
from benchmarks.memory import Peaks, peak_memory, peaks_beside_official_way
from benchmarks.rows import CURVES, ROWS, Options


MEMORY, OFFICIAL_MEMORY = "memory", "official_memory"
CURVE_REPEATS = 2


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    names = [*ROWS, *CURVES, MEMORY, OFFICIAL_MEMORY]
    if options.list:
        print(*names, sep="\n")
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    sizes = Options(**{name: getattr(options, name) for name in Options.__dataclass_fields__})
    torch.set_num_threads(1)
    results = Results(options)
    with torch.no_grad():
        for name in options.only or names:
            if name == MEMORY:
                results.peaks = peak_memory(options.checkpoint)
            elif name == OFFICIAL_MEMORY:
                results.official_peaks = peaks_beside_official_way()
            else:
                measured = (ROWS | CURVES)[name](sizes)
                measured.measure(options.repeats if name in ROWS else min(options.repeats, CURVE_REPEATS))
                print(name, describe(measured), flush=True)
                measured.release()
                gc.collect()
                (results.comparisons if name in ROWS else results.curves)[name] = measured
            results.write()
    print(results.report())


@dataclass
class Results:
    """What is measured so far. It is written after every row: a run that is cut short loses none."""

    options: argparse.Namespace
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    peaks: dict[str, list[float]] = field(default_factory=dict)
    official_peaks: dict[str, tuple[Peaks, Peaks]] = field(default_factory=dict)

    def report(self) -> str:
        parts = (
            machine(self.options),
            comparison_table(self.comparisons) if self.comparisons else None,
            derived_table(self.comparisons),
            curve_table(self.curves) if self.curves else None,
            memory_table(self.peaks) if self.peaks else None,
            official_memory_table(self.official_peaks) if self.official_peaks else None,
        )
        return "\n\n".join(part for part in parts if part)

    def write(self) -> None:
        folder = self.options.output
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "benchmark.md").write_text(f"# Benchmark\n\n{self.report()}\n")
        if self.comparisons:
            plot(self.comparisons, folder / "benchmark.png")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*ROWS, *CURVES, MEMORY, OFFICIAL_MEMORY], metavar="ROW")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--repeats", type=int, default=5, help="the medians are of so many (default: 5)")
    parser.add_argument("--output", type=Path, metavar="FOLDER")
    defaults = Options()
    for name in Options.__dataclass_fields__:
        default = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args(arguments)


def describe(measured: Comparison | Curve) -> str:
    if isinstance(measured, Curve):
        return ", ".join(f"{size} {measured.size_name}: {seconds:.3g} s" for size, seconds in measured.seconds.items())
    least, most = measured.spread
    return f"{measured.ratio:.2f} ({least:.2f} to {most:.2f})"


def machine(options: argparse.Namespace) -> str:
    """What the numbers were taken on."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else processor
    versions = ", ".join(f"{library.__name__} {library.__version__}" for library in (torch, transformers, diffusers))
    sizes = f"encoder {options.encoder_layers} layers, merger {options.merger_layers}"
    return (
        f"{date.today()}: {processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, {versions}. Load of the machine at the end: {os.getloadavg()[0]:.1f}. Medians "
        f"of {options.repeats} interleaved repeats, of curves {min(options.repeats, CURVE_REPEATS)}; {sizes}, "
        f"language model {options.language_layers}; {options.new_tokens} tokens a drawing."
    )


def comparison_table(comparisons: dict[str, Comparison]) -> str:
    lines = [
        "| row | what | first way | second way | first, s | second, s | ratio (least, most) | of wall time | target |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in comparisons.items():
        least, most = one.spread
        cells = [name, ROWS[name].__doc__]
        cells += [f"{way.name}, {way.remark}" if way.remark else way.name for way in (one.ours, one.other)]
        cells += [f"{way.cpu_median:.3g}" for way in (one.ours, one.other)]
        cells += [f"**{one.ratio:.2f}** ({least:.2f}, {most:.2f})", f"{one.wall_ratio:.2f}"]
        lines.append(f"| {' | '.join([*cells, '' if one.target is None else f'{one.target}'])} |")
    lines.append(
        "\nSeconds are CPU seconds of one thread; the ratio is of speeds by them, first to second, or of the rates of "
        "arithmetic where the two do different work."
    )
    return "\n".join(lines)


def derived_table(comparisons: dict[str, Comparison]) -> str | None:
    """Drawing at full depth; None where its rows were not measured."""
    lines = [
        f"| eight codes at {FULL_DEPTH} layers, derived from 2 and 4 | ours, s | two passes, s | ratio |",
        "|---|---|---|---|",
    ]
    for one in derived(comparisons):
        ours, other = one.seconds("ours"), one.seconds("other")
        lines.append(f"| {one.name} | {ours:.3g} | {other:.3g} | **{other / ours:.2f}** |")
    return "\n".join(lines) if len(lines) > 2 else None


def curve_table(curves: dict[str, Curve]) -> str:
    lines = ["| row | what | CPU seconds at each size |", "|---|---|---|"]
    lines += [f"| {name} | {CURVES[name].__doc__} | {describe(one)} |" for name, one in curves.items()]
    return "\n".join(lines)


def memory_table(peaks: dict[str, list[float]]) -> str:
    lines = ["| peak memory, MB | bfloat16 | float32 |", "|---|---|---|"]
    lines += [f"| {stage} | {' | '.join(f'{peak:.0f}' for peak in values)} |" for stage, values in peaks.items()]
    return "\n".join(lines)


def official_memory_table(peaks: dict[str, tuple[Peaks, Peaks]]) -> str:
    lines = [
        "| peak memory, MB (of it own at the end), bfloat16, the official widths, a fifth of the depths | ours | the "
        "official way | ours ÷ official |",
        "|---|---|---|---|",
    ]
    for name, sides in peaks.items():
        cells = [f"{one.resident:.0f} ({one.own:.0f})" for one in sides]
        lines.append(f"| {name} | {' | '.join(cells)} | **{sides[0].resident / sides[1].resident:.2f}** |")
    return "\n".join(lines)


def plot(comparisons: dict[str, Comparison], path: Path) -> None:
    """One bar a row: the ratio, its spread, and the target that was set."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(comparisons)[::-1]
    rows = [comparisons[name] for name in names]
    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(names) + 1.2), layout="constrained")
    ratios = [one.ratio for one in rows]
    below = [max(0.0, one.ratio - one.spread[0]) for one in rows]
    above = [max(0.0, one.spread[1] - one.ratio) for one in rows]
    axes.barh(names, ratios, xerr=[below, above], color="#4c78a8", ecolor="#333333", capsize=3)
    for height, one in enumerate(rows):
        if one.target is not None:
            axes.plot([one.target, one.target], [height - 0.4, height + 0.4], color="#e45756")
    axes.axvline(1, color="#999999", linewidth=0.8)
    axes.set_xlabel("speed of the first way / of the second, by CPU time; red: the ratio asked for")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

"""Makes the embedded checkpoint from scratch: `make checkpoint PROFILE=cpu`.

`lavit train emoji --output DIR [--profile cpu|gpu] [--jobs 2] [KEY=VALUE …]`

Each step is a recipe of this folder in a process of its own, with its result in `RUNS/NAME/final`; steps that do not
need one another run side by side. Started again, it leaves out what is complete and what only that needed, and goes on
with what was cut, as `lavit train` does. `KEY=VALUE` goes to every step, `STEP:KEY=VALUE` to one.
"""

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from modeling_lavit.command_line.common import Parser, positive_number
from modeling_lavit.training.emoji import assemble
from modeling_lavit.training.emoji.train import RECIPES, STAGES
from modeling_lavit.training.recipe import Recipe
from modeling_lavit.training.recipe_file import load_recipe, parse_yaml
from modeling_lavit.training.run import is_complete


@dataclass(frozen=True)
class Step:
    """
    Args:
        recipe: name of a recipe.
        needs: key of the recipe -> name of the step whose result it takes; a list of names where several are taken.
        overrides: entries of the recipe by profile, beside those of all profiles (under "").
        threads: of its process. What all others wait for takes all cores.
    """

    recipe: str
    needs: dict[str, str | list[str]] = field(default_factory=dict)
    overrides: dict[str, list[str]] = field(default_factory=dict)
    threads: int = 1

    @property
    def before(self) -> set[str]:
        return {name for names in self.needs.values() for name in ([names] if isinstance(names, str) else names)}


def lengths(cpu: tuple[int, int], gpu: tuple[int, int]) -> dict[str, list[str]]:
    """Steps and batch of a run by profile."""
    keys = "max_steps", "per_device_train_batch_size"
    return {
        profile: [f"training_arguments.{key}={value}" for key, value in zip(keys, values, strict=True)]
        for profile, values in (("cpu", cpu), ("gpu", gpu))
    }


STEPS = {
    "wide_teacher": Step("teacher", overrides=lengths((3000, 64), (2200, 256)) | {"": ["model.width=2"]}),
    "teacher": Step("teacher", overrides=lengths((4000, 64), (2200, 256))),
    "style_teacher": Step("style_teacher", overrides=lengths((2400, 64), (1200, 256))),
    "encoder": Step(
        "encoder",
        {"teacher": "teacher", "name_teachers": ["wide_teacher"], "style_teacher": "style_teacher"},
        lengths((3200, 64), (3000, 128)),
        threads=2,
    ),
    "tokenizer": Step("tokenizer", {"encoder": "encoder"}, lengths((2400, 32), (1300, 128)), threads=2),
    "pixel_decoder_features": Step("pixel_decoder_features", {"encoder": "encoder"}, lengths((1000, 32), (2000, 64))),
    "reading": Step("reading", {"tokenizer": "tokenizer"}, lengths((600, 64), (600, 128))),
    "language_model": Step(
        "language_model",
        {"tokenizer": "tokenizer", "start": "reading", "mixup.teachers": ["teacher", "wide_teacher"]},
        lengths((4200, 40), (4500, 96)),
    ),
    "pixel_decoder": Step(
        "pixel_decoder",
        {"tokenizer": "tokenizer", "start": "pixel_decoder_features"},
        lengths((3000, 32), (5000, 64)) | {"": ["objective.perceptual_weight=0.3"]},
    ),
    "drawing": Step(
        "drawing",
        {"tokenizer": "tokenizer", "start": "language_model", "mixup.teachers": ["teacher", "wide_teacher"]},
        lengths((4800, 40), (3000, 96)),
    ),
    "pixels": Step(
        "pixel_decoder",
        {"tokenizer": "tokenizer", "start": "pixel_decoder"},
        lengths((3600, 32), (3000, 64))
        | {"": ["objective.perceptual_weight=0.3", "training_arguments.learning_rate=6.0e-4"]},
    ),
    "classifier": Step("classifier"),
}
SETTINGS = ["num_inference_steps=2", "decoder_guidance_scale=1.0"]
ASSEMBLY = ["--scheduler", "UniPCMultistepScheduler", "--default", *SETTINGS]


def arguments_of(name: str, runs: Path, profile: str, more: list[str]) -> list[str]:
    """Of `modeling_lavit.training.emoji.train`, for a step."""
    step, folder = STEPS[name], lambda other: str(runs / other / "final")
    needs = [
        f"{key}={folder(of) if isinstance(of, str) else '[' + ', '.join(map(folder, of)) + ']'}"
        for key, of in step.needs.items()
    ]
    threads = [f"threads={step.threads}"] if step.threads > 1 else []
    own = [*threads, *step.overrides.get("", []), *step.overrides.get(profile, [])]
    for entry in more:
        of, _, rest = entry.partition(":")
        if of not in STEPS:
            own.append(entry)
        elif of == name:
            own.append(rest)
    return [step.recipe, f"training_arguments.output_dir={runs / name}", *needs, *own]


def recipe_of(name: str, runs: Path, profile: str, more: list[str]) -> Recipe:
    """The recipe of a step as it is trained by."""
    recipe, *entries = arguments_of(name, runs, profile, more)
    path = RECIPES / f"{recipe}.yaml"
    return load_recipe(path, entries, STAGES[parse_yaml(path.read_bytes(), str(path))["stage"]].recipe_class)


def steps_left(runs: Path, profile: str, more: list[str]) -> dict[str, Step]:
    """The steps without a result that it takes, themselves or for another one."""
    left: dict[str, Step] = {}

    def need(name: str) -> None:
        if name not in left and not is_complete(runs / name, recipe_of(name, runs, profile, more)):
            left[name] = STEPS[name]
            for other in STEPS[name].before:
                need(other)

    used = {other for step in STEPS.values() for other in step.before}
    for name in STEPS.keys() - used:
        need(name)
    return {name: step for name, step in STEPS.items() if name in left}


def run_steps(runs: Path, profile: str, jobs: int, more: list[str]) -> None:
    """Runs every step that is left as soon as those that it needs are complete, as many at once as have `jobs` threads
    in all.

    Raises:
        ValueError: a step failed; the others are stopped, and go on from their last checkpoint when started again.
    """
    runs.mkdir(parents=True, exist_ok=True)
    waiting, running = steps_left(runs, profile, more), {}
    done = STEPS.keys() - waiting.keys()
    try:
        while waiting or running:
            for name in [name for name, step in waiting.items() if step.before <= done]:
                if running and sum(STEPS[other].threads for other in running) + STEPS[name].threads > jobs:
                    continue
                del waiting[name]
                command = [sys.executable, "-m", "modeling_lavit.training.emoji.train"]
                with open(runs / f"{name}.log", "a", encoding="utf-8") as log:
                    process = subprocess.Popen(
                        [*command, *arguments_of(name, runs, profile, more)], stdout=log, stderr=subprocess.STDOUT
                    )
                running[name] = process, time.monotonic()
                print(f"{name}: started, its output goes to {log.name}", flush=True)
            for name, (process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    last = (runs / f"{name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
                    raise ValueError(f"{name} failed: {last[-1] if last else 'no output'} ({runs / f'{name}.log'})")
                done = done | {name}
                print(f"{name}: complete after {(time.monotonic() - started) / 60:.1f} min", flush=True)
            time.sleep(0.2)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.wait()


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="lavit train emoji", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the checkpoint")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of the steps' results")
    parser.add_argument("--profile", choices=("cpu", "gpu"), default="cpu", help="lengths and batches of the steps")
    parser.add_argument(
        "--jobs", type=positive_number, default=2, metavar="N", help="threads of all steps at once (default: 2)"
    )
    parser.add_argument("overrides", metavar="[STEP:]KEY=VALUE", nargs="*", help="of every step's recipe, or of one's")
    options = parser.parse_args(arguments)
    run_steps(options.runs, options.profile, options.jobs, options.overrides)
    parts = {"--language-model": "drawing", "--pixel-decoder": "pixels"}
    results = [word for flag, name in parts.items() for word in (flag, str(options.runs / name / "final"))]
    recipe = recipe_of("drawing", options.runs, options.profile, options.overrides)
    drafts = ["--draft-images", recipe.data.path]
    assemble.main([*results, *ASSEMBLY, *drafts, "--output", str(options.output)])
    print(f"{options.output} is complete")

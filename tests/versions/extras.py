"""Installs each extra of setup.py beside constraints.txt, alone, and tries what it is for: `make test-extras`.

python tests/versions/extras.py FOLDER [EXTRA ...]
"""

import os
import shutil
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
# what each extra brings, tried in its environment
TRIES = {
    "train": "import modeling_lavit.training.run, modeling_lavit.training.train_language_model",
    "evaluate": "import modeling_lavit.evaluation.emoji.report, torchmetrics",
    "app": "import gradio, modeling_lavit.app_lavit",
    "serve": "import modeling_lavit.serving, ray.serve, fastapi, uvicorn",
    "ray": "import ray.data, modeling_lavit.training.data.tokenize_ray",
    "convert": "import sentencepiece, modeling_lavit.conversion",
    "quantization": "import sys, pytest; sys.exit(pytest.main(['-q', 'tests/test_memory.py', '-k', 'quantized']))",
    "docs": "import sphinx, myst_parser, furo",
    "dev": "import pytest, xdist, trl, openai, parameterized; import modeling_lavit",
}


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True)


def pip(environment: Path, *arguments: str | Path) -> None:
    run(environment / "bin/python", "-m", "pip", "--disable-pip-version-check", *arguments)


def main(folder: Path, *chosen: str) -> None:
    extras = set(metadata("lavit-hf").get_all("Provides-Extra"))
    if extras != set(TRIES):
        raise SystemExit(f"extras that are not tried here, or no longer exist: {sorted(extras ^ set(TRIES))}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    plain = folder / "plain"
    run(sys.executable, "-m", "venv", plain)
    install = ("install", "--quiet", "-c", "constraints.txt")
    pip(plain, *install, "torch")
    pip(plain, *install, ".", "pytest", "pytest-timeout")
    (wheel,) = _build_wheel(plain, folder)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    for extra in chosen or TRIES:
        environment = folder / extra
        print(f"--- {extra}", flush=True)
        # hard links: pip replaces files, it does not write into them
        shutil.copytree(plain, environment, symlinks=True, copy_function=os.link)
        pip(environment, *install, f"lavit-hf[{extra}] @ {wheel.as_uri()}")
        pip(environment, "check")
        run(environment / "bin/python", "-P", "-c", TRIES[extra])
        shutil.rmtree(environment)


def _build_wheel(environment: Path, folder: Path) -> list[Path]:
    pip(environment, "wheel", "--quiet", "--no-deps", "-w", folder, ".")
    return [path.resolve() for path in folder.glob("lavit_hf-*.whl")]


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *sys.argv[2:])

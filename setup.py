"""Packaging: one import name, `modeling_lavit`; the other folders are its subpackages."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


SUBPACKAGES = ("processing", "conversion", "training", "evaluation", "checkpoints")
ROOT = Path(__file__).resolve().parent


class BuildWithModelCard(build_py):
    """Puts `model_card.md`, which lies at the root of the checkout, into the package."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copyfile(ROOT / "model_card.md", Path(self.build_lib) / "modeling_lavit" / "model_card.md")


setup(
    name="lavit-hf",
    version="0.1.0",
    description="LaVIT: a language model that reads and draws pictures, native to the Hugging Face Hub",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # transformers 5.23 and diffusers 0.42 need it
    python_requires=">=3.11",
    packages=["modeling_lavit", "modeling_lavit.command_line", *(f"modeling_lavit.{name}" for name in SUBPACKAGES)],
    package_dir={"modeling_lavit": "modeling_lavit", **{f"modeling_lavit.{name}": name for name in SUBPACKAGES}},
    cmdclass={"build_py": BuildWithModelCard},
    package_data={
        "modeling_lavit.checkpoints": ["lavit-emoji/**/*"],
        "modeling_lavit.training": ["recipes/*.yaml"],
    },
    install_requires=[
        "torch>=2.6",
        "transformers>=5.23,<6",
        "diffusers>=0.42,<1",
        "accelerate>=1.0",
        "huggingface_hub>=2.0",
        "safetensors",
        "pillow",
        "numpy",
    ],
    extras_require={
        "train": ["datasets", "matplotlib", "peft", "resvg_py", "pyyaml"],
        "app": ["gradio"],
        "ray": ["ray[data]"],
        "dev": ["peft", "pytest", "pytest-xdist", "ray[data]", "ruff", "setuptools", "torchao"],
    },
    # A script, not an entry point: `lavit --help` would import torch, transformers and diffusers with the package.
    scripts=["modeling_lavit/bin/lavit"],
)

"""Packaging: one import name, `modeling_lavit`; the other folders are its subpackages."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


ROOT = Path(__file__).resolve().parent
# folder of the checkout -> name of the package; packages inside them are found
FOLDERS = {
    "modeling_lavit": "modeling_lavit",
    **{
        name: f"modeling_lavit.{name}"
        for name in ("processing", "conversion", "training", "evaluation", "checkpoints")
    },
}
DATA = ["**/*.yaml", "**/*.json", "**/*.jinja", "**/*.txt"]


class BuildWithModelCard(build_py):
    """Puts `model_card.md`, which lies at the root of the checkout, into the package."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copyfile(ROOT / "model_card.md", Path(self.build_lib) / "modeling_lavit" / "model_card.md")


setup(
    name="lavit-hf",
    version="0.1.0",
    description="LaVIT: a language model that reads and draws images, native to the Hugging Face Hub",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        package
        for folder, name in FOLDERS.items()
        for package in [name, *(f"{name}.{inner}" for inner in find_packages(str(ROOT / folder)))]
    ],
    package_dir={name: folder for folder, name in FOLDERS.items()},
    cmdclass={"build_py": BuildWithModelCard},
    package_data={
        "modeling_lavit": ["py.typed"],
        "modeling_lavit.checkpoints": ["lavit-emoji/**/*"],
        "modeling_lavit.training": DATA,
        "modeling_lavit.evaluation": DATA,
    },
    # `modeling_lavit/compat_lavit.py` says the same range of transformers and diffusers
    install_requires=[
        "torch>=2.6",
        "transformers>=5.16,<6",
        "diffusers>=0.40,<1",
        "accelerate>=1.10.1",
        "huggingface_hub>=1.23",
        "jinja2",
        "safetensors",
        "pillow",
        "numpy",
    ],
    extras_require={
        "train": ["datasets>=4.7", "matplotlib", "peft", "pyyaml", "resvg_py", "tensorboard"],
        "evaluate": ["datasets>=4.7", "matplotlib", "pyyaml", "torchmetrics"],
        "app": ["gradio"],
        "serve": ["aiohttp", "fastapi", "prometheus_client", "python-multipart", "ray[serve]", "uvicorn"],
        "ray": ["datasets>=4.7", "ray[data]"],
        "convert": ["protobuf", "sentencepiece"],
        # apart from `dev`: with it installed, transformers imports it, and it prints at import
        "quantization": ["torchao"],
        "docs": ["furo", "myst-parser", "sphinx"],
        "dev": [
            "lavit-hf[train,evaluate,app,serve,ray,convert,docs]",
            "openai",
            "parameterized",
            "pre-commit",
            "pyright[nodejs]",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "requests",
            "requests-mock",
            "ruff",
            "scipy",
            "selenium",
            "setuptools",
            "torchsde",
            "trl",
        ],
    },
    # A script, not an entry point: `lavit --help` would import torch, transformers and diffusers with the package.
    scripts=["modeling_lavit/bin/lavit"],
    entry_points={
        "lmms_eval.models": ["lavit = modeling_lavit.evaluation.lmms_eval_models:manifest"],
        "vllm.general_plugins": ["lavit = modeling_lavit.vllm_plugin:register"],
    },
)

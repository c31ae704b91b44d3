"""Packaging: one import name, `modeling_lavit`; the other folders are its subpackages."""

from setuptools import setup

SUBPACKAGES = ("processing", "conversion", "training", "evaluation")

setup(
    name="lavit-hf",
    version="0.1.0",
    description="LaVIT: a language model that reads and draws pictures, native to the Hugging Face Hub",
    python_requires=">=3.10",
    packages=["modeling_lavit", *(f"modeling_lavit.{name}" for name in SUBPACKAGES)],
    package_dir={"modeling_lavit": "modeling_lavit", **{f"modeling_lavit.{name}": name for name in SUBPACKAGES}},
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
        "train": ["datasets", "peft", "resvg_py", "pyyaml"],
        "dev": ["pytest", "ruff"],
    },
    entry_points={"console_scripts": ["lavit=modeling_lavit.cli:main"]},
)

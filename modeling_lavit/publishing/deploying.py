"""What a pipeline's repository holds for those who run it elsewhere: `handler.py` for Inference Endpoints, and the
folder `space/`, which is a Space."""

from pathlib import Path

from modeling_lavit.compat_lavit import ALLOWED_VERSIONS


PACKAGE = Path(__file__).resolve().parent.parent
REQUIREMENTS = "".join(f"{library}{versions}\n" for library, versions in ALLOWED_VERSIONS.items()) + "accelerate\n"
SPACE_CARD = """\
---
title: LaVIT
sdk: gradio
app_file: app.py
---

Draw, restyle, read, visual tokens and chat. The variable `LAVIT_MODEL` of this Space names the model's repository.
"""
SPACE_APP = '''\
"""The app. `LAVIT_MODEL` names the model's folder or repository; by default the folder that this one lies in."""

import os
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from lavit_app.app_lavit import build_app


model = os.environ.get("LAVIT_MODEL") or Path(__file__).resolve().parent.parent
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, trust_remote_code=True).to(device)
app = build_app(pipe)

if __name__ == "__main__":
    app.launch()
'''


def deploying_files() -> dict[str, str]:
    """Path in the repository -> text."""
    files = {
        "handler.py": (PACKAGE / "handler.py").read_text(encoding="utf-8"),
        "requirements.txt": REQUIREMENTS,
        "space/README.md": SPACE_CARD,
        "space/app.py": SPACE_APP,
        "space/requirements.txt": REQUIREMENTS + "gradio\n",
        "space/lavit_app/__init__.py": "",
    }
    for name in ("app_lavit.py", "show_lavit.py"):
        files[f"space/lavit_app/{name}"] = (PACKAGE / name).read_text(encoding="utf-8")
    return files

"""What a saved pipeline brings along: the handler for Inference Endpoints, called as theirs does, and a Space."""

import base64
import importlib.util
import io
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_lavit import LavitPipeline
from modeling_lavit.checkpoints import LAVIT_EMOJI


CAT = Path(__file__).parent.parent / "fixtures/emoji/images/noto/cat-face.png"
ENCODED = base64.b64encode(CAT.read_bytes()).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    LavitPipeline.from_pretrained(LAVIT_EMOJI, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def handler(folder):
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder))


def call(handler, inputs, **parameters):
    """The toolkit hands JSON over in both directions."""
    return json.loads(json.dumps(handler(json.loads(json.dumps({"inputs": inputs, "parameters": parameters})))))


def decoded(content: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_a_text_is_drawn_with_its_seed(handler):
    answer = call(handler, "red apple", seed=3, n=2)
    assert answer["seeds"] == [3, 4]
    alone = handler.pipe("red apple", generator=torch.Generator().manual_seed(4)).images[0]
    assert np.abs(decoded(answer["images"][1]).astype(int) - np.asarray(alone).astype(int)).max() <= 1


def test_an_image_is_captioned_asked_about_and_restyled(handler):
    caption = call(handler, {"images": [ENCODED]})["text"]
    answer = call(handler, {"images": [f"data:image/png;base64,{ENCODED}"], "text": "which style is this?"})["text"]
    assert caption and answer and caption != answer
    assert len(call(handler, {"images": [ENCODED], "text": "in flat style"}, task="draw")["images"]) == 1


@pytest.mark.parametrize(
    ("inputs", "parameters"),
    [
        (None, {}),
        ("", {}),
        ({"prompt": "red apple"}, {}),
        ({"images": ["no base64!"]}, {}),
        ({"images": [3]}, {}),
        ({"images": ["/etc/passwd"]}, {}),
        ("red apple", {"task": "read"}),
        ("red apple", {"n": 100}),
        ("red apple", {"seed": -1}),
        ("red apple", {"steps": 3}),
    ],
)
def test_a_wrong_request_is_a_value_error(handler, inputs, parameters):
    with pytest.raises(ValueError):
        handler({"inputs": inputs, "parameters": parameters})


@pytest.mark.slow
def test_the_space_of_a_saved_folder_is_the_app_around_that_folder_s_model(folder, monkeypatch):
    gradio = pytest.importorskip("gradio")
    monkeypatch.delenv("LAVIT_MODEL", raising=False)
    monkeypatch.syspath_prepend(folder / "space")
    space = runpy.run_path(str(folder / "space/app.py"))
    assert isinstance(space["app"], gradio.Blocks)
    assert isinstance(space["pipe"], LavitPipeline)
    for name in ("requirements.txt", "space/requirements.txt"):
        assert "transformers" in (folder / name).read_text()

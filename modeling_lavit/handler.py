"""For Inference Endpoints: their toolkit looks for `EndpointHandler` in the file `handler.py` of a repository.

A request is `{"inputs": ..., "parameters": {...}}`, and its answer is JSON:

    "red apple"                                          {"images": [base64 of a PNG], "seeds": [7]}
    {"images": [base64]}                                 {"text": "cat face"}
    {"images": [base64], "text": "which style?"}         {"text": "noto"}
    {"images": [base64], "text": "in flat style"},
        with parameters {"task": "draw"}                 {"images": [...], "seeds": [...]}

Parameters: `task`, "draw" or "read" (by default "read" where there are images); `n` and `seed` of drawings, image i
having seed + i.
"""

import base64
import binascii
import io
import secrets
from typing import Any

import torch
from diffusers import DiffusionPipeline


MOST_IMAGES = 8


class EndpointHandler:
    """Loads a repository once and answers requests.

    Args:
        path: the repository's folder.
    """

    def __init__(self, path: str = ""):
        on_gpu = torch.cuda.is_available()
        dtype = torch.bfloat16 if on_gpu else torch.float32
        self.pipe: Any = DiffusionPipeline.from_pretrained(path, torch_dtype=dtype, trust_remote_code=True)
        self.pipe.to("cuda" if on_gpu else "cpu")
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """One request, see the top of this file.

        Raises:
            ValueError: what is wrong with it; the toolkit answers 400 with that text.
        """
        inputs, parameters = data.get("inputs"), dict(data.get("parameters") or {})
        if isinstance(inputs, str):
            inputs = {"text": inputs}
        if not isinstance(inputs, dict) or not inputs or set(inputs) - {"text", "images"}:
            raise ValueError(f'inputs are a text, or an object with "text" and "images", got {inputs!r:.80}')
        text, images = inputs.get("text") or "", [self._decode(image) for image in inputs.get("images") or []]
        task = parameters.pop("task", "read" if images else "draw")
        if task == "read" and images and not parameters:
            return {"text": self._read(images, text)}
        if task == "draw" and not set(parameters) - {"n", "seed"}:
            return self._draw([*images, text] if text else images, **parameters)
        raise ValueError(f"task {task!r} does not go with {len(images)} images and parameters {sorted(parameters)}")

    def _decode(self, image: Any):
        try:
            content = base64.b64decode(image.split("base64,", 1)[-1])
        except (AttributeError, binascii.Error) as error:
            raise ValueError(f"an image is a file in base64, got {image!r:.40}") from error
        return self.pipe.processor.image_processor.fetch_images(content)

    def _read(self, images: list, text: str) -> str:
        processor = self.pipe.processor
        blocks = [{"type": "image", "image": image} for image in images]
        blocks += [{"type": "text", "text": text}] if text else []
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        prompt = processor.apply_chat_template([{"role": "user", "content": blocks}], **options)
        ids = self.pipe.model.generate(**prompt, generation_preset="answer" if text else "caption")
        post_process = processor.post_process_answer if text else processor.post_process_caption
        return post_process(ids, input_ids=prompt["input_ids"])[0]

    def _draw(self, parts: list, n: int = 1, seed: int | None = None) -> dict[str, Any]:
        if not isinstance(n, int) or not 1 <= n <= MOST_IMAGES:
            raise ValueError(f"n is a number from 1 to {MOST_IMAGES}, got {n!r:.40}")
        seed = secrets.randbits(32) if seed is None else seed
        if not isinstance(seed, int) or not 0 <= seed < 2**62:
            raise ValueError(f"seed is a whole number from 0 to 2**62 - 1, got {seed!r:.40}")
        seeds = [seed + i for i in range(n)]
        generators = [torch.Generator().manual_seed(one) for one in seeds]
        encoded = []
        for image in self.pipe([parts], num_images_per_prompt=n, generator=generators).images:
            file = io.BytesIO()
            image.save(file, format="png")
            encoded.append(base64.b64encode(file.getvalue()).decode())
        return {"images": encoded, "seeds": seeds}

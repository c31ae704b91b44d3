"""The transformers task "text-to-image": `pipeline("text-to-image", model=folder_or_repository)`."""

import os
from collections.abc import Iterator
from typing import Any

from PIL import Image
from torch.utils.data import Dataset
from transformers import Pipeline

from .prompts_lavit import Prompt, split_batch


class LavitTextToImagePipeline(Pipeline):
    """Draws images from prompts of text and images.

    ```python
    draw = pipeline("text-to-image", model=path)
    draw("a red apple")                                # a PIL image
    draw(["a cat", "a dog"])                           # a list of them
    draw([image, "it is running in the snow"])         # one multimodal prompt; a batch of them is a list of lists
    draw(prompt for prompt in prompts)                 # an iterator: each is drawn when it is asked for
    draw("a red apple", num_images_per_prompt=4)       # four images for each prompt
    ```

    All keyword arguments of a call are those of [`LavitPipeline`], which does the work: `draw.decoder` is one. It
    shares `model` and `processor`, and loads the other components from where the model was loaded.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _pipeline_calls_generate = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        source = self.model.name_or_path
        if not source:
            raise ValueError(
                "text-to-image needs the folder or repository of the other components: pass it as `model`, "
                "or use LavitPipeline with components"
            )
        # takes seconds: whoever only reads images does without
        from diffusers import DiffusionPipeline

        self.decoder: Any = DiffusionPipeline.from_pretrained(
            source,
            model=self.model,
            processor=self.processor,
            dtype=self.model.dtype,
            revision=getattr(self.model.config, "_commit_hash", None),
            # where this very code came from the folder, its user has agreed to that
            trust_remote_code=__name__.startswith("transformers_modules."),
        ).to(self.device)

    def __call__(self, prompt: Prompt | Iterator[Prompt] | Dataset, **kwargs) -> Image.Image | list | Iterator:
        """See the class.

        Args:
            prompt: a string, an image, a list of both (one prompt), a list of strings or of lists (a batch; also a
                tuple, array, column or series). A generator or a torch dataset of prompts is drawn one by one.
            kwargs: of [`LavitPipeline`].

        Returns:
            A PIL image for each prompt (a list with `num_images_per_prompt`), in a list if `prompt` is a batch; an
            iterator over them if it is a generator or a dataset.

        Raises:
            ValueError: those of [`LavitPipeline`].
        """
        if isinstance(prompt, Iterator | Dataset):
            size = 0 if isinstance(prompt, Iterator) else len(prompt)  # pyright: ignore[reportArgumentType]
            items = prompt if isinstance(prompt, Iterator) else (prompt[i] for i in range(size))
            return (self(one, **kwargs) for one in items)
        prompts, is_batch = split_batch(prompt)
        # a dictionary is one item to the base class, so that the whole batch is drawn at once
        drawn = super().__call__({"prompts": prompts}, **kwargs)
        return drawn if is_batch else drawn[0]  # pyright: ignore[reportReturnType, reportOptionalSubscript]

    def _sanitize_parameters(self, **kwargs):
        return {}, kwargs, {}

    def preprocess(self, inputs: dict) -> dict:
        return inputs

    def _forward(self, inputs: dict, **kwargs) -> dict:
        return {"images": self.decoder(inputs["prompts"], **kwargs).images, "prompts": len(inputs["prompts"])}

    def postprocess(self, outputs: dict) -> list:
        images, count = outputs["images"], len(outputs["images"]) // outputs["prompts"]
        if count == 1:
            return images
        return [images[start : start + count] for start in range(0, len(images), count)]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Saves all components, see [`LavitPipeline.save_pretrained`]."""
        self.decoder.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Uploads all components, see [`LavitPipeline.push_to_hub`]."""
        return self.decoder.push_to_hub(repo_id, **kwargs)

"""The app for the browser, also of Spaces: draw, restyle, read, see visual tokens, and chat."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from .show_lavit import enlarge, show_kept_patches


SCREEN_SIZE = 384
MOST_IMAGES = 8
TEXT, IMAGE = "text", "an image"


class LavitApp:
    """What the app's buttons do, around a pipeline.

    Args:
        pipe: a `LavitPipeline`.
    """

    def __init__(self, pipe):
        self.pipe, self.processor, self.model = pipe, pipe.processor, pipe.model
        self.factor = max(1, SCREEN_SIZE // max(pipe.default_size))
        self.ratios = list(pipe.defaults.aspect_ratios)
        # drawn images of chats, which later turns read again; goes with the app
        self.folder = tempfile.TemporaryDirectory(prefix="lavit-app-")

    def draw(self, prompt: str, count: int, seed: int, aspect_ratio: str) -> list[Image.Image]:
        """Images of a text, image i with seed + i."""
        with shown_errors():
            if not prompt.strip():
                raise ValueError("write what to draw")
            return self._draw([prompt], count, seed, aspect_ratio)

    def restyle(self, images: list | None, prompt: str, count: int, seed: int) -> list[Image.Image]:
        """Images of one image or several and a text behind them."""
        with shown_errors():
            parts = _open_all(images) + ([prompt] if prompt.strip() else [])
            return self._draw(parts, count, seed, self.ratios[0])

    def _draw(self, parts: list, count: int, seed: int | None, aspect_ratio: str) -> list[Image.Image]:
        if seed is None:
            raise ValueError("give a seed: a whole number from 0 on")
        images = self.pipe(
            [parts],
            num_images_per_prompt=int(count),
            generator=[torch.Generator().manual_seed(int(seed) + i) for i in range(int(count))],
            aspect_ratio=aspect_ratio,
        ).images
        return [enlarge(image, self.factor) for image in images]

    def read(self, images: list | None, question: str) -> str:
        """A caption for each image, or one answer to a question about all of them."""
        with shown_errors():
            blocks = [{"type": "image", "image": image} for image in _open_all(images)]
            if question.strip():
                return self._write([{"role": "user", "content": [*blocks, {"type": "text", "text": question}]}])
            return "\n".join(self._write([{"role": "user", "content": [block]}]) for block in blocks)

    def _write(self, messages: list[dict]) -> str:
        asks = any(block["type"] == "text" for block in messages[-1]["content"])
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = self.processor.apply_chat_template(messages, **options)
        ids = self.model.generate(**inputs, generation_preset="answer" if asks else "caption")
        post_process = self.processor.post_process_answer if asks else self.processor.post_process_caption
        return post_process(ids, input_ids=inputs["input_ids"])[0]

    def show_tokens(self, images: list | None) -> tuple[list[tuple[Image.Image, str]], str]:
        """Each image with its kept patches, what is drawn from its codes alone, and the codes, a line for each."""
        with shown_errors():
            tokenizer = self.model.model.visual_tokenizer
            shown, lines = [], []
            for image in _open_all(images):
                pixel_values = self.processor.image_processor(image, return_tensors="pt").pixel_values
                tokens = tokenizer.tokenize(pixel_values.to(tokenizer.device))
                again = self.pipe(visual_tokens=tokens, generator=torch.Generator().manual_seed(0)).images[0]
                count = f"{len(tokens.codes)} of {tokens.keep_mask.shape[1]} patches kept"
                shown.append((show_kept_patches(image, tokens.keep_mask[0], SCREEN_SIZE), count))
                shown.append((enlarge(again, self.factor), "drawn from their codes alone"))
                lines.append(f"{count}: {tokens.codes.tolist()}")
        return shown, "\n".join(lines)

    def chat(self, message: dict, history: list[dict], answer_with: str, seed: int) -> str | dict:
        """One turn: an answer in text, or an image drawn from all that was said.

        Args:
            message: `{"text": ..., "files": [paths]}`.
            history: messages with lists of parts, as gradio has them.
            answer_with: [`TEXT`] or [`IMAGE`].
            seed: of an image.
        """
        with shown_errors():
            content = [{"type": "image", "image": _open(path)} for path in message["files"]]
            if message["text"].strip():
                content.append({"type": "text", "text": message["text"]})
            if not content:
                raise ValueError("write something, or give an image")
            messages = [*map(_as_message, history), {"role": "user", "content": content}]
            if answer_with == TEXT:
                return self._write(messages)
            parts = [block[block["type"]] for one in messages for block in one["content"]]
            image = self._draw(parts, 1, seed, self.ratios[0])[0]
            with tempfile.NamedTemporaryFile(dir=self.folder.name, suffix=".png", delete=False) as file:
                image.save(file)
            return {"role": "assistant", "content": {"path": file.name}}


def _open(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise ValueError(f"{Path(path).name} is no image that can be read") from error


def _open_all(images: list[tuple[str, str | None]] | None) -> list[Image.Image]:
    """The images of a gallery, which holds paths with captions."""
    if not images:
        raise ValueError("give an image, or several")
    return [_open(path) for path, _ in images]


def _as_message(message: dict) -> dict:
    content = [
        {"type": "image", "image": _open(part["file"]["path"])}
        if part["type"] == "file"
        else {"type": "text", "text": part["text"]}
        for part in message["content"]
    ]
    return {"role": message["role"], "content": content}


@contextmanager
def shown_errors() -> Iterator[None]:
    """Shows what is wrong with the input to the visitor."""
    import gradio as gr

    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error)) from error


def build_app(pipe):
    """A gradio app around a pipeline, a `gr.Blocks`; `build_app(pipe).launch()` serves it.

    Raises:
        ImportError: without gradio.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError("the app needs gradio: pip install gradio") from error

    app = LavitApp(pipe)
    gallery: dict[str, Any] = {"columns": 2, "height": 420, "object_fit": "contain", "format": "png"}

    def several_images(label: str):
        return gr.Gallery(
            label=label, type="filepath", file_types=["image"], interactive=True, **{**gallery, "height": 260}
        )

    def count_and_seed() -> list:
        with gr.Row():
            return [
                gr.Slider(1, MOST_IMAGES, value=4, step=1, label="Images"),
                gr.Number(0, precision=0, minimum=0, maximum=2**32, label="Seed"),
            ]

    with gr.Blocks(title="LaVIT") as blocks:
        gr.Markdown("# LaVIT\nOne language model that reads images and draws them.")
        with gr.Tab("Draw"), gr.Row():
            with gr.Column():
                prompt = gr.Textbox(label="Prompt", value="red apple")
                options = count_and_seed()
                options.append(gr.Dropdown(app.ratios, label="Aspect ratio", visible=len(app.ratios) > 1))
                button = gr.Button("Draw", variant="primary")
            drawn = gr.Gallery(label="Drawn", interactive=False, **gallery)
            gr.on([button.click, prompt.submit], app.draw, [prompt, *options], drawn)
        with gr.Tab("Restyle"), gr.Row():
            with gr.Column():
                images = several_images("Images in front of the text")
                prompt = gr.Textbox(label="Text", value="in flat style")
                options = count_and_seed()
                button = gr.Button("Restyle", variant="primary")
            drawn = gr.Gallery(label="Restyled", interactive=False, **gallery)
            gr.on([button.click, prompt.submit], app.restyle, [images, prompt, *options], drawn)
        with gr.Tab("Read"), gr.Row():
            images = several_images("Images to read")
            with gr.Column():
                question = gr.Textbox(label="Question", placeholder="empty: a caption of each image")
                button = gr.Button("Read", variant="primary")
                answer = gr.Textbox(label="Answer", lines=2)
            gr.on([button.click, question.submit], app.read, [images, question], answer)
        with gr.Tab("Visual tokens"):
            with gr.Row():
                with gr.Column():
                    images = several_images("Images to tokenize")
                    button = gr.Button("Tokenize", variant="primary")
                shown = gr.Gallery(label="Kept patches", interactive=False, **gallery)
            button.click(app.show_tokens, images, [shown, gr.Textbox(label="Codes", lines=2)])
        with gr.Tab("Chat"):
            with gr.Row():
                kind = gr.Radio([TEXT, IMAGE], value=TEXT, label="Answer with")
                seed = gr.Number(0, precision=0, minimum=0, maximum=2**32, label="Seed of an image")
            textbox = gr.MultimodalTextbox(file_types=["image"], file_count="multiple", placeholder="Ask or draw")
            gr.ChatInterface(
                app.chat,
                multimodal=True,
                textbox=textbox,
                chatbot=gr.Chatbot(height=420, label="Chat"),
                additional_inputs=[kind, seed],
            )
    return blocks.queue(max_size=32)

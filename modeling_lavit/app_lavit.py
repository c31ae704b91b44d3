"""The demo for the browser, also the Space: drawing, reading, and the visual tokens of a picture."""

import torch
from PIL import Image

from .pipeline_lavit import LavitPipeline
from .show_lavit import enlarge, show_kept_patches


try:
    import gradio as gr
except ImportError as error:
    raise ImportError("the app needs gradio: pip install gradio") from error

SCREEN_SIZE = 480


def build_app(pipe: LavitPipeline) -> gr.Blocks:
    """A gradio app around a pipeline; `build_app(pipe).launch()` serves it."""
    processor, model = pipe.processor, pipe.model
    factor = max(1, SCREEN_SIZE // max(pipe.default_size))

    def draw(prompt: str, picture: Image.Image | None, count: int, seed: int, aspect_ratio: str) -> list[Image.Image]:
        with _shown_errors():
            images = pipe(
                prompt if picture is None else [picture, prompt],
                num_images_per_prompt=count,
                generator=[torch.Generator().manual_seed(seed + i) for i in range(count)],
                aspect_ratio=aspect_ratio,
            ).images
        return [enlarge(image, factor) for image in images]

    def read(picture: Image.Image, question: str) -> str:
        with _shown_errors():
            text = f"<image>Question: {question} Answer:" if question.strip() else "<image>"
            inputs = processor(images=picture, text=text)
            ids = model.generate(**inputs, generation_preset="answer" if question.strip() else "caption")
            post_process = processor.post_process_answer if question.strip() else processor.post_process_caption
            return post_process(ids, input_ids=inputs.input_ids)[0]

    def show_tokens(picture: Image.Image) -> tuple[Image.Image, Image.Image, str]:
        with _shown_errors():
            tokenizer = model.model.visual_tokenizer
            pixel_values = processor.image_processor(picture, return_tensors="pt").pixel_values
            tokens = tokenizer.tokenize(pixel_values.to(tokenizer.device))
            again = pipe(visual_tokens=tokens, generator=torch.Generator().manual_seed(0)).images[0]
        kept = show_kept_patches(picture, tokens.keep_mask[0], SCREEN_SIZE)
        count = f"{len(tokens.codes)} of {tokens.keep_mask.shape[1]} patches kept"
        return kept, enlarge(again, factor), f"{count}: {tokens.codes.tolist()}"

    ratios = list(pipe.defaults.aspect_ratios)
    with gr.Blocks(title="LaVIT") as app:
        gr.Markdown("# LaVIT\nOne language model that reads pictures and draws them.")
        with gr.Tab("Draw"):
            prompt = gr.Textbox(label="Prompt", value="red apple")
            picture = gr.Image(type="pil", label="A picture in front of the text (optional)", height=200)
            with gr.Row():
                count = gr.Slider(1, 8, value=4, step=1, label="Pictures")
                seed = gr.Number(0, precision=0, minimum=0, label="Seed")
                ratio = gr.Dropdown(ratios, value=ratios[0], label="Aspect ratio", visible=len(ratios) > 1)
            gallery = gr.Gallery(label="Drawn", columns=4)
            gr.Button("Draw").click(draw, [prompt, picture, count, seed, ratio], gallery)
        with gr.Tab("Read"):
            picture = gr.Image(type="pil", label="Picture", height=300)
            question = gr.Textbox(label="Question (empty: a caption)")
            gr.Button("Read").click(read, [picture, question], gr.Textbox(label="Answer"))
        with gr.Tab("Visual tokens"):
            picture = gr.Image(type="pil", label="Picture", height=300)
            button = gr.Button("Tokenize")
            with gr.Row():
                kept = gr.Image(label="Kept patches")
                again = gr.Image(label="Drawn from the visual tokens alone")
            button.click(show_tokens, [picture], [kept, again, gr.Textbox(label="Codes")])
    return app


class _shown_errors:
    """Shows a ValueError (empty prompt, no picture, unreadable picture) to the visitor."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, ValueError):
            raise gr.Error(str(error)) from error

"""What goes to the engine and comes back: plain data, without HTTP."""

from dataclasses import dataclass, field

from PIL import Image


@dataclass(frozen=True)
class Drawing:
    """One image to draw.

    Args:
        parts: the prompt, text and images in reading order.
        seed: of its generator, as the library's `torch.Generator().manual_seed(seed)`.
        size: (height, width); None is the checkpoint's.
    """

    parts: tuple[str | Image.Image, ...]
    seed: int
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Writing:
    """One answer to write.

    Args:
        messages: of a chat, as the processor's chat template takes them: blocks of type "text", and of type "image"
            with the image.
        preset: of `generate`: "caption" or "answer"; None for text and images in one stream.
        seed: where ids are drawn.
        max_tokens: None is the preset's.
        temperature, top_p: None is the preset's search.
        stops: strings at which the answer ends.
    """

    messages: list[dict]
    preset: str | None
    seed: int
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What was drawn or written.

    Args:
        parts: strings and images in order; of a drawing one image, of a text one string.
        prompt_tokens, completion_tokens: ids read and written.
        ended: whether the model ended it, or a stop, not the limit.
        batch_size: requests that ran together.
    """

    parts: list[str | Image.Image]
    prompt_tokens: int
    completion_tokens: int
    ended: bool = True
    batch_size: int = 1


@dataclass(frozen=True)
class Refusal:
    """The model cannot do what was asked: the client's fault, in one sentence."""

    message: str


@dataclass(frozen=True)
class Description:
    """What routes need to know of the model.

    Args:
        sizes: (height, width) that it draws, the default first.
        image_size: (height, width) to which images that it reads are brought.
    """

    sizes: list[tuple[int, int]] = field(default_factory=list)
    image_size: tuple[int, int] = (224, 224)

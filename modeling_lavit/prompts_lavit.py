"""Prompts as users give them to [`LavitPipeline`]."""

from PIL import Image


Prompt = str | Image.Image | list


def as_batch(prompt: Prompt) -> list[list[str | Image.Image]]:
    """One list of text and pictures for each prompt."""
    if isinstance(prompt, str | Image.Image):
        prompts = [[prompt]]
    elif not isinstance(prompt, list) or not prompt:
        raise ValueError(f"prompt must be a string, a picture or a non-empty list of them, got {prompt!r:.80}")
    elif all(isinstance(part, list) for part in prompt):
        prompts = prompt
    elif all(isinstance(part, str) for part in prompt):
        prompts = [[part] for part in prompt]
    else:
        prompts = [prompt]
    for i, parts in enumerate(prompts):
        wrong = [type(part).__name__ for part in parts if not isinstance(part, str | Image.Image)]
        if wrong:
            raise ValueError(f"prompt {i} holds {', '.join(wrong)}: a prompt is made of strings and PIL images")
        if not any(not isinstance(part, str) or part.strip() for part in parts):
            raise ValueError(f"prompt {i} is empty: it needs text or a picture")
    return prompts

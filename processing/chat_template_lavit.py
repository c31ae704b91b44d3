"""Conversations to prompts: the default chat template, and what `LavitProcessor` inherits to apply one."""

from collections.abc import Mapping
from typing import Any

from transformers.processing_utils import ImagesKwargs, ProcessorMixin, TextKwargs


# a noncharacter of Unicode, put into an <image> that a user has typed so that it is no mark
TYPED = "\ufdd0"

# A base model has learnt "Question: ... Answer:", not roles; what follows an answer begins in a new line, so that a
# line break ends an answer. Images stand where the message has them; those in front of its text stand in front of
# "Question:". With generation_mode="image" the prompt is the messages' own text and images.
DEFAULT_CHAT_TEMPLATE = """\
{%- set state = namespace(asked=false, text=false) -%}
{%- macro written(block) -%}
    {%- if block.type == "image" -%}
        {{- "<image>" -}}
    {%- elif block.type == "text" -%}
        {{- block.text -}}
    {%- else -%}
        {{- raise_exception("a message holds text and images, got a block of type " + block.type) -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro joined(blocks) -%}
    {%- for block in blocks -%}
        {{- " " if not loop.first -}}
        {{- written(block) | trim -}}
    {%- endfor -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- set content = message.content or "" -%}
    {%- set content = [{"type": "text", "text": content}] if content is string else content -%}
    {%- if generation_mode == "image" -%}
        {%- for block in content -%}
            {{- written(block) -}}
        {%- endfor -%}
    {%- elif message.role == "assistant" -%}
        {{- " Answer:" if state.asked -}}
        {%- generation -%}
            {{- " " if state.asked -}}
            {{- joined(content) + "\\n" -}}
        {%- endgeneration -%}
        {%- set state.asked = false -%}
    {%- elif message.role == "system" -%}
        {{- "\\n" if state.asked -}}
        {{- joined(content) + "\\n" -}}
        {%- set state.asked = false -%}
    {%- else -%}
        {{- "\\n" if state.asked -}}
        {%- set state.asked = false -%}
        {%- for block in content -%}
            {%- if block.type != "text" or block.text | trim -%}
                {{- "Question:" if block.type == "text" and not state.asked -}}
                {%- set state.asked = state.asked or block.type == "text" -%}
                {{- " " if state.asked -}}
                {{- written(block) | trim -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and state.asked and generation_mode != "image" -%}
    {{- " Answer:" -}}
{%- endif -%}
"""


class LavitChatMixin(ProcessorMixin):
    """Needs `tokenizer`, `chat_template`, `image_token` and `generation_mode`."""

    generation_mode: str
    image_token: str

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs):
        """As in every processor of transformers, with images in content blocks (`image`, `url`, `path` or `base64`).

        The default template writes `<image>Question: ... Answer:`, and an answer up to its line break; images stand
        where the message has them. With `generation_mode="image"` (a keyword, or an entry of `processor_kwargs`) the
        prompt is the messages' own text and images, and ends with `[IMG]`.

        A batch of conversations is neither padded nor made a tensor unless `padding` or `return_tensors` asks for it,
        as in transformers: trainers pad it themselves, with a mask.

        With `tokenize=True` the text of messages is text: neither control tokens of the tokenizer nor `<image>` typed
        in it mean anything, unless the images are given apart, in `processor_kwargs`. A template of one's own may
        write control tokens; then messages that hold one as text are refused.

        Raises:
            ValueError: besides those of a call, a message whose text holds a control token that the template uses.
        """
        if len(conversation) == 0:
            raise ValueError("the conversation is empty")
        processor_kwargs = dict(kwargs.pop("processor_kwargs", None) or {})
        names = {
            "generation_mode",
            "reference_compat",
            "max_image_pixels",
            "split_special_tokens",
            *TextKwargs.__annotations__,
        }
        for name in (names | set(ImagesKwargs.__annotations__)) & set(kwargs) - {"return_tensors"}:
            processor_kwargs[name] = kwargs.pop(name)
        processor_kwargs.pop("sanitize_control_tokens", None)  # always done
        processor_kwargs.setdefault("generation_mode", self.generation_mode)

        is_batch = isinstance(conversation[0], list | tuple) or hasattr(conversation[0], "messages")
        if is_batch and not {"padding", "return_tensors"} & {*kwargs, *processor_kwargs}:
            processor_kwargs |= {"padding": False, "return_tensors": None}

        own = self.chat_template
        if isinstance(own, dict):
            template = own.get(chat_template or "default", chat_template or "")
        else:
            template = (own if chat_template is None else chat_template) or ""
        if "generation_mode" in template:
            kwargs["generation_mode"] = processor_kwargs["generation_mode"]
        if kwargs.get("tokenize"):
            controls = self._control_tokens_of(template)
            if controls and not processor_kwargs.setdefault("split_special_tokens", False):
                _refuse(controls, conversation)
            mark = None if processor_kwargs.get("images") is not None else self.image_token
            conversation = _copied(conversation, mark)
        return super().apply_chat_template(conversation, chat_template, processor_kwargs=processor_kwargs, **kwargs)

    def _control_tokens_of(self, template: str) -> set[str]:
        """Control tokens of the tokenizer that a template writes, by name (`eos_token`) or as they are."""
        tokens = self.tokenizer.special_tokens_map.items()
        return {token for name, token in tokens if isinstance(token, str) and (name in template or token in template)}


def _copied(item: Any, mark: str | None) -> Any:
    """A copy of messages without entries that are `None`, as tables fill them; a typed `mark` is one no more."""
    if isinstance(item, str):
        return item.replace(mark, f"{mark[0]}{TYPED}{mark[1:]}") if mark else item
    if isinstance(item, list | tuple):
        return [_copied(inner, mark) for inner in item]
    if isinstance(item, Mapping) and item.get("type", "text") == "text":
        return {key: _copied(value, mark) for key, value in item.items() if value is not None}
    if isinstance(item, Mapping):
        return {key: value for key, value in item.items() if value is not None}
    return item


def _refuse(controls: set[str], item: Any) -> None:
    if isinstance(item, str) and (found := [token for token in sorted(controls) if token in item]):
        raise ValueError(
            f"a message holds {found[0]} as text, but the chat template uses it as a control token: take it out, or "
            "use a template without control tokens"
        )
    for inner in item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ():
        _refuse(controls, inner)

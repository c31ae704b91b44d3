"""LaVIT on vLLM: reading images, and drawing without guidance as plain tokens.

vLLM's own Transformers backend asks the processor how many positions an image of a given size takes. Here that depends
on what is in the image, so `processing` runs the visual tokenizer before a prompt is scheduled, in the process that
takes the requests, and hands the features on; `model` is vLLM's own language model with these features put in.
"""


def register() -> None:
    """Makes the architecture and the configuration of LaVIT known to vLLM; called in each of its processes."""
    from vllm import ModelRegistry

    import modeling_lavit  # noqa: F401  registers configuration and processor with the Auto classes

    ModelRegistry.register_model(
        "LavitForConditionalGeneration", "modeling_lavit.vllm_plugin.model:LavitForConditionalGeneration"
    )

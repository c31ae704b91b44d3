"""Tests of the other projects' suites that do not apply to classes of this package, and why.

Suite -> {pattern of a test (`peer_file.py::Class::test`): reason}. What leaves itself out (no GPU, a package that is
not installed) need not be here. An entry that matches no test is an error.
"""

STRICT = (
    "loading is strict: where transformers initialises what a checkpoint lacks and warns, an error names the weights"
)
FILLED = "counts the caller's ids, and attentions and caches are of the filled positions; LavitTextModelTest runs it"
GROWS = (
    "gives positions or embeddings of the unfilled prompt together with pixel_values, and a slot grows when it is "
    "filled (expand_inputs); LavitTextModelTest runs it"
)
KEPT = (
    "asks for generation without a cache: a prompt with images is filled once, and what follows goes on from its "
    "cache; LavitTextModelTest runs it"
)

NOT_APPLICABLE: dict[str, dict[str, str]] = {
    "diffusers": {
        "peer_pipeline.py::*::test_save_load_optional_components": "draws a prompt without processor and model, which "
        "are optional for what decodes codes alone; test_pipeline_stages.py saves and loads every stage",
        "peer_pipeline.py::*::test_from_pipe_consistent_config": "compares with Stable Diffusion's pipelines, loaded "
        "from the Hub, whose text encoders no component here can stand in for",
    },
    "transformers": {
        "peer_models.py::*::test_base_model_prefix_loads_base_weights": STRICT,
        "peer_models.py::*::test_correct_missing_keys": STRICT,
        "peer_models.py::*::test_model_weights_reload_no_missing_tied_weights": STRICT,
        "peer_models.py::LavitTextModelTest::test_get_image_features*": "without images: LavitModelTest has them",
        "peer_models.py::LavitModelTest::test_attention_outputs": FILLED,
        "peer_models.py::LavitModelTest::test_past_key_values_format": FILLED,
        "peer_models.py::LavitModelTest::test_*generate_dict_output": KEPT,
        "peer_models.py::LavitModelTest::test_greedy_generate_dict_outputs": KEPT,
        "peer_models.py::LavitModelTest::test_generate_with_and_without_position_ids": GROWS,
        "peer_pipelines.py::test_pipeline?AnyToAnyPipelineTests*": "the task needs torchvision, which does not come "
        "with this package; test_pipeline_tasks.py runs it",
        "peer_models.py::*::test_resize_tokens_embeddings": "drops ids: codes are the last ones, and a model without "
        "them could not draw; resizing says so",
        "peer_models.py::LavitModelTest::test_left_padding_compatibility": GROWS,
        "peer_models.py::LavitModelTest::test_inputs_embeds*": GROWS,
        "peer_models.py::LavitModelTest::test_generate_from_inputs_embeds*": GROWS,
        "peer_models.py::LavitModelTest::test_retain_grad_hidden_states_attentions": "the rows of the caller's ids "
        "are gathered from the filled positions: they are no part of the way to the logits",
        "peer_models.py::LavitModelTest::test_training_gradient_checkpointing*": "looks at the model's first layer, "
        "which is the frozen visual tokenizer's: LavitTextModelTest runs it on the language model",
        "peer_models.py::LavitVisualTokenizerTest::test_model_outputs_equivalence": "subtracts outputs, and the mask "
        "of kept patches is of bools",
        "peer_models.py::LavitVisualTokenizerTest::test_retain_grad_hidden_states_attentions": "the first output is "
        "codes, which are integers",
        "peer_models.py::LavitDetokenizerTest::test_model_get_set_embeddings": "codes are looked up in a codebook, "
        "which is a buffer and no nn.Embedding",
        "peer_models.py::LavitVisualTokenizerTest::test_model_get_set_embeddings": "no ids go in, so that there is no "
        "nn.Embedding",
        "peer_processing.py::LavitImageProcessingTest::test_call_numpy_4_channels": "images are RGB, whose mean has "
        "three entries",
        "peer_processing.py::LavitProcessorTest::test_apply_chat_template_image_*": "prompts have no BOS, as the "
        "reference's have none, where the test compares with the tokenizer's own",
        "peer_processing.py::LavitProcessorTest::test_subprocessor_defaults_0_text": "prompts have no BOS, see above",
        "peer_processing.py::LavitProcessorTest::test_subprocessor_defaults_preserved_by_kwargs_0_images": "how "
        "prompts are padded is the processor's affair: a tokenizer's own padding would put it on the wrong side",
        "peer_processing.py::LavitProcessorTest::test_processor_text_has_no_visual": "fetches an image from the Hub",
        "peer_processing.py::LavitImageProcessingTest::test_new_models_require_torchvision_backend": "a rule for "
        "models inside transformers; here images are processed by Pillow, as the reference does",
    },
}

"""Tests of the other projects' suites that do not apply to classes of this package, and why.

Suite -> {pattern of a test (`peer_file.py::Class::test`): reason}. What leaves itself out (no GPU, a package that is
not installed) need not be here. An entry that matches no test is an error.
"""

NOT_APPLICABLE: dict[str, dict[str, str]] = {
    "diffusers": {
        "peer_pipeline.py::*::test_from_pipe_consistent_config": "compares with Stable Diffusion's pipelines, loaded "
        "from the Hub, whose text encoders no component here can stand in for",
    },
    "transformers": {},
}

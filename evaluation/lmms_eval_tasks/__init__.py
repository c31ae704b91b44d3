"""Tasks of lmms-eval in the paper's prompts; they are loaded by the harness: `--include_path` this folder."""

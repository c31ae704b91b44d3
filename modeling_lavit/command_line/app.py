"""`lavit app`."""

import argparse

from .common import load_pipeline


def add_commands(add) -> None:
    """Adds the subcommands of this file; `add` is that of [`build_parser`]."""
    add(
        "app",
        app,
        help="open the demo in a browser (needs gradio)",
        description="Serves a demo for the browser: draw, restyle, read, visual tokens, chat. Needs gradio.",
        example="lavit app --model organisation/checkpoint",
    )


def app(options: argparse.Namespace):
    """`lavit app`"""
    from modeling_lavit.app_lavit import build_app

    build_app(load_pipeline(options)).launch()

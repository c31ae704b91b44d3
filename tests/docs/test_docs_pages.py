"""README and docs/: links lead somewhere, names exist, figures are the recorded ones."""

import json
import re

import pytest
from documents import PAGES, ROOT

import modeling_lavit
from modeling_lavit.checkpoints import LAVIT_EMOJI


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_to_files(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", text):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_classes_that_a_page_names_are_public(page):
    text = (ROOT / page).read_text()
    imported = re.findall(r"^from modeling_lavit import (.*)", text, re.M)
    named = set(re.findall(r"`(Lavit\w+)", text)) | {name for line in imported for name in line.split(", ")}
    assert named <= set(modeling_lavit.__all__)


def test_the_readme_is_short_and_its_table_holds_the_recorded_figures():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 120
    table = readme.split("<!-- RESULTS -->")[1].split("<!-- /RESULTS -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()]
    figures = json.loads((LAVIT_EMOJI / "figures.json").read_text())
    keys = [
        ("caption_exact",),
        ("text_to_image", "name_top5"),
        ("text_to_image", "style"),
        ("image_and_text_to_image", "name_top5"),
        ("reconstruction", "name_top5"),
    ]
    for row, key in zip(rows[2:], keys, strict=False):
        for cell, split in zip(row[1:], ("seen", "held_out"), strict=False):
            value = figures[split]
            for part in key:
                value = value[part]
            assert cell == f"{value:.2f}", row
    assert rows[-1][1] == f"{figures['tokens']['kept_mean']:.1f}"

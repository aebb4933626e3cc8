"""The code on the pages of the guide runs, block after block; the map of the survey is complete."""

import re
from pathlib import Path
from pkgutil import resolve_name

import pytest
from typer.testing import CliRunner

from lowrank_sp.cli import app

DOCS = Path(__file__).parent.parent / "docs"
#: Pages of the reference on what stands under all topics of the survey.
GROUND = {"operators", "iterate", "testing"}


@pytest.mark.parametrize(
    "page",
    [
        "train.md",
        "updates.md",
        "pretraining.md",
        "posttraining.md",
        "sensing.md",
        "initializers.md",
        "merging.md",
        "federated.md",
        "serving.md",
        "formats.md",
        "quantized.md",
        "compress.md",
        "forms-svd.md",
        "forms-rank.md",
        "forms-layers.md",
        "attach.md",
    ],
)
def test_code_of(page, tmp_path, monkeypatch):
    blocks = re.findall(
        r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE
    )
    assert blocks
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", ["../README.md", "quickstart.md"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_code_and_commands_of(page, tmp_path, monkeypatch):
    """A first tour: blocks of Python, and commands between them that use each other's files."""
    blocks = re.findall(
        r"^```(python|shell)\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE
    )
    monkeypatch.chdir(tmp_path)
    names = {}
    for language, block in blocks:
        if language == "python":
            exec(compile(block, page, "exec"), names)
            continue
        for command in re.findall(r"^(?:.*&& )?lowrank-sp ([^#\n]+)", block, re.MULTILINE):
            result = CliRunner().invoke(app, command.split())
            assert result.exit_code == 0, (command, result.output, result.exception)


def test_the_map_of_the_survey_is_complete():
    shown = set(re.findall(r"`~?(lowrank_sp[\w.]+)`", (DOCS / "survey.md").read_text()))
    shown |= set(re.findall(r"<(lowrank_sp[\w.]+)>`", (DOCS / "survey.md").read_text()))
    for name in shown:
        resolve_name(name)
    for page in (DOCS / "api").glob("*.md"):
        if page.stem in GROUND:
            continue
        for section in re.split(r"^#+ ", page.read_text(), flags=re.MULTILINE):
            if section.startswith("Building blocks"):
                continue
            entries = r"^(?:   ~|.. py:data:: |.. autoclass:: )(lowrank_sp[\w.]+)$"
            listed = set(re.findall(entries, section, re.MULTILINE))
            assert listed <= shown, f"{page.name} has {sorted(listed - shown)}, survey.md has not"

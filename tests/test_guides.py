"""The code on the pages of the guide runs, block after block."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize(
    "page",
    [
        "train.md",
        "updates.md",
        "pretraining.md",
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

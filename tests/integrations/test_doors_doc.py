"""Each block of docs/doors.md runs, and leaves torch as it was."""

import re
import sys
from pathlib import Path

import pytest
import torch.nn.functional as F

DOC = Path(__file__).parent.parent.parent / "docs" / "doors.md"
BLOCKS = re.findall(r"## ([^\n]+)\n\n```python\n(.*?)```", DOC.read_text(), re.DOTALL)


def test_every_block_is_found():
    assert len(BLOCKS) == DOC.read_text().count("```python") == DOC.read_text().count("\n## ")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("title, code", BLOCKS, ids=[title for title, _ in BLOCKS])
def test_a_block_runs(title, code):
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    if "transformers" in code:
        pytest.importorskip("transformers")
    before = F.scaled_dot_product_attention, sys.modules.get("flash_attn")
    exec(compile(code, f"{DOC.name}, {title}", "exec"), {})
    assert (F.scaled_dot_product_attention, sys.modules.get("flash_attn")) == before

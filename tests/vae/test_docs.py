"""What docs/elbo.md claims, it claims in code that runs."""

from __future__ import annotations

import re
from pathlib import Path

DOC = Path(__file__).parents[2] / "docs" / "elbo.md"


def test_every_block_of_the_elbo_story_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", DOC.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{DOC.name}, block {number}", "exec"), names)
    assert sum(block.count("assert") for block in blocks) >= 6

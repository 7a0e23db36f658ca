"""Triton's two worlds cannot share a process: its interpreter, switched on before Triton is
imported, and its compiler.

Tests in `interpreted/` need the first, `test_compiled.py` and `test_specialization.py` the second.
What this process cannot run is not collected here; `test_interpreter.py` runs the interpreted tests
in processes of their own, so that a plain `pytest` runs everything.
"""

from __future__ import annotations

import os

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore = (
    ["test_compiled.py", "test_specialization.py", "test_interpreter.py", "test_warmup.py"]
    if INTERPRETING
    else ["interpreted"]
)

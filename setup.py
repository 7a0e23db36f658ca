"""Everything that pyproject.toml cannot say: the extension and how it is built."""

import sys
from pathlib import Path

from setuptools import Extension, setup

# PEP 517 front ends do not put the project's folder on sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_support.build_ext import BuildExtension  # noqa: E402

setup(
    # The sources are BuildExtension's to find: each is compiled in its own way, some of them several times.
    ext_modules=[Extension("fused_elbo._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

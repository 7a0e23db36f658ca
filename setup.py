"""Everything that pyproject.toml cannot say: the extension and how it is built."""

import sys
from pathlib import Path

from setuptools import Extension, setup

# PEP 517 front ends do not put the project's folder on sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_support.build_ext import BuildExtension

setup(
    # BuildExtension finds the sources: they are compiled in four ways, some of them several times.
    ext_modules=[Extension("fused_elbo._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

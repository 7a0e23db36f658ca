"""The pieces of setup.py: finding torch and nvcc, compiling csrc/, and the setuptools command that ties them together.

Nothing here imports torch: a build must work in an environment whose torch cannot be imported (no driver, other libc).
"""

"""The pieces of setup.py: finding torch and nvcc, compiling csrc/, and the command that does it.

Nothing here imports torch: a build must work where torch cannot be imported.
"""

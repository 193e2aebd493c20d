"""The optional compiled libraries will be declared here (one for the CPU, one that links CUDA).

They stay optional: without a compiler the package installs as pure Python, and says in one line why a library is missing.
Everything else is in ``pyproject.toml``.
"""

from setuptools import setup

setup()

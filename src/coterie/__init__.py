"""coterie trains Mixture-of-Experts language models on private text, alone or together.

Importing this package does not load torch: submodules do, when they are imported.
"""

__version__ = "0.1.0"

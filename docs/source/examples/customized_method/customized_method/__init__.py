"""A method of your own: everything that a package needs to run on FlashDreams.

Install it with ``pip install -e .`` from the folder that holds ``pyproject.toml``, then type
``flashdreams-run customized-method``.
"""

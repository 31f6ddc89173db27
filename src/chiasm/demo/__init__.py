"""Seeded ``images`` with questions, and ``talk`` without an image, for the checkpoint that ships with the package.

``terminal`` shows an image in a terminal.
"""

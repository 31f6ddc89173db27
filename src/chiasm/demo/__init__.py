"""Seeded images and questions for the checkpoint that ships with the package."""

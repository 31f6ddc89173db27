"""Seeded pictures and questions for the checkpoint that ships with the package."""

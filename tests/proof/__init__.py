"""Proof that a refactor changes no number; temporary, see __main__.py."""

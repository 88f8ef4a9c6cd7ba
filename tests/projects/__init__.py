"""Whole small projects, as a user could have them, each in processes of its own."""

"""A small site whose processes are killed at random; ``python -m tests.chaos``."""

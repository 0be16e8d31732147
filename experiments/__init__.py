"""Claimed results: one script each, with its command and what it gave."""

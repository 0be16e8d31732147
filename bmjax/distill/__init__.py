"""Distillation: students that learn from teachers, their features, or themselves."""

from bmjax.distill.tour import distill

__all__ = ["distill"]

"""Fine-tuning: pretrained weights with a new head, trained with care."""

from bmjax.finetune.tune import finetune

__all__ = ["finetune"]

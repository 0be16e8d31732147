"""What torchvision publishes: its ImageNet-1k weights, as the families of models list them.

Every value is that of `torchvision.models.get_model_weights` in torchvision 0.29 (BSD-3-Clause);
`tests/test_weights_named.py` compares all of them where torchvision is installed.
"""

from bmjax.models.published import OFFICIAL_URL, PublishedWeights
from bmjax.models.registry import architectures

__all__ = ["OFFICIAL_URL", "PUBLISHED", "PublishedWeights"]

PUBLISHED = tuple(weights for each in architectures() for weights in each.published)

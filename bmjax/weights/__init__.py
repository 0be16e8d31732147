"""Pretrained weights: files without PyTorch, conversion both ways, torchvision's own by name."""

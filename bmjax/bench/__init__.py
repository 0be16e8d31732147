"""How fast training and inference are, against what a user would take instead."""

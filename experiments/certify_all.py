"""Certifies the conversion of all ten torchvision ResNets.

Random weights with perturbed running statistics, four images of noise, 10 classes. Outputs, the
gradient of every param, and one step of SGD are compared with torchvision's, in float32 and in
float64, and the state dict after a round trip; see `bmjax.weights.certificate.certify`. With
random weights and so small a batch, float32 alone can't judge a deep network's gradients in
training mode: PyTorch's own are off by more than 2% there. Such rows say `noise`, and float64
judges.

    uv run --extra torch python experiments/certify_all.py --sizes 64 224
"""

import argparse
import time

import numpy as np
import torch
import torchvision

from bmjax.models import RESNETS
from bmjax.weights.certificate import certify

MODELS = [name for name in RESNETS if hasattr(torchvision.models, name)]


def draw(model: str) -> dict[str, np.ndarray]:
    """Returns torchvision's random weights with running statistics that are not 0 and 1."""
    torch.manual_seed(0)
    state_dict = getattr(torchvision.models, model)(num_classes=10).state_dict()
    generator = torch.Generator().manual_seed(1)
    for name, value in state_dict.items():
        if name.endswith("running_mean"):
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        elif name.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif name.endswith("num_batches_tracked"):
            value.fill_(7)
    return {name: value.numpy() for name, value in state_dict.items()}


def main() -> None:
    """Prints the largest relative differences of each model, a line per size and precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=MODELS, help="(default: all ten)")
    parser.add_argument("--sizes", nargs="+", type=int, default=[64], help="pixels (default: 64)")
    arguments = parser.parse_args()
    print(
        f"{'model':18} {'px':>3} {'in':7}  {'logits':>8} {'gradients':>15} {'statistics':>15} "
        f"{'params':>15}  seconds"
    )
    failed = False
    for model in arguments.models:
        for size in arguments.sizes:
            begin = time.monotonic()
            images = np.random.default_rng(0).normal(size=(4, size, size, 3)).astype(np.float32)
            certificate = certify(draw(model), model, {"noise": images})
            worst = {
                (row.precision, row.part): row
                for row in certificate.worst()
                if row.part not in ("stages", "round trip")
            }
            for precision in ("float32", "float64"):
                logits = worst[precision, "logits"]
                parts = [
                    worst[precision, part]
                    for part in ("gradients", "statistics after a step", "params after a step")
                ]
                cells = " ".join(f"{row.relative:>9.1e} {row.verdict:5}" for row in parts)
                print(f"{model:18} {size:>3} {precision}  {logits.relative:>8.1e} {cells}", end="")
                print(f"  {time.monotonic() - begin:.0f}" if precision == "float64" else "")
            if not certificate.passed:
                failed = True
                print(certificate.as_table())
    print("FAIL" if failed else "every comparison passes, and every round trip is bit-equal")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()

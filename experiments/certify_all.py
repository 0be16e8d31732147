"""Certifies the conversion of all ten torchvision ResNets.

Four images of noise, 10 classes. Outputs, the gradients of every param in evaluation and in
training mode, and one step of SGD are compared with torchvision's, in float32 and in float64, and
the state dict after a round trip; see `bmjax.weights.certificate.certify`.

Random weights with perturbed running statistics, of one of two kinds:

- `active`: weights of BatchNorm about 0.12 and its biases about 1, so that nearly every ReLU is
  far from its kink; running statistics are those of another batch, perturbed.
- `torchvision`: as torchvision draws them, half of all ReLUs at 0; running statistics about 0
  and 1, perturbed.

Tolerances of float32, as shares of the largest value of each array: logits and stages 1e-4,
gradients 1e-3, statistics 1e-5, params 1e-4. With `torchvision`'s draw and so small a batch,
float32 can't judge a deep network's gradients in training mode, as rounding is magnified: PyTorch's
own are off by more than 2%. Such rows say `noise`, and float64 judges. With the other draw nothing
magnifies rounding, but where two pixels under the max pooling are equal but for rounding, the
gradient goes by one or the other. A star marks what is over the stated tolerance, but allowed.

    uv run --extra torch python experiments/certify_all.py --sizes 64

On two virtual cores of an AMD EPYC, jax 0.10.2, torch 2.15.0, torchvision 0.29.2, 7 minutes;
largest differences, relative to the largest value of the same array:

    model               px in         logits       gradients      statistics          params   s
    resnet18            64 float32   1.2e-06   6.2e-06 pass    8.1e-07 pass    5.2e-06 pass
    resnet18            64 float64   1.8e-15   2.4e-14 pass    2.5e-15 pass    1.4e-14 pass   18
    resnet34            64 float32   1.6e-06   4.3e-02 noise   1.9e-06 pass    1.8e-02 pass
    resnet34            64 float64   3.3e-15   7.2e-14 pass    5.8e-15 pass    5.4e-14 pass   27
    resnet50            64 float32   1.5e-06   3.8e-01 noise   4.4e-05 pass    2.3e-01 noise
    resnet50            64 float64   4.3e-15   5.1e-13 pass    1.0e-13 pass    3.0e-13 pass   27
    resnet101           64 float32   1.3e-06   5.0e-01 noise   1.9e-04 pass    3.1e-01 noise
    resnet101           64 float64   3.7e-15   2.7e-12 pass    5.3e-13 pass    1.6e-12 pass   49
    resnet152           64 float32   1.8e-06   5.1e-01 noise   5.1e-04 pass    3.3e-01 noise
    resnet152           64 float64   2.2e-15   9.2e-12 pass    1.1e-12 pass    8.2e-12 pass   76
    resnext50_32x4d     64 float32   8.5e-07   2.3e-01 noise   2.4e-05 pass    1.5e-01 noise
    resnext50_32x4d     64 float64   3.3e-15   4.3e-13 pass    6.5e-14 pass    3.1e-13 pass   24
    resnext101_32x8d    64 float32   5.7e-07   4.1e-01 noise   1.4e-04 pass    2.5e-01 noise
    resnext101_32x8d    64 float64   1.4e-15   2.5e-12 pass    2.6e-13 pass    1.5e-12 pass   53
    resnext101_64x4d    64 float32   1.3e-06   3.7e-01 noise   1.1e-04 pass    2.5e-01 noise
    resnext101_64x4d    64 float64   3.3e-15   2.5e-12 pass    2.1e-13 pass    1.4e-12 pass   49
    wide_resnet50_2     64 float32   2.6e-06   1.5e-01 noise   2.8e-05 pass    9.1e-02 noise
    wide_resnet50_2     64 float64   5.0e-15   4.9e-13 pass    8.5e-14 pass    3.6e-13 pass   33
    wide_resnet101_2    64 float32   1.9e-06   3.3e-01 noise   1.7e-04 pass    2.9e-01 noise
    wide_resnet101_2    64 float64   3.5e-15   2.8e-12 pass    4.0e-13 pass    1.7e-12 pass   61

"every comparison passes, and every round trip is bit-equal". At 224 pixels it takes longer.
"""

import argparse
import time

import numpy as np
import torch
import torchvision

from bmjax.models import RESNETS
from bmjax.weights.certificate import TOLERANCES, Row, certify

MODELS = [name for name in RESNETS if hasattr(torchvision.models, name)]
# The columns beside the logits, by what the certificate calls them.
PARTS = {
    "evaluation gradients": "eval. gradients",
    "gradients": "gradients",
    "statistics after a step": "statistics",
    "params after a step": "params",
}


def draw(model: str, size: int, kind: str) -> dict[str, np.ndarray]:
    """Returns random weights; see the module's docstring for the kinds."""
    torch.manual_seed(0)
    net = getattr(torchvision.models, model)(num_classes=10)
    generator = torch.Generator().manual_seed(1)
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]

    def normal(shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        if kind == "active":
            for norm in norms:
                norm.weight.copy_(0.12 + 0.02 * normal(norm.weight.shape))
                norm.bias.copy_(1 + 0.1 * normal(norm.bias.shape))
                norm.momentum = 1.0  # running statistics become those of the one batch
            net.train()(normal(torch.Size((4, 3, size, size))))
        state_dict = net.state_dict()
        for name, value in state_dict.items():
            if name.endswith("running_mean"):
                variance = state_dict[name.replace("mean", "var")]
                value.add_(0.1 * variance.sqrt() * normal(value.shape))
            elif name.endswith("running_var"):
                value.mul_(0.75 + 0.5 * torch.rand(value.shape, generator=generator))
            elif name.endswith("num_batches_tracked"):
                value.fill_(7)
    return {name: value.numpy() for name, value in state_dict.items()}


def cell(row: Row) -> str:
    """Returns difference and verdict; with a star where float32 is over the stated tolerance."""
    stated = row.precision == "float64" or row.relative <= TOLERANCES[row.part]
    return f"{row.relative:>8.1e}{' ' if stated else '*'} {row.verdict:5}"


def main() -> None:
    """Prints the largest relative differences of each model, a line per size and precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=MODELS, help="(default: all ten)")
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 224], help="in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the images")
    parser.add_argument("--draw", choices=("active", "torchvision"), default="active")
    arguments = parser.parse_args()
    columns = " ".join(f"{part:>15}" for part in PARTS.values())
    print(f"{'model':18} {'px':>3} {'in':7}  {'logits':>8} {columns}   s")
    failed = False
    for model in arguments.models:
        for size in arguments.sizes:
            begin = time.monotonic()
            random = np.random.default_rng(arguments.seed)
            images = random.normal(size=(4, size, size, 3)).astype(np.float32)
            certificate = certify(draw(model, size, arguments.draw), model, {"noise": images})
            worst = {
                (row.precision, row.part): row
                for row in certificate.worst()
                if row.part not in ("stages", "round trip")
            }
            for precision in ("float32", "float64"):
                logits = worst[precision, "logits"]
                parts = [worst[precision, part] for part in PARTS]
                cells = " ".join(cell(row) for row in parts)
                line = f"{model:18} {size:>3} {precision}  {logits.relative:>8.1e} {cells}"
                seconds = f"  {time.monotonic() - begin:.0f}" if precision == "float64" else ""
                print(line + seconds, flush=True)
            if not certificate.passed:
                failed = True
                print(certificate.as_table())
    print("FAIL" if failed else "every comparison passes, and every round trip is bit-equal")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()

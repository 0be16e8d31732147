"""The certificate of a conversion: what torchvision and bmjax compute from the same weights.

Needs PyTorch and torchvision, from the extra `torch`; nothing else in the package does.
"""

import json
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bmjax.errors import UserError
from bmjax.machine.storage import write_atomically
from bmjax.models import create_model, find
from bmjax.weights.convert import from_torchvision, to_torchvision

LEARNING_RATE = 0.1
# Of the largest difference, as a share of the largest value of the same array.
TOLERANCES = {
    "round trip": 0.0,
    "stages": 1e-4,
    "logits": 1e-4,
    "evaluation gradients": 1e-3,
    "gradients": 1e-3,
    "statistics after a step": 1e-5,
    "params after a step": 1e-4,
}
# In float64 nothing but the order of sums is left to differ.
EXACT = 1e-8
# In float32 a batch's own statistics and the kinks of ReLU can magnify rounding beyond any fixed
# tolerance: PyTorch's own float32 then misses its float64 by as much. So many times that is
# allowed.
NOISE_FACTOR = 5.0
# Where two pixels under the max pooling, or a value and the 0 of ReLU, are equal but for rounding,
# a gradient goes by one or the other. A few such places change the stem's by up to so much of its
# largest value.
KINKS = 3e-2
# Where that is more, float32 says nothing, and float64 alone judges.
_LARGEST_TOLERANCE = 0.1
# A gradient that is zero but for rounding, as that of a bias before a normalisation, is compared
# with this share of the largest of all.
_FLOOR = 1e-4
# Arrays by name, by part.
Results = dict[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        images: which images it was made on.
        precision: float32 or float64, on both sides.
        part: what was compared, a key of TOLERANCES.
        name: the array, in bmjax's or torchvision's words.
        absolute: largest absolute difference.
        relative: the same divided by the largest absolute value of the array; of gradients at
            least by a ten-thousandth of the largest of all, as some are 0 but for rounding.
        tolerance: of `relative`; None where float32 itself is too far off to judge by.
    """

    images: str
    precision: str
    part: str
    name: str
    absolute: float
    relative: float
    tolerance: float | None

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; one that is not a number is not."""
        return self.relative <= (np.inf if self.tolerance is None else self.tolerance)

    @property
    def verdict(self) -> str:
        """`pass`, `FAIL`, or `noise` where there is nothing to judge by."""
        if self.passed:
            return "noise" if self.tolerance is None else "pass"
        return "FAIL"


@dataclass(frozen=True)
class Certificate:
    """All comparisons of one conversion, and what they were made with."""

    model: str
    num_classes: int
    rows: tuple[Row, ...]
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every comparison is within its tolerance."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def worst(self) -> list[Row]:
        """Returns the largest relative difference of each stage and part, for each image set."""
        worst: dict[tuple[str, str, str, str], Row] = {}
        for row in self.rows:
            stage = row.name if row.part == "stages" else ""
            key = (row.images, row.precision, row.part, stage)
            if key not in worst or not row.relative <= worst[key].relative:
                worst[key] = row
        return list(worst.values())

    def as_json(self) -> str:
        """Returns every comparison as indented JSON."""
        rows = [{**asdict(row), "verdict": row.verdict} for row in self.rows]
        content = {
            "model": self.model,
            "num_classes": self.num_classes,
            "passed": self.passed,
            "learning_rate": LEARNING_RATE,
            "versions": self.versions,
            "rows": rows,
        }
        return json.dumps(content, indent=1) + "\n"

    def as_table(self) -> str:
        """Returns the worst of each part as text, one line each."""
        lines = [
            f"{self.model}, {self.num_classes} classes: "
            + ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            f"{'images':<12} {'computed in':<11} {'what':<23} {'largest at':<31} {'absolute':>8} "
            f"{'relative':>8} {'allowed':>8}",
        ]
        for row in self.worst():
            lines.append(
                f"{row.images:<12} {row.precision:<11} {row.part:<23} {row.name:<31} "
                f"{row.absolute:>8.1e} {row.relative:>8.1e} "
                f"{'' if row.tolerance is None else format(row.tolerance, '.1e'):>8}  {row.verdict}"
            )
        number = sum(not row.passed for row in self.rows)
        verdict = "PASS" if self.passed else f"FAIL ({number} of them)"
        return "\n".join([*lines, f"{len(self.rows)} comparisons: {verdict}"]) + "\n"


def certify(
    state_dict: Mapping[str, np.ndarray],
    model: str,
    images: Mapping[str, np.ndarray],
) -> Certificate:
    """Compares bmjax with torchvision on the same weights and images, on the CPU.

    In evaluation mode: the output of each stage, the logits, and the gradient of every param. In
    training mode, with one step of plain SGD at learning rate 0.1: the gradient of every param,
    the running statistics and the params after the step. The loss is the mean cross entropy. And
    the state dict after a round trip.

    All of it in float64, where the two must agree but for the order of sums, and in float32. In
    float32, gradients and what a step gives are compared with PyTorch's float64; a difference is
    allowed up to the stated tolerance or five times what PyTorch's own float32 is off, whichever
    is larger: small batches can magnify rounding that far; and of gradients always up to three
    hundredths, for the kinks of ReLU and max pooling. Where more than a tenth would be allowed,
    the row says `noise`, and float64 judges alone.

    Args:
        state_dict: in torchvision's names.
        model: name of the ResNet.
        images: normalised batches [batch, height, width, 3] float32, by name.

    Raises:
        UserError: PyTorch is missing, torchvision has no such model, or the state dict does not
            fit.
    """
    torch, make = _torch_and_maker(model)
    variables = from_torchvision(state_dict, model)
    names = find(model).torch
    assert names is not None  # from_torchvision has asked
    modules = names.modules
    num_classes = find(model).num_classes(variables["params"])
    back = to_torchvision(variables, model)
    # Files from before PyTorch counted lack these.
    counts = {name: value for name, value in back.items() if name.endswith("num_batches_tracked")}
    state_dict = {**counts, **state_dict}
    rows = _compare("", "", "round trip", back, state_dict, 0.0)
    for name, batch in images.items():
        labels = np.arange(len(batch)) % num_classes
        theirs, ours = {}, {}
        for precision in (np.float32, np.float64):
            net = make(num_classes=num_classes)
            theirs[precision] = _torch_results(
                torch, net, modules, state_dict, batch, labels, precision
            )
            ours[precision] = _jax_results(
                model, modules, num_classes, variables, batch, labels, precision
            )
        rows += _judge(name, ours, theirs)
    versions = {"python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in ("jax", "flax", "torch", "torchvision")}
    return Certificate(model, num_classes, tuple(rows), versions)


def _judge(images: str, ours: dict[Any, Results], theirs: dict[Any, Results]) -> list[Row]:
    single, double = np.float32, np.float64
    rows = []
    for part in theirs[double]:
        reference = theirs[double][part]
        tolerance = TOLERANCES[part]
        if part not in ("stages", "logits"):
            noise = _compare(images, "", part, theirs[single][part], reference, 0.0)
            tolerance = max(tolerance, NOISE_FACTOR * max(row.relative for row in noise))
            if part in ("evaluation gradients", "gradients"):
                tolerance = max(tolerance, KINKS)
            judged = tolerance if tolerance <= _LARGEST_TOLERANCE else None
            rows += _compare(images, "float32", part, ours[single][part], reference, judged)
        else:
            expected = theirs[single][part]
            rows += _compare(images, "float32", part, ours[single][part], expected, tolerance)
        rows += _compare(images, "float64", part, ours[double][part], reference, EXACT)
    return rows


def write_certificate(certificate: Certificate, out: Path) -> None:
    """Writes every comparison as JSON, and a table of the worst; see `certificate_paths`."""
    texts = (certificate.as_json(), certificate.as_table())
    for path, text in zip(certificate_paths(out), texts, strict=True):
        write_atomically(path, text)


def certificate_paths(out: Path) -> tuple[Path, Path]:
    """Returns `OUT.certificate.json` and `OUT.certificate.txt`."""
    names = (f"{out.name}.certificate.json", f"{out.name}.certificate.txt")
    return out.with_name(names[0]), out.with_name(names[1])


def _torch_and_maker(model: str) -> tuple[Any, Callable[..., Any]]:
    """Returns the module torch, and what makes torchvision's model of that name."""
    try:
        import torch
        import torchvision
    except ImportError as error:
        raise UserError(
            f"the certificate compares with torchvision, which is not installed ({error}). "
            'Install it with pip install "bmjax[torch]", or uv sync --extra torch.'
        ) from error
    if not hasattr(torchvision.models, model):
        raise UserError(f"torchvision has no {model} to compare with. Leave out --certify.")
    return torch, getattr(torchvision.models, model)


def _compare(
    images: str,
    precision: str,
    part: str,
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    tolerance: float | None,
) -> list[Row]:
    if set(ours) != set(theirs):
        raise ValueError(f"{part}: {sorted(set(ours) ^ set(theirs))} are on one side only")
    rows = []
    largest_of = {name: float(np.abs(value).max(initial=0.0)) for name, value in theirs.items()}
    floor = _FLOOR * max(largest_of.values()) if "gradients" in part else 0.0
    for name, expected in theirs.items():
        difference = np.asarray(ours[name], np.float64) - np.asarray(expected, np.float64)
        absolute = float(np.abs(difference).max(initial=0.0))
        largest = max(largest_of[name], floor)
        relative = absolute / largest if largest else (0.0 if absolute == 0 else np.inf)
        rows.append(Row(images, precision, part, name, absolute, relative, tolerance))
    return rows


def _torch_results(
    torch: Any,
    net: Any,
    modules: Mapping[str, str],
    state_dict: Mapping[str, np.ndarray],
    images: np.ndarray,
    labels: np.ndarray,
    precision: Any,
) -> Results:
    tensors = {name: torch.tensor(np.asarray(value)) for name, value in state_dict.items()}
    net.load_state_dict(tensors, strict=True)
    net = net.double() if precision is np.float64 else net.float()
    batch = torch.tensor(images.transpose(0, 3, 1, 2).astype(precision))
    stages: dict[str, np.ndarray] = {}

    def keep(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            value = output.detach().numpy().transpose(0, 2, 3, 1)
            stages[name] = value[:, 0, 0] if name == "pre_logits" else value.copy()

        return hook

    hooks = [
        net.get_submodule(place).register_forward_hook(keep(name))
        for name, place in modules.items()
    ]
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)

    def gradients_and_logits() -> tuple[dict[str, np.ndarray], np.ndarray]:
        optimizer.zero_grad()
        logits = net(batch)
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
        gradients = {name: leaf.grad.numpy().copy() for name, leaf in net.named_parameters()}
        return gradients, logits.detach().numpy()

    net.eval()
    evaluation_gradients, logits = gradients_and_logits()
    for hook in hooks:
        hook.remove()
    net.train()
    gradients, _ = gradients_and_logits()
    optimizer.step()
    return {
        "stages": stages,
        "logits": {"logits": logits},
        "evaluation gradients": evaluation_gradients,
        "gradients": gradients,
        "statistics after a step": {name: leaf.numpy() for name, leaf in net.named_buffers()},
        "params after a step": {
            name: leaf.detach().numpy() for name, leaf in net.named_parameters()
        },
    }


def _jax_results(
    model: str,
    names: Iterable[str],
    num_classes: int,
    variables: dict[str, Any],
    images: np.ndarray,
    labels: np.ndarray,
    precision: Any,
) -> Results:
    module = create_model(model, num_classes)

    def loss(params: Any, batch_stats: Any, images: Any, train: bool) -> Any:
        logits, new = module.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=train,
            mutable=["batch_stats"] if train else ["intermediates"],
        )
        of_labels = jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]
        return -jnp.mean(of_labels), (logits, new)

    @jax.jit
    def evaluate(variables: Any, images: Any) -> Any:
        gradient = jax.grad(loss, has_aux=True)
        grads, (logits, new) = gradient(*_parts(variables), images, train=False)
        return grads, logits, new["intermediates"]

    @jax.jit
    def step(variables: Any, images: Any) -> Any:
        params, batch_stats = _parts(variables)
        grads, (_, new) = jax.grad(loss, has_aux=True)(params, batch_stats, images, train=True)
        optimizer = optax.sgd(LEARNING_RATE)
        updates, _ = optimizer.update(grads, optimizer.init(params))
        return grads, new["batch_stats"], optax.apply_updates(params, updates)

    before = bool(jax.config.read("jax_enable_x64"))
    jax.config.update("jax_enable_x64", precision is np.float64)
    try:
        with jax.default_device(jax.devices("cpu")[0]):
            variables = jax.tree.map(
                lambda leaf: leaf.astype(precision) if leaf.dtype == np.float32 else leaf, variables
            )
            evaluation_grads, logits, stages = evaluate(variables, images.astype(precision))
            grads, batch_stats, params = step(variables, images.astype(precision))
    finally:
        jax.config.update("jax_enable_x64", before)

    def named(params: Any) -> dict[str, np.ndarray]:
        return to_torchvision({"params": params, "batch_stats": batch_stats}, model)

    after = named(params)
    statistics = {name for name in after if "running_" in name or name.endswith("_tracked")}

    def without_statistics(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: array for name, array in arrays.items() if name not in statistics}

    return {
        "stages": {name: stages[name] for name in names},
        "logits": {"logits": logits},
        "evaluation gradients": without_statistics(named(evaluation_grads)),
        "gradients": without_statistics(named(grads)),
        "statistics after a step": {name: after[name] for name in after if name in statistics},
        "params after a step": without_statistics(after),
    }


def _parts(variables: dict[str, Any]) -> tuple[Any, Any]:
    return variables["params"], variables["batch_stats"]

"""What each part of a loss of distillation contributes, for a teacher and a real batch."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from rich.console import Console
from rich.table import Table

from bmjax.config import DistillConfig
from bmjax.config.checks import check_distill
from bmjax.data import loader, preprocess
from bmjax.data.feed import Feed
from bmjax.data.loader import epoch_orders
from bmjax.data.preprocess import Normalization
from bmjax.data.statistics import loss_weights
from bmjax.distill.feature_matching import Matching
from bmjax.distill.loss import check_loss, logit_loss
from bmjax.distill.settings import with_precision_of_all
from bmjax.distill.students import normalization_of, read_student_weights, settle
from bmjax.distill.teachers import as_one
from bmjax.distill.tour import initial_variables, load_data, load_teachers, match_with
from bmjax.losses.conventions import called_elsewhere
from bmjax.losses.table import DISTILLATION_LOSSES, LABELS_CONVENTION, LOSS_PARAMS
from bmjax.machine.cache import use_compilation_cache
from bmjax.machine.parallel import Parallel, request_devices
from bmjax.machine.precision import in_precision
from bmjax.models.build import build_model
from bmjax.runs.inference import predict_features
from bmjax.train.apply import apply_with_features
from bmjax.train.compiled import draw_batches
from bmjax.train.step import Batch, label_loss, run_keys


def explain(config: DistillConfig, console: Console | None = None) -> dict[str, Any]:
    """Computes each part of the loss on the first batch of a run, before its first step.

    Returns:
        `student`, `teacher`, `examples`, `temperature`; `terms`, a list of `name`, `weight`,
        `value` (the mean over the batch without its weight), `contribution` (with it),
        `gradient_at_logits` (L2 norm of the weighted term's gradient at an example's logits, mean
        over the batch; None for features, which do not pass the logits), `ratio` (of that to the
        labels'; None where either is missing or 0), `gradient_at_params` (L2 norm over all of the
        student's params of the weighted mean's gradient) and `convention`; and `elsewhere`, for kd
        pairs of a program and the settings that give the same loss there, up to a factor.

    Raises:
        UserError: as `distill.distill`.
    """
    check_distill(config)
    check_loss(config)
    request_devices(config.device)
    use_compilation_cache()
    config = with_precision_of_all(config)
    teachers = load_teachers(config, console)
    student_weights = read_student_weights(config, (), console)
    config = settle(config, student_weights)
    dataset = load_data(config, teachers, student_weights)
    teacher = as_one(teachers, config.teacher_weights, dataset, console)
    train = config.train_config(config.student, "none")
    model = build_model(train, dataset.num_classes)
    normalization = normalization_of(dataset, student_weights)
    matching = match_with(config, model, teacher, dataset.image_shape)
    _, key = run_keys(config.seed)
    variables = initial_variables(model, config, matching, dataset, student_weights)
    parallel = Parallel("jit", jax.local_devices()[:1])
    orders = epoch_orders(key, dataset, config)
    feed = Feed(dataset.train, parallel, config.batch_size, orders, wide=True)
    view = loader.make_view(config.views, dataset.image_shape[:2], normalization.mean)

    @jax.jit
    @partial(in_precision, precision=config.precision)
    def first_batch(arrays: Any) -> Batch:
        step = jnp.int32(0)
        return draw_batches(parallel, arrays, key, step, config.batch_size, view)[0](step)

    batch = first_batch(feed.at(0)[0])
    own = (model, normalization, variables)
    asked = (teacher.model, teacher.normalization, teacher.variables) if teacher else own
    weights = loss_weights(config, dataset.train.labels, dataset.num_classes)
    measure = partial(_measure, config, own[:2], asked[:2], matching, weights, key)
    measured = jax.device_get(
        jax.jit(in_precision(measure, config.precision))(variables, asked[2], batch)
    )
    names = ["labels", config.method, *([config.features] if matching else [])]
    terms = [_term(config, matching, name, measured[name], measured) for name in names]
    return {
        "student": config.student,
        "teacher": teacher.run.config.model if teacher else f"average of {config.student}",
        "examples": int(jnp.sum(batch["mask"])),
        "temperature": config.temperature,
        "terms": terms,
        "elsewhere": _elsewhere(config, dataset.num_classes),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Prints what `explain` found as a table."""
    table = Table(
        title=f"{result['student']} with {result['teacher']}, T = {result['temperature']:g}, "
        f"first batch of {result['examples']} images, before the first step"
    )
    names = ("value", "weight", "contribution", "gradient_at_logits", "ratio")
    columns = (*names, "gradient_at_params")
    headings = ("mean", "weight", "weighted", "gradient at logits", "to the labels'")
    for heading in ("part", *headings, "gradient at params"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for term in result["terms"]:
        numbers = [term[name] for name in columns]
        shown = ["-" if number is None else f"{number:.4g}" for number in numbers]
        table.add_row(term["name"], *shown)
    console.print(table)
    for term in result["terms"]:
        console.print(f"{term['name']}: {term['convention']}", highlight=False, soft_wrap=True)
    if result["elsewhere"]:
        console.print("\nthe same loss, up to a factor, elsewhere:", highlight=False)
    for name, typed in result["elsewhere"]:
        console.print(f"  {name}: {typed}", highlight=False, markup=False, soft_wrap=True)


def _measure(
    config: DistillConfig,
    student: tuple[nn.Module, Normalization],
    teacher: tuple[nn.Module, Normalization],
    matching: Matching | None,
    weights: Any,
    key: Array,
    variables: Any,
    teacher_variables: Any,
    batch: Batch,
) -> dict[str, dict[str, Array]]:
    """Returns for each term its value and the norms of its gradients, all without its weight."""
    model, normalization = student
    ours = matching.student_layers if matching else ()
    theirs = matching.teacher_layers if matching else ()
    asked, known = predict_features(*teacher, teacher_variables, batch["image"], theirs)
    dtype = getattr(model, "dtype", None) or jnp.float32
    images = preprocess.normalize(batch["image"], normalization, dtype)

    def mean(values: Array) -> Array:
        return jnp.sum(jnp.where(batch["mask"], values, 0.0)) / jnp.sum(batch["mask"])

    of_logits = {
        "labels": lambda logits: label_loss(logits, batch, config.label_smoothing, weights),
        config.method: lambda logits: logit_loss(config, logits, asked, batch),
    }

    def apply(params: Any) -> tuple[Array, dict[str, Array]]:
        stats = variables.get("batch_stats", {})
        logits, _, features = apply_with_features(
            model, params, stats, images, batch["mask"], ours, key
        )
        return logits, features

    def on_params(name: str, params: Any) -> Array:
        logits, features = apply(params)
        if name in of_logits:
            return mean(of_logits[name](logits))
        assert matching is not None
        return mean(matching(params.get(LOSS_PARAMS, {}), features, known, batch["mask"]))

    params = variables["params"]
    logits, _ = apply(params)
    measured = {}
    for name in [*of_logits, *([config.features] if matching else [])]:
        value, grads = jax.value_and_grad(partial(on_params, name))(params)
        grads = {key: leaf for key, leaf in grads.items() if key != LOSS_PARAMS}
        length = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads)))
        measured[name] = {"value": value, "at_params": length}
        if name in of_logits:
            slopes = jax.grad(lambda z, name=name: mean(of_logits[name](z)))(logits)
            # The mean divides by the examples; an example's own gradient is that times them.
            lengths = jnp.linalg.norm(slopes, axis=-1) * jnp.sum(batch["mask"])
            measured[name]["at_logits"] = mean(lengths)
    return measured


def _term(
    config: DistillConfig,
    matching: Matching | None,
    name: str,
    values: dict[str, Any],
    measured: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    def weight_of(name: str) -> float:
        if name == "labels":
            return 1 - config.alpha
        return config.alpha if name == config.method or not matching else matching.weight

    weight, at_logits, ratio = weight_of(name), None, None
    if "at_logits" in values:
        at_logits = weight * float(values["at_logits"])
        of_labels = weight_of("labels") * float(measured["labels"]["at_logits"])
        ratio = at_logits / of_labels if of_labels else None
    convention = LABELS_CONVENTION
    if name != "labels":
        convention = DISTILLATION_LOSSES[name].convention.format(**config.loss_settings())
    return {
        "name": name,
        "weight": weight,
        "value": float(values["value"]),
        "contribution": weight * float(values["value"]),
        "gradient_at_logits": at_logits,
        "ratio": ratio,
        "gradient_at_params": weight * float(values["at_params"]),
        "convention": f"{convention}; mean over the batch",
    }


def _elsewhere(config: DistillConfig, num_classes: int) -> list[tuple[str, str]]:
    if config.method != "kd" or config.features != "none":
        return []
    rows = called_elsewhere(config.alpha, config.temperature, num_classes)
    return [(convention.name, typed) for convention, typed in rows]

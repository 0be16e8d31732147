"""Callbacks that log, plot and stop, and an own metric: uv run python THIS_FILE --epochs 5."""

import argparse

import matplotlib.pyplot as plt
import optax

import bmjax
from bmjax.train import Epoch


def log(epoch: Epoch) -> None:
    """Appends a line to a file."""
    with open("runs/callbacks/log.csv", "a") as file:
        print(epoch.number, epoch.train["loss"], epoch.validation["hinge"], sep=",", file=file)


def plot(epoch: Epoch) -> None:
    """Draws the losses so far."""
    for split in ("train", "validation"):
        plt.plot([row["loss"] for row in epoch.history if row["split"] == split], label=split)
    plt.legend()
    plt.savefig("runs/callbacks/loss.png")
    plt.close()


def stop(epoch: Epoch) -> bool:
    """Ends the training once it is good enough."""
    return epoch.validation["accuracy"] >= 0.8


plt.switch_backend("Agg")
parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
config = bmjax.TrainConfig(model="mlp", epochs=parser.parse_args().epochs, out="runs/callbacks")
metrics = {"hinge": optax.losses.multiclass_hinge_loss}
bmjax.fit(config, metrics=metrics, on_epoch=[log, plot, stop])

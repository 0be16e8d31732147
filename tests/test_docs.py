"""What README and docs show is run: their scripts, and their commands in a folder that has all."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bmjax import cli, create_model, to_torchvision
from bmjax.weights.writing import write_state_dict
from tests.folder_helpers import write_class

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES_OF_README = 160
# Flags that make a command of a page end in seconds, in place of its own.
SHORTER = {
    "train": {"--epochs": "1"},
    "finetune": {"--epochs": "1", "--image-size": "32", "--batch-size": "8"},
    "distill": {"--epochs": "1"},
    "verify-resume": {"--kills": "1"},
    "bench": {"--turns": "1", "--steps": "1", "--batch-size": "4", "--contenders": "bmjax"},
}


def blocks(page: Path, language: str) -> list[str]:
    """Returns the blocks of code of a language; of none: the commands."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)


def commands(page: Path) -> list[list[str]]:
    """Returns the commands in blocks and in tables, as words without the name of the program."""
    text = page.read_text("utf-8")
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    lines += re.findall(r"^\| `(bmjax [^`]*)` \|", text, re.M)
    return [shlex.split(line)[1:] for line in lines if line.startswith("bmjax ")]


ALL = [(page, words) for page in PAGES for words in commands(page)]
SCRIPTS = [(page, block) for page in PAGES for block in blocks(page, "python")]


def test_the_front_page_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= LINES_OF_README
    assert {path.name for path in PAGES[1:]} == set(re.findall(r"\]\(docs/([\w-]+\.md)\)", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    ("page", "words"), ALL, ids=[f"{page.name}: {' '.join(words)}" for page, words in ALL]
)
def test_a_command_is_understood(page, words):
    cli.parse(words)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "script"), SCRIPTS, ids=[page.name for page, _ in SCRIPTS])
def test_a_script_runs(page, script, tmp_path):
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with photographs, weights, runs and the scripts that the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    for number, name in enumerate(("ant", "bee")):
        write_class(folder / "photos" / name, 20, number)
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    for name in ("some.jpg", "some.png", "photo.png"):
        Image.fromarray(pixels).save(folder / name)
    model = create_model("resnet18", 5)
    import jax

    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    host = jax.tree.map(np.asarray, dict(variables))
    write_state_dict(folder / "resnet18.pth", to_torchvision(host, "resnet18"))
    (folder / "experiments").symlink_to(ROOT / "experiments")
    for name in ("mlp", "cnn"):
        train = f"train --model {name} --epochs 1 --out runs/{name} --no-augment"
        assert run(folder, shlex.split(train)) == (0, "")
    script = folder / "experiments" / "own_parts" / "own_module.py"
    subprocess.run([sys.executable, script, "--epochs", "1"], cwd=folder, check=True)
    return folder


def run(folder: Path, words: list[str]) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "bmjax.cli", *words], cwd=folder, capture_output=True, text=True
    )
    return done.returncode, done.stderr if done.returncode else ""


def shortened(words: list[str]) -> list[str]:
    """Returns the words with flags by which they end in seconds."""
    name, rest = words[0], list(words[1:])
    if name == "verify-resume" and "--" in rest:
        end = rest.index("--")
        return [*shortened([name, *rest[:end]]), "--", *shortened(rest[end + 1 :])]
    for flag, value in SHORTER.get(name, {}).items():
        if flag in rest:
            rest[rest.index(flag) + 1] = value
        else:
            rest += [flag, value]
    return [name, *rest]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, workplace):
    for words in commands(page):
        words = shortened(words)
        code, said = run(workplace, words)
        # What a page before has left there is in the way of a run, and nothing else may be.
        there = any(part in said for part in ("already holds a run", "exists already", "is there"))
        assert code == 0 or there, (words, said)

"""The layers of the package: imports go downward only, and importing it stays cheap."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = Path(__file__).parents[1] / "bmjax"

# Rooms from low to high: a file may import from its own room and from lower layers.
LAYERS = [
    {"errors", "version"},
    {"ops", "config", "losses"},
    {"models", "machine", "metrics"},
    {"data"},
    {"runs"},
    {"train", "weights"},
    {"evaluate", "finetune", "bench"},
    {"distill"},
    {"cli"},
    {"bmjax"},  # the package's own file, which hands on public names
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def modules_of(package: Path) -> dict[str, Path]:
    """Returns the file of each module of a package, itself included."""
    files = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = path
    return files


def imports_of(path: Path, modules: Collection[str]) -> set[str]:
    """Returns the modules among `modules` that a file imports anywhere, functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in modules else node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(modules)


def arrows(package: Path) -> dict[str, set[str]]:
    """Returns for each module of a package those of the package that it imports."""
    modules = modules_of(package)
    return {name: imports_of(path, modules) - {name} for name, path in modules.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def wrong_arrows(imports: dict[str, set[str]]) -> list[str]:
    """Lists imports of a module from another room that is not lower."""
    return sorted(
        f"{module} imports {target}"
        for module, targets in imports.items()
        for target in targets
        if room(target) != room(module) and LEVEL[room(target)] >= LEVEL[room(module)]
    )


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Lists the modules that, by way of others, import themselves, each circle sorted."""
    reached = {}
    for module in imports:
        seen: set[str] = set()
        todo = list(imports[module])
        while todo:
            target = todo.pop()
            if target not in seen:
                seen.add(target)
                todo += imports[target]
        reached[module] = seen
    found = {
        tuple(sorted(other for other in seen if module in reached[other]))
        for module, seen in reached.items()
        if module in seen
    }
    return [list(circle) for circle in sorted(found)]


def test_imports_go_downward():
    imports = arrows(PACKAGE)
    assert {room(module) for module in imports} <= set(LEVEL), "a room without a layer"
    assert wrong_arrows(imports) == []


def test_no_circle_of_files():
    assert circles(arrows(PACKAGE)) == []


def copy_of_the_package(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PACKAGE, tmp_path / "bmjax"))


def test_a_wrong_arrow_is_seen(tmp_path):
    package = copy_of_the_package(tmp_path)
    with (package / "losses" / "logits.py").open("a") as file:
        file.write("def f():\n    from bmjax.train import train_step\n    import bmjax.cli\n")
    assert wrong_arrows(arrows(package)) == [
        "bmjax.losses.logits imports bmjax.cli",
        "bmjax.losses.logits imports bmjax.train",
    ]


def test_a_circle_within_a_room_is_seen(tmp_path):
    package = copy_of_the_package(tmp_path)
    with (package / "data" / "preprocess.py").open("a") as file:
        file.write("def f():\n    from bmjax.data import loader\n")
    (circle,) = circles(arrows(package))
    assert {"bmjax.data.preprocess", "bmjax.data.loader"} <= set(circle)


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, bmjax; bmjax.__all__; "
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'tensorflow_datasets', 'grain', 'matplotlib',"
        " 'tensorflow', 'torch', 'tyro'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_training_needs_neither_tensorflow_nor_torch_nor_matplotlib():
    code = (
        "import sys, bmjax.cli, bmjax.train.loop, bmjax.distill, bmjax.evaluate; "
        "late = {'tensorflow', 'torch', 'matplotlib', 'tensorflow_datasets', 'grain'}; "
        "print(sorted(late & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    import bmjax

    for _ in range(2):  # the second time they are there already
        for name in bmjax.__all__:
            assert isinstance(getattr(bmjax, name), ModuleType) == (name in bmjax._MODULES)
    assert set(bmjax.__all__) <= set(dir(bmjax))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bmjax.nothing  # noqa: B018

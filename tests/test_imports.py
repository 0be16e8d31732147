"""The layers of the package: imports go downward only, and importing it stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = Path(__file__).parents[1] / "bmjax"

# Lower to higher; a module may import from its own group's folder and from lower groups.
LAYERS = [
    {"__init__"},
    {"errors"},
    {"ops", "config", "losses"},
    {"models", "machine", "metrics"},
    {"data"},
    {"runs"},
    {"train", "weights"},
    {"evaluate"},
    {"finetune", "bench"},
    {"distill"},
    {"cli"},
]
# Arrows that still point upward.
UPWARD = {"data": {"runs"}, "weights": {"evaluate"}}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported_modules(path: Path) -> set[str]:
    """The top-level modules of bmjax that a file imports anywhere, functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "bmjax":
                names |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("bmjax."):
                names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if "bmjax." in alias.name}
    return {name if name in LEVEL else "__init__" for name in names}


def violations(module: str, imported: set[str]) -> list[str]:
    level = LEVEL[module]
    return [
        f"{module} imports {name}"
        for name in sorted(imported)
        if name != module and LEVEL[name] >= level and name not in UPWARD.get(module, ())
    ]


MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts != ("__init__.py",)
)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert module in LEVEL, f"{module} has no layer; give it one in this file"
    assert violations(module, imported_modules(path)) == []


def test_a_wrong_arrow_is_seen(tmp_path):
    wrong = tmp_path / "losses.py"
    wrong.write_text("def f():\n    from bmjax.train import train_step\n    import bmjax.cli\n")
    assert violations("losses", imported_modules(wrong)) == [
        "losses imports cli",
        "losses imports train",
    ]


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

"""Machines that are not this one: what programs, files and packages would say there."""

import os
import stat
import sys
import types

import pytest

from bmjax.machine import accelerators
from bmjax.machine.accelerators import absent, mismatches, seen, taken
from bmjax.machine.doctor import examine


@pytest.fixture(autouse=True)
def _bare_machine(monkeypatch, tmp_path):
    for name in ("TPU_NAME", "COLAB_TPU_ADDR", "TPU_ACCELERATOR_TYPE", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(accelerators, "_PCI", tmp_path / "pci")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()


def write_nvidia_smi(folder, gpus, apps):
    """A program that answers the two queries."""
    program = folder / "bin" / "nvidia-smi"
    program.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"print({gpus!r} if 'query-gpu' in sys.argv[1] else {apps!r})\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def write_pci(folder, number, vendor, device):
    place = folder / "pci" / f"0000:00:0{number}.0"
    place.mkdir(parents=True)
    (place / "vendor").write_text(f"{vendor}\n")
    (place / "device").write_text(f"{device}\n")


def test_a_machine_with_neither(tmp_path):
    write_pci(tmp_path, 4, "0x1ae0", "0x0042")  # Google's network card
    write_pci(tmp_path, 5, "0x8086", "0x0063")  # another maker's number
    assert seen() == []
    assert absent("cpu", "any") == []
    assert taken() == []


def test_a_tpu_is_known_by_its_chip_and_by_what_the_runtime_says(tmp_path, monkeypatch):
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5e-8")
    assert seen() == ["tpu"]
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE")
    write_pci(tmp_path, 5, "0x1ae0", "0x0063")
    assert seen() == ["tpu"]


def test_a_tpu_that_is_not_used_is_a_problem_with_the_cause(tmp_path):
    write_pci(tmp_path, 5, "0x1ae0", "0x0063")
    (problem,) = absent("cpu", "any")
    assert problem.startswith("there is a TPU, but JAX computes on the CPU. JAX says: Unable to in")
    assert problem.endswith('pip install --upgrade "jax[tpu]", and restart the runtime.')
    assert "set JAX_PLATFORMS" not in problem
    assert absent("tpu", "any") == absent("tpu", "tpu") == []


def test_the_cpu_asked_for_is_no_problem(tmp_path, monkeypatch):
    write_pci(tmp_path, 5, "0x1ae0", "0x0063")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert absent("cpu", "any") == []
    assert absent("cpu", "cpu") == []


@pytest.mark.parametrize(
    ("backend", "expected", "said"),
    [
        (
            "cpu",
            "tpu",
            "a TPU is expected, but JAX computes on the CPU, and the machine shows none",
        ),
        ("cpu", "gpu", "an NVIDIA GPU is expected, but JAX computes on the CPU, and the machine"),
        (None, "gpu", "an NVIDIA GPU is expected, but JAX has no device, and the machine shows"),
        ("tpu", "cpu", "the CPU is expected, but JAX computes on a TPU. Set JAX_PLATFORMS=cpu."),
    ],
)
def test_what_is_expected_and_absent_is_a_problem(backend, expected, said):
    (problem,) = absent(backend, expected)
    assert problem.startswith(said)


def test_memory_that_another_program_holds_is_named(tmp_path):
    others = f"4711, /usr/bin/python3, 14000\n{os.getpid()}, /opt/bmjax, 300"
    write_nvidia_smi(tmp_path, "0, 14300, 15360\n1, 3, 15360", others)
    assert seen() == ["gpu"]
    (problem,) = taken()
    assert problem.startswith(
        "14,300 of 15,360 MiB of GPU 0 are taken by /usr/bin/python3 (process 4711, 14000 MiB). "
    )
    assert 'tf.config.set_visible_devices([], "GPU")' in problem
    assert "bmjax" not in problem


def test_a_gpu_with_little_taken_is_no_problem(tmp_path):
    write_nvidia_smi(tmp_path, "0, 400, 15360", "")
    assert taken() == []
    write_nvidia_smi(tmp_path, "0, [N/A], [N/A]", "")
    assert taken() == []


def installed(monkeypatch, requires, **versions):
    known = {"jax": "0.10.2", **{name.replace("_", "-"): v for name, v in versions.items()}}
    monkeypatch.setattr(accelerators.metadata, "requires", lambda name: requires)
    monkeypatch.setattr(accelerators, "installed_version", known.get)


REQUIRES = [
    "numpy>=2.0",
    'libtpu==0.0.42.*; extra == "tpu"',
    'jax-cuda12-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda12"',
]


def test_parts_of_another_version_are_named(monkeypatch):
    installed(monkeypatch, REQUIRES, libtpu="0.0.40.1", jax_cuda12_plugin="0.9.0", numpy="1.0")
    gpu, tpu = mismatches()
    assert gpu.startswith("jax-cuda12-plugin 0.9.0 does not fit jax 0.10.2, which needs jax-cuda12")
    assert tpu.startswith(
        "libtpu 0.0.40.1 does not fit jax 0.10.2, which needs libtpu==0.0.42.*. Install both anew: "
        'pip install --upgrade "jax[tpu]"'
    )


def test_parts_that_fit_are_no_problem(monkeypatch):
    installed(monkeypatch, REQUIRES, libtpu="0.0.42.3", jax_cuda12_plugin="0.10.2")
    assert mismatches() == []
    installed(monkeypatch, REQUIRES)
    assert mismatches() == []


def test_what_jax_itself_needs_can_be_read():
    assert mismatches() == []
    requires = accelerators.metadata.requires("jax")
    assert requires is not None
    names = {accelerators.Requirement(text).name for text in requires}
    assert "libtpu" in names
    assert any(name.startswith("jax-cuda") for name in names)


def test_a_libtpu_of_another_package_is_named(monkeypatch):
    installed(monkeypatch, REQUIRES, libtpu="0.0.42.3", tensorflow_tpu="2.18.0")
    foreign = types.ModuleType("libtpu")
    monkeypatch.setattr(accelerators.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "libtpu", foreign)
    (problem,) = mismatches()
    assert "not the one that JAX needs, perhaps by tensorflow-tpu. Install it anew" in problem
    foreign.get_library_path = lambda: "/lib"  # type: ignore[attr-defined]
    assert mismatches() == []


def test_doctor_tells_of_all_of_it(monkeypatch):
    monkeypatch.setattr(accelerators, "mismatches", lambda: ["libtpu does not fit"])
    monkeypatch.setattr(accelerators, "taken", lambda: ["memory is taken"])
    problems = examine("gpu")["problems"]
    assert {"libtpu does not fit", "memory is taken"} < set(problems)
    assert any(problem.startswith("an NVIDIA GPU is expected") for problem in problems)

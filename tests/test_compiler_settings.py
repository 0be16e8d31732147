import pytest

from bmjax.machine import threads
from bmjax.machine.compiler_settings import Setting, for_kind, left_to_bmjax, of_environment


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        monkeypatch.delenv(name, raising=False)


def test_flags_of_the_environment_are_read(monkeypatch, tmp_path):
    assert of_environment() == []
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_b --xla_c='x y'")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_d=true")
    assert of_environment() == [
        Setting("xla_a", "1", "XLA_FLAGS"),
        Setting("xla_b", "", "XLA_FLAGS"),
        Setting("xla_c", "x y", "XLA_FLAGS"),
        Setting("xla_tpu_d", "true", "LIBTPU_INIT_ARGS"),
    ]
    file = tmp_path / "flags"
    file.write_text("--xla_e=2\n--xla_f=3\n")
    monkeypatch.setenv("XLA_FLAGS", str(file))
    assert [setting.name for setting in of_environment()] == ["xla_e", "xla_f", "xla_tpu_d"]


@pytest.mark.parametrize("text", ["/no/such/file", "--xla_a='1", "word"])
def test_what_the_compiler_will_refuse_is_left_to_it(monkeypatch, text):
    monkeypatch.setenv("XLA_FLAGS", text)
    assert len(of_environment()) == text.startswith("--")


def test_the_environment_wins(monkeypatch):
    options = {"xla_a": 1, "xla_b": 2}
    assert left_to_bmjax(options) == options
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=3")
    assert left_to_bmjax(options) == {"xla_a": 1}


def test_options_of_one_thread_are_left_out_where_the_environment_has_them(monkeypatch):
    monkeypatch.setattr(threads, "_chosen", [True])
    monkeypatch.setattr(threads, "are_known", lambda **options: True)
    assert threads.compiler_options() == threads._OPTIONS
    assert [setting.name for setting in threads.settings_of_bmjax()] == list(threads._OPTIONS)
    monkeypatch.setenv("XLA_FLAGS", f"--{next(iter(threads._OPTIONS))}=2")
    assert threads.compiler_options() == {}
    assert threads.settings_of_bmjax() == []


def test_chips_with_much_vector_memory_are_told_to_use_more_of_it(monkeypatch):
    name = "xla_tpu_scoped_vmem_limit_kib"
    assert for_kind("TPU v5 lite") == for_kind("TPU v6 lite (tpu:0)") == {name: "32768"}
    assert for_kind("TPU v5") == for_kind("TPU v4") == for_kind("cpu") == {}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{name}=65536")
    assert for_kind("TPU v5 lite") == {}

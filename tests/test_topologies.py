import pytest

from bmjax.errors import UserError
from bmjax.machine import topologies


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e", "v5e is no topology: a chip and how many of them in each direction"),
        ("nonsense:2", "Chips: v4, v5e, v5p, v6e."),
        ("v9:2x2", "unknown TPU 'v9'. Did you mean"),
        ("v5e:2x2x2", "chips of v5e lie in 2 dimensions, such as v5e:2x2."),
        ("v4:2x2", "chips of v4 lie in 3 dimensions, such as v4:2x2x2."),
        ("v5e:0x4", "chips of v5e lie in 2 dimensions"),
    ],
)
def test_a_topology_that_cannot_be_is_refused_in_words(name, said, monkeypatch):
    monkeypatch.setattr(topologies, "_devices", lambda *given: pytest.fail("asked the compiler"))
    with pytest.raises(UserError, match=r"topolog|TPU|chips") as raised:
        topologies.find_topology(name)
    assert said in str(raised.value)


def test_without_the_compiler_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'no TPU is needed for it: pip install "jax\[tpu\]"'):
        topologies.find_topology("v5e:2x4")

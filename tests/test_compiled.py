import pytest

from bmjax.bench import collectives
from bmjax.models import num_params

SIDE = 32


def test_a_step_on_eight_devices_adds_up_once():
    ((kind, sizes), *more), state = collectives.of_step("mlp", SIDE, 3)
    assert not more
    assert kind == "all-reduce"
    # The gradients, and the sums of loss, accuracy and examples; nothing twice, nothing else.
    assert sum(sizes) == num_params(state.params) + 3


@pytest.mark.slow
def test_batch_normalisation_adds_two_sums_each_way_and_nothing_else():
    found, state = collectives.of_step("resnet_tiny", SIDE, 3)
    assert {kind for kind, _ in found} == {"all-reduce"}
    total = sum(sum(sizes) for _, sizes in found)
    norms = [8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    # Forward the mean with the number of values, and the variance; backward the gradients of scale
    # and bias, which are the sums that the gradient by the values needs, too.
    assert total <= num_params(state.params) + 3 + sum(2 * size + 1 for size in norms)
    # Three a layer, the gradients of all kernels joined to a few of them.
    assert len(found) <= 3 * len(norms)


def test_collectives_are_read_from_the_text_of_a_program():
    text = """
      %a = (f32[3,4]{1,0}, s32[]) all-reduce(%x, %y), channel_id=1
      %b = f32[7]{0} all-gather-start(%a)
      %c = f32[7]{0} add(%b, %b), metadata={op_name="all-reduce"}
    """
    assert collectives.in_text(text) == [("all-reduce", [12, 1]), ("all-gather", [7])]

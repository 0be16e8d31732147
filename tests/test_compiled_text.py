# ruff: noqa: E501
import pytest

from bmjax.bench.compiled_text import Collective, read_step, size_of

TEXT = """HloModule jit_steps, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %add = f32[]{:T(128)} add(%a, %b)
}

%body (state: (f32[64], bf16[128,8,8,128])) -> (f32[64], bf16[128,8,8,128]) {
  %state = (f32[64]{0:T(128)}, bf16[128,8,8,128]{0,3,2,1:T(8,128)(2,1)}) parameter(0)
  %weights = f32[64]{0:T(128)} get-tuple-element(%state), index=0
  %images = bf16[128,8,8,128]{0,3,2,1:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %copy.1 = bf16[128,8,8,128]{3,0,2,1:T(8,128)(2,1)} copy(%images)
  %fusion.1 = (f32[64]{0:T(128)}, /*index=1*/f32[64]{0:T(128)}) fusion(%copy.1, %weights, %weights), kind=kOutput, calls=%fused, metadata={op_name="jit(steps)/while/body/reduce_sum" stack_frame_id=3}
  %first = f32[64]{0:T(128)} get-tuple-element(%fusion.1), index=0
  %all-reduce.1 = f32[64]{0:T(128)} all-reduce(%first), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%sum
  %all-reduce-start.2 = (f32[64]{0:T(128)}, f32[64]{0:T(128)}) all-reduce-start(%weights), channel_id=2, to_apply=%sum
  %copy_bitcast_fusion = bf16[128,8,8,128]{0,3,2,1:T(8,128)(2,1)} fusion(%copy.1), kind=kLoop, calls=%fused.2
  %all-reduce-done.2 = f32[64]{0:T(128)} all-reduce-done(%all-reduce-start.2)
  ROOT %tuple = (f32[64]{0:T(128)}, bf16[128,8,8,128]{0,3,2,1:T(8,128)(2,1)}) tuple(%all-reduce-done.2, %copy_bitcast_fusion)
}

ENTRY %main (p: f32[64]) -> f32[64] {
  %p = f32[64]{0:T(128)} parameter(0)
  %while = (f32[64]{0:T(128)}, bf16[128,8,8,128]{0,3,2,1:T(8,128)(2,1)}) while(%p), condition=%sum, body=%body
  ROOT %out = f32[64]{0:T(128)} get-tuple-element(%while), index=0
}
"""
IMAGES, WEIGHTS = 128 * 8 * 8 * 128 * 2, 512


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ("f32[64]", 256),
        ("f32[64]{0:T(128)}", 512),  # filled up to a tile
        ("bf16[128,56,56,64]{0,3,2,1:T(8,128)(2,1)}", 128 * 56 * 56 * 64 * 2),
        ("u8[10,224,224,3]{3,2,1,0:T(8,128)(4,1)}", 10 * 224 * 224 * 128),  # 3 take 128
        ("(f32[2,2], /*index=1*/s32[])", 20),
        ("pred[1000]", 1000),
        ("token[]", 0),
    ],
)
def test_sizes_are_those_in_memory(types, expected):
    assert size_of(types) == expected


def test_the_longest_loop_is_the_step():
    step = read_step(TEXT)
    names = [each.name for each in step.instructions]
    assert names == [
        "copy.1",
        "fusion.1",
        "all-reduce.1",
        "all-reduce-start.2",
        "copy_bitcast_fusion",
    ]
    fusion = step.instructions[1]
    assert fusion.source == "jit(steps)/while/body/reduce_sum"
    assert fusion.bytes == IMAGES + 3 * WEIGHTS  # an operand that is given twice is read once
    assert [each.name for each in step.largest(1)] == ["copy.1"]


def test_collectives_copies_and_transfers_are_counted():
    step = read_step(TEXT)
    assert step.collectives == [("all-reduce", WEIGHTS, False), ("all-reduce", WEIGHTS, True)]
    assert step.copies == 2 * 2 * IMAGES
    assert step.host_transfers == 0
    sending = TEXT.replace("%copy.1 = ", "%send.1 = token[] send(%p), is_host_transfer=true\n  ")
    assert read_step(sending).host_transfers >= 1


def test_a_program_without_a_loop_is_a_step():
    begin = TEXT.index("ENTRY")
    straight = TEXT[:begin].replace("%body", "ENTRY %body")
    assert [each.kind for each in read_step(straight).instructions][:2] == ["copy", "fusion"]
    assert read_step("").instructions == ()


def test_a_loop_within_the_step_counts_once():
    """As the one that exchanges images does: mostly it runs once."""
    inner = """%inner (got: f32[64]) -> f32[64] {
  %got = f32[64]{0:T(128)} parameter(0)
  ROOT %all-to-all.1 = f32[64]{0:T(128)} all-to-all(%got), channel_id=3
}

"""
    loop = "%while.2 = f32[64]{0:T(128)} while(%weights), condition=%sum, body=%inner\n  "
    text = TEXT.replace("%body (", inner + "%body (").replace("%copy.1 = ", loop + "%copy.1 = ")
    step = read_step(text)
    assert step.collectives[0] == ("all-to-all", WEIGHTS, False)
    assert len(step.instructions) == len(read_step(TEXT).instructions) + 1


@pytest.mark.parametrize(
    ("kind", "held", "expected"),
    # Eight devices, each with 8 MB of its own, and after it all, or 1 MB of it.
    [
        ("all-reduce", 8e6, 14e6),
        ("reduce-scatter", 1e6, 7e6),
        ("all-gather", 64e6, 56e6),
        ("all-to-all", 8e6, 7e6),
        ("collective-permute", 8e6, 8e6),
    ],
)
def test_what_a_device_sends(kind, held, expected):
    assert Collective(kind, int(held), False).sent(8) == expected

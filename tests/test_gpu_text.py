# ruff: noqa: E501
"""Counts by hand of a small program in the text that XLA gives for GPUs."""

import pytest

from bmjax.bench.compiled_text import read_step
from bmjax.bench.gpu_text import arrays, count_on_gpu

TEXT = """HloModule jit_steps, is_scheduled=true

%fused_images (rows: u8[64,192], number: s32[8]) -> bf16[8,8,8,3] {
  %number = s32[8]{0} parameter(1)
  %rows = u8[64,192]{1,0} parameter(0)
  %gather = u8[8,192]{1,0} gather(%rows, %number), offset_dims={1}
  ROOT %convert = bf16[8,8,8,3]{3,2,1,0} convert(%gather)
}

%fused_kernel (kernel: f32[3,3,3,16]) -> bf16[16,3,3,3] {
  %kernel = f32[3,3,3,16]{3,2,1,0} parameter(0)
  %turned = f32[16,3,3,3]{3,2,1,0} transpose(%kernel), dimensions={3,0,1,2}
  ROOT %narrow = bf16[16,3,3,3]{3,2,1,0} convert(%turned)
}

%fused_head (hidden: bf16[8,16], weights: bf16[16,10]) -> f32[8,10] {
  %hidden = bf16[8,16]{1,0} parameter(0)
  %weights = bf16[16,10]{1,0} parameter(1)
  ROOT %dot = f32[8,10]{1,0} dot(%hidden, %weights), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (state: (u8[64,192], s32[8])) -> (u8[64,192], s32[8]) {
  %state = (u8[64,192]{1,0}, s32[8]{0}, f32[3,3,3,16]{3,2,1,0}, bf16[8,4,4,16]{3,2,1,0}, bf16[8,16]{1,0}, bf16[16,10]{1,0}) parameter(0)
  %all = u8[64,192]{1,0} get-tuple-element(%state), index=0
  %order = s32[8]{0} get-tuple-element(%state), index=1
  %kernel.1 = f32[3,3,3,16]{3,2,1,0} get-tuple-element(%state), index=2
  %slope = bf16[8,4,4,16]{3,2,1,0} get-tuple-element(%state), index=3
  %hidden.1 = bf16[8,16]{1,0} get-tuple-element(%state), index=4
  %weights.1 = bf16[16,10]{1,0} get-tuple-element(%state), index=5
  %images = bf16[8,8,8,3]{3,2,1,0} fusion(%all, %order), kind=kLoop, calls=%fused_images
  %turned.1 = bf16[16,3,3,3]{3,2,1,0} fusion(%kernel.1), kind=kInput, calls=%fused_kernel
  %conv = (bf16[8,4,4,16]{3,2,1,0}, u8[0]{0}) custom-call(%images, %turned.1), window={size=3x3 stride=2x2 pad=1_0x1_0}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %all-reduce-start = f32[16]{0} all-reduce-start(%hidden.1), channel_id=1
  %backward = (bf16[16,3,3,3]{3,2,1,0}, u8[0]{0}) custom-call(%images, %slope), window={size=3x3 stride=2x2 pad=1_0x1_0}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %all-reduce-done = f32[16]{0} all-reduce-done(%all-reduce-start)
  %all-reduce-start.1 = f32[16]{0} all-reduce-start(%hidden.1), channel_id=2
  %all-reduce-done.1 = f32[16]{0} all-reduce-done(%all-reduce-start.1)
  %by-images = (bf16[8,8,8,3]{3,2,1,0}, u8[0]{0}) custom-call(%slope, %turned.1), window={size=3x3 stride=2x2 pad=1_0x1_0}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %head = f32[8,10]{1,0} fusion(%hidden.1, %weights.1), kind=kCustom, calls=%fused_head
  %product = (f32[8,10]{1,0}, s8[1024]{0}) custom-call(%hidden.1, %weights.1), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[]}}}
  ROOT %tuple = (u8[64,192]{1,0}, s32[8]{0}) tuple(%all, %order)
}

ENTRY %main (p: u8[64,192]) -> u8[64,192] {
  %p = u8[64,192]{1,0} parameter(0)
  %while = (u8[64,192]{1,0}, s32[8]{0}) while(%p), condition=%fused_head, body=%body
  ROOT %out = u8[64,192]{1,0} get-tuple-element(%while), index=0
}
"""
IMAGES, OUTPUT, KERNEL = 8 * 8 * 8 * 3, 8 * 4 * 4 * 16, 3 * 3 * 3 * 16
CONVOLUTION = 2 * OUTPUT * 3 * 3 * 3
MATMUL = 2 * 8 * 10 * 16


def test_flops_are_those_of_the_shapes():
    """The three roles of a convolution are equal in work, and so are two ways to multiply."""
    assert count_on_gpu(read_step(TEXT), 8)["flops"] == 3 * CONVOLUTION + 2 * MATMUL
    unknown = TEXT.replace(", dim_labels=b01f_o01i->b01f", "", 1)
    assert count_on_gpu(read_step(unknown), 8)["flops"] is None


def test_of_what_is_gathered_only_its_rows_are_read():
    counted = count_on_gpu(read_step(TEXT), 8)["bytes_accessed"]
    loading = 8 * 192 + 8 * 4 + 2 * IMAGES
    turning = 4 * KERNEL + 2 * KERNEL
    convolving = 3 * 2 * (IMAGES + OUTPUT + KERNEL)
    head = 2 * (8 * 16 + 16 * 10) + 4 * 8 * 10
    sums = 2 * (2 * 8 * 16 + 4 * 16)
    assert counted == loading + turning + convolving + 2 * head + 1024 + sums


def test_libraries_layouts_and_types_are_counted():
    counted = count_on_gpu(read_step(TEXT), 8)
    assert counted["library_calls"] == 4
    assert counted["convolutions"] == {"bf16 NHWC": 3}
    assert counted["fused_convolutions"] == 0
    assert counted["float32_activations"] == 0
    assert (counted["transposes"], counted["transposed_activations"]) == (1, 0)
    assert counted["transposed_bytes"] == 6 * KERNEL
    fused = TEXT.replace("__cudnn$convForward", "__cudnn$convBiasActivationForward")
    assert count_on_gpu(read_step(fused), 8)["fused_convolutions"] == 1
    other = TEXT.replace("b01f_o01i->b01f", "bf01_oi01->bf01")
    assert count_on_gpu(read_step(other), 8)["convolutions"] == {"bf16 NCHW": 3}


def test_float32_activations_have_the_batch_first():
    wide = TEXT.replace("%conv = (bf16[", "%conv = (f32[")
    counted = count_on_gpu(read_step(wide), 8)
    assert counted["float32_activations"] == 1
    assert counted["float32_activation_bytes"] == 4 * OUTPUT
    assert count_on_gpu(read_step(wide), 16)["float32_activations"] == 0
    # A kernel of as many features as the batch has images is none.
    kernel = TEXT.replace("%turned.1 = bf16[16,3,3,3]", "%turned.1 = f32[16,3,3,3]")
    assert count_on_gpu(read_step(kernel), 16)["float32_activations"] == 0


def test_a_collective_overlaps_where_something_is_computed_between():
    """The second begins and ends with nothing between."""
    assert count_on_gpu(read_step(TEXT), 8)["collectives_overlapped"] == 1


@pytest.mark.parametrize(
    ("types", "kind", "size"),
    [("bf16[2,3]{1,0}", "bf16", 6), ("(f32[], u8[0]{0})", "f32", 1)],
)
def test_types_are_read(types, kind, size):
    first = arrays(types)[0]
    assert (first.kind, first.size) == (kind, size)

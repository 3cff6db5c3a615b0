"""LUT-B: the bytes of a tile by hand, and round trips."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import Case, packed_blocks

import jaxquant as jq

TILES = Case((24, 128), (3, 2), 8, "float32", "float8_e4m3fn")


def test_a_tile_worked_by_hand():
    codes = np.zeros((8, 64), np.uint8)
    codes[0, :8] = [1, 2, 3, 4, 5, 6, 7, 0]  # the first three bytes
    codes[0, 8] = 5  # the low bits of the fourth
    codes[1, 2] = 7  # index 66 = 8 * 8 + 2: bits 6 to 8 of the three bytes from 24 on
    codes[7, 63] = 6  # the high bits of the last
    centroids = np.array([-2, -1, -0.5, 0, 0.5, 1, 2, 448], np.float32)
    packed = jq.pack_array(jnp.asarray(centroids[codes]), jnp.asarray(centroids))
    tensors = jq.to_lut_b(packed)
    expected = np.zeros(192, np.uint8)
    expected[:3] = [0b11_010_001, 0b0_101_100_0, 0b000_111_11]
    expected[3] = 5
    expected[24:26] = [0b11_000_000, 0b0000000_1]
    expected[191] = 0b110_00000
    np.testing.assert_array_equal(tensors["weight_packed"], expected[None, None])
    assert tensors["weight_codebook"].dtype == jnp.float8_e4m3fn
    expected = [0xC0, 0xB8, 0xB0, 0x00, 0x30, 0x38, 0x40, 0x7E]  # sign, four of exponent, three
    np.testing.assert_array_equal(tensors["weight_codebook"].view(np.uint8)[0, 0], expected)


@pytest.mark.parametrize("layers", [0, 2])
def test_weights_come_back_in_either_order(layers):
    lead = (layers,) if layers else ()
    case = TILES._replace(shape=(*lead, 24, 128), numbers=(*lead, 3, 2), layers=layers)
    packed, weights = packed_blocks(case)
    tensors = jq.to_lut_b(packed)
    assert tensors["weight_packed"].shape == (*lead, 3, 2, 192)
    assert tensors["weight_codebook"].shape == (*lead, 3, 2, 8)
    assert sum(tensor.nbytes for tensor in tensors.values()) * 8 == 3.125 * weights.size
    # Index i of a tile, bits 3 i and on of its bytes, from the low bits up.
    bits = np.unpackbits(tensors["weight_packed"], axis=-1, bitorder="little").reshape(-1, 512, 3)
    indices = bits @ np.array([1, 2, 4])
    tile = np.take_along_axis(tensors["weight_codebook"].reshape(-1, 8).astype("f4"), indices, 1)
    np.testing.assert_array_equal(tile[1].reshape(8, 64), weights.reshape(-1, 128)[:8, 64:])
    np.testing.assert_array_equal(jq.unpack(jq.from_lut_b(tensors)), weights)
    kernel = jq.from_lut_b(tensors, transposed=True, dtype="bfloat16")
    assert kernel.shape == (*lead, 128, 24) and kernel.numbers == (*lead, 2, 3)
    np.testing.assert_array_equal(
        jq.unpack(kernel).astype(jnp.float32), np.swapaxes(weights, -1, -2)
    )
    for name, tensor in jq.to_lut_b(kernel).items():
        np.testing.assert_array_equal(tensor.view(np.uint8), tensors[name].view(np.uint8))


def test_one_scale_of_the_weight_comes_along():
    packed, weights = packed_blocks(TILES._replace(scale_dtype="float32", scales=(1, 1)))
    tensors = jq.to_lut_b(packed)
    assert tensors["weight_scale"].tolist() == packed.scale.ravel().tolist()
    np.testing.assert_array_equal(jq.unpack(jq.from_lut_b(tensors)), weights)
    with pytest.raises(ValueError, match=r"expected one scale, got \(2,\)"):
        jq.from_lut_b(tensors | {"weight_scale": np.ones(2)})


def test_what_the_layout_does_not_hold_is_refused():
    packed, _ = packed_blocks(TILES)
    for other, message in (
        (packed_blocks(TILES._replace(numbers=(3, 4)))[0], r"blocks of 8 x 64, .* got \(8, 32\)"),
        (packed_blocks(TILES._replace(k=5))[0], "expected 8 centroids of float8_e4m3fn, got 5 of"),
        (packed_blocks(TILES._replace(codebook_dtype="float32"))[0], "got 8 of float32"),
        (dataclasses.replace(packed, scale=jnp.ones((3, 2, 1))), "or one of the weight, got 6"),
    ):
        with pytest.raises(ValueError, match=message):
            jq.to_lut_b(other)
    tensors = jq.to_lut_b(packed)
    for name, tensor in (
        ("weight_packed", tensors["weight_packed"][..., :-1]),
        ("weight_packed", tensors["weight_packed"].astype(np.int32)),
        ("weight_codebook", tensors["weight_codebook"][:-1]),
        ("weight_codebook", tensors["weight_codebook"].astype(np.float32)),
    ):
        with pytest.raises(ValueError, match=r"expected uint8 \[\.\.\., 192\] and float8_e4m3fn"):
            jq.from_lut_b(tensors | {name: tensor})
    with pytest.raises(ValueError, match="expected a dtype of floating point, got int32"):
        jq.from_lut_b(tensors, dtype="int32")

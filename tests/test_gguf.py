"""The GGUF reader against the `gguf` package's own, for every kind of tensor; damaged files are refused by name."""

import pathlib
import random
import struct
import tracemalloc

import fuzz_gguf
import gguf
import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from jaxemo.checkpoints import CheckpointError
from jaxemo.checkpoints import gguf as gguf_lib

GOLDEN = pathlib.Path(__file__).parent / "golden"
QUANTISED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4",
             "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS"]  # fmt: skip
STORED = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def raw(kind: str, shape, seed=0) -> np.ndarray:
    """Random blocks of `kind` as rows of bytes. Their scales may be anything, infinities and NaN included."""
    block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] // block * width), np.uint8)


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    """A file that the gguf package wrote, with a tensor [6, 512] of every kind, one of more than a chunk, and metadata."""
    path = tmp_path_factory.mktemp("kinds") / "kinds.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("some.count", 7)
    writer.add_float64("some.number", 0.1)
    writer.add_int8("some.negative", -3)
    writer.add_bool("some.flag", True)
    writer.add_string("some.text", "naïve ▁ 😀")
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_array("some.flags", [True, False])
    writer.add_token_list(["a", "", "ü"])
    writer.add_token_scores([0.0, -1.5, -2.25])
    writer.add_token_types([1, 1, 3])
    for kind in [*QUANTISED, *STORED]:
        writer.add_tensor(kind, raw(kind, (6, 512)), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor("large", raw("Q6_K", (3, 7, 9728)), raw_dtype=gguf.GGMLQuantizationType.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the bit; NaNs, whose bits are not specified, may differ among themselves."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return a.shape == b.shape and bool(np.all((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))))


def check_agrees(ours: gguf_lib.GGUF, path) -> None:
    theirs = gguf.GGUFReader(path)
    meta = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.meta.keys() == meta.keys()
    for key, held in ours.meta.items():
        np.testing.assert_equal(held.tolist() if isinstance(held, np.ndarray) else held, meta[key], key)
        assert isinstance(held, list | str | int | float | bool) or key.startswith("tokenizer."), key
    assert list(ours.shapes) == list(ours.kinds) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        assert ours.shapes[t.name] == tuple(reversed(t.shape.tolist())) and ours.kinds[t.name] == t.tensor_type.name
        with np.errstate(all="ignore"):
            want = gguf.quants.dequantize(t.data, t.tensor_type).reshape(ours.shapes[t.name])
        got = ours.read(t.name)
        assert got.dtype == STORED.get(t.tensor_type.name, np.float32) and same_bits(got, want), t.name


@pytest.mark.parametrize("name", ["gqa_tied", "mha_untied", "quantised", "wide_heads"])
def test_golden_files_are_read_as_by_the_package(name):
    check_agrees(gguf_lib.open_gguf(GOLDEN / f"{name}.gguf"), GOLDEN / f"{name}.gguf")


def test_every_kind_is_read_as_by_the_package(every_kind):
    check_agrees(gguf_lib.open_gguf(every_kind), every_kind)


def test_every_kind_that_the_package_reads_is_tested():
    able = [kind.name for kind in gguf.GGMLQuantizationType if gguf_lib._readable(kind)]
    assert set(able) - {"NVFP4"} == {*QUANTISED, *STORED}  # NVFP4 came with a later version of the package than 0.17


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_tensor_is_read_into_an_array_of_the_callers(every_kind, dtype):
    found = gguf_lib.open_gguf(every_kind)
    for name, shape in found.shapes.items():
        out = np.zeros(shape, dtype)
        assert found.read(name, out=out) is out
        with np.errstate(all="ignore"):
            assert same_bits(out, np.asarray(found.read(name), np.float32).astype(dtype)), name
    for bad in (np.zeros((6, 511), np.float32), np.zeros((512, 6), np.float32).T):
        with pytest.raises(ValueError, match=r"contiguous and of shape \[6, 512\]"):
            found.read("Q4_0", out=bad)
    with pytest.raises(KeyError, match="nothing"):
        found.read("nothing")


def test_stored_floats_are_not_copied(every_kind):
    found = gguf_lib.open_gguf(every_kind)
    for name in STORED:
        assert not found.read(name).flags.writeable and not found.read(name).flags.owndata


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "BF16"])
def test_dequantising_takes_little_more_than_the_result(tmp_path, kind):
    shape = (4096, 1024)  # 16 MiB as float32
    data, _ = fuzz_gguf.build({}, {"w": (shape, int(gguf.GGMLQuantizationType[kind]), raw(kind, shape).tobytes())})
    (tmp_path / "w.gguf").write_bytes(data)
    found = gguf_lib.open_gguf(tmp_path / "w.gguf")
    out = np.empty(shape, np.float32)
    tracemalloc.start()
    found.read("w", out=out)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{kind}: {most / out.nbytes:.3f} of the result beside it")
    assert most <= 0.3 * out.nbytes


F32 = int(gguf.GGMLQuantizationType.F32)
ONE = {"w": ((2, 4), F32, bytes(32))}


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"w": ((2, 4), 999, bytes(32))}, ["tensor w", "type 999"]),
        ({"w": ((2, 4), int(gguf.GGMLQuantizationType.I32), bytes(32))}, ["tensor w", "I32"]),
        ({"w": ((2, 256), int(gguf.GGMLQuantizationType.Q8_K), bytes(584))}, ["tensor w", "Q8_K"]),
        ({"w": ((2, 33), int(gguf.GGMLQuantizationType.Q8_0), bytes(80))}, ["tensor w", "[2, 33]", "Q8_0"]),
        ({"w": ((2, 0), F32, bytes(32))}, ["tensor w", "[2, 0]"]),
        ({"w": ((), F32, bytes(4))}, ["tensor w", "0 dimensions"]),
        ({"w": ((1, 1, 1, 1, 1), F32, bytes(4))}, ["tensor w", "5 dimensions"]),
        ({"w": ((2**62, 2**62), F32, bytes(4))}, ["tensor w", "truncated"]),
        ({"w": ((2, 400), F32, bytes(32))}, ["tensor w", "truncated"]),
        ({"v": ((2, 8), F32, bytes(32)), "w": ((2, 4), F32, bytes(32))}, ["v and w overlap"]),
        ({b"\xff": ((2, 4), F32, bytes(32))}, ["name of tensor 0", "not UTF-8"]),
        ({"a\x1b[31m": ((), F32, bytes(4))}, [r"'a\x1b[31m'"]),
    ],
)
def test_damaged_tensors_are_refused_by_name(tensors, words):
    refused(fuzz_gguf.build({}, tensors)[0], *words)


@pytest.mark.parametrize(
    "meta, words",
    [
        ({"k": ("str", b"\xff\xfe")}, ["value of k", "not UTF-8"]),
        ({"k": (("array", "str"), ["a", b"\xc3"])}, ["string 1 of the value of k", "not UTF-8"]),
        ({"k": (("array", "u8"), [0] * 70_000)}, ["metadata arrays k", "70000"]),
        ({"k": ("str", "x" * 300_000)}, ["value of k", "300000"]),
        ({"general.alignment": ("u32", 48)}, ["general.alignment", "48"]),
        ({"general.alignment": ("u32", 0)}, ["general.alignment", "0"]),
        ({"general.alignment": ("str", "32")}, ["general.alignment"]),
    ],
)
def test_damaged_metadata_are_refused_by_name(meta, words):
    refused(fuzz_gguf.build(meta, {})[0], *words)


def refused(data: bytes, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        gguf_lib.parse("some.gguf", data)
    assert str(caught.value).startswith("some.gguf: ")
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_damaged_headers_are_refused_by_name():
    good, _ = fuzz_gguf.build({"k": ("u32", 5), "l": ("bool", True)}, ONE)
    assert gguf_lib.parse("x", good).meta == {"k": 5, "l": True}
    refused(b"", "not a GGUF file")
    refused(b"\x89PNG" + good[4:], "not a GGUF file")
    refused(good[:4] + struct.pack(">I", 3) + good[8:], "big-endian")
    for version in (0, 1, 4):
        refused(good[:4] + struct.pack("<I", version) + good[8:], f"version {version}")
    assert gguf_lib.parse("x", good[:4] + struct.pack("<I", 2) + good[8:]).meta == {"k": 5, "l": True}
    for at in (8, 16):  # the counts
        for count in (2**16 + 1, 2**63, 2**64 - 1):
            refused(good[:at] + struct.pack("<Q", count) + good[at + 8 :], f"{count}")
    refused(good.replace(b"\x01\0\0\0\0\0\0\0l", b"\x01\0\0\0\0\0\0\0k"), "metadata key k stands there twice")
    refused(good.replace(b"k\x04\0\0\0", b"k\x0d\0\0\0"), "value of k", "unknown type 13")
    refused(good.replace(b"l\x07\0\0\0\x01", b"l\x07\0\0\0\x02"), "value of l", "neither 0 nor 1")
    array = fuzz_gguf.build({"k": (("array", "u32"), [1, 2])}, {})[0]
    refused(array.replace(b"\x09\0\0\0\x04\0\0\0", b"\x09\0\0\0\x09\0\0\0"), "value of k", "array of arrays")
    refused(array.replace(b"\x04\0\0\0\x02\0\0\0\0", b"\x04\0\0\0\x02\0\0\0\x09"), "value of k", "truncated")
    texts = fuzz_gguf.build({"k": (("array", "str"), ["a", "b"])}, {})[0]
    refused(texts.replace(b"\x08\0\0\0\x02\0\0", b"\x08\0\0\0\x02\0\1"), "value of k", "65538 strings")
    two, numbers = fuzz_gguf.build({}, {**ONE, "v": ((2, 4), F32, bytes(32))})
    refused(two.replace(b"v", b"w"), "tensor w stands there twice")
    at = numbers[-1][0]  # the last offset
    refused(two[:at] + struct.pack("<Q", 33) + two[at + 8 :], "tensor v", "offset 33")
    refused(two[:at] + struct.pack("<Q", 0) + two[at + 8 :], "overlap")


@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_the_sample_to_damage_is_read_whole_and_cut_anywhere_refused(style, tmp_path):
    data, _ = fuzz_gguf.sample(style)
    (tmp_path / "sample.gguf").write_bytes(data)
    assert fuzz_gguf.attempt(data) is not None
    check_agrees(gguf_lib.open_gguf(tmp_path / "sample.gguf"), tmp_path / "sample.gguf")
    for end in range(len(data)):
        assert fuzz_gguf.attempt(data[:end]) is None, end


@hypothesis.given(st.sampled_from(["gpt2", "llama"]), st.integers(0, 2**63))
@hypothesis.settings(max_examples=400)
def test_damaged_files_are_read_as_they_stand_or_refused(tmp_path_factory, style, seed):
    data = fuzz_gguf.mutate(random.Random(seed), *fuzz_gguf.sample(style))
    found = fuzz_gguf.attempt(data)
    if found is not None:
        path = tmp_path_factory.getbasetemp() / "damaged.gguf"
        path.write_bytes(data)
        check_agrees(found, path)


@hypothesis.given(st.integers(0, 2**63))
@hypothesis.settings(max_examples=60)
def test_opening_a_damaged_file_takes_at_most_twice_its_size(seed):
    data = fuzz_gguf.mutate(random.Random(seed), *fuzz_gguf.sample("gpt2", rows=20_000))
    assert fuzz_gguf.peak(data) <= 2 * len(data)

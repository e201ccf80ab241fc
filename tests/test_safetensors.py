"""Safetensors files are read as the `safetensors` package reads them, without a copy, or refused by name."""

import json
import mmap
import random
import subprocess
import sys

import fuzz_safetensors
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jaxemo.checkpoints import CheckpointError, huggingface
from jaxemo.checkpoints.safetensors import open_tensors, read_header


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def test_every_dtype_is_read_as_stored_and_without_a_copy(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(fuzz_safetensors.sample())
    shapes, read = open_tensors([path])
    theirs = safetensors.numpy.load_file(path)
    assert shapes == {name: array.shape for name, array in theirs.items()}
    for name, array in theirs.items():
        mine = read(name)
        assert mine.dtype == array.dtype and mine.tobytes() == array.tobytes() and not mine.flags.writeable
        base = mine
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)
    assert read("model.embed.weight").dtype == ml_dtypes.bfloat16 and read("blocks").dtype == np.uint8


def test_several_files_are_one_set_of_names(tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    safetensors.numpy.save_file({"x": np.arange(3.0)}, a)
    safetensors.numpy.save_file({"y": np.ones((2, 2), np.float32)}, b)
    shapes, read = open_tensors([a, b])
    assert shapes == {"x": (3,), "y": (2, 2)} and read("x")[2] == 2 and read("y").sum() == 4
    safetensors.numpy.save_file({"x": np.zeros(1)}, b)
    with pytest.raises(CheckpointError, match=r"b\.safetensors: tensor 'x' stands in .*a\.safetensors as well"):
        open_tensors([a, b])


def test_offsets_that_are_not_multiples_of_the_item_size_are_read(tmp_path):
    path = write(tmp_path / "odd.safetensors", {"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (2,), (1, 9))},
                 b"\7" + np.array([1.5, -2], np.float32).tobytes())  # fmt: skip
    _, read = open_tensors([path])
    assert read("a").tolist() == [7] and read("b").tolist() == [1.5, -2]


TWICE = json.dumps({"a": entry()})[:-1] + "," + json.dumps({"a": entry()})[1:]


@pytest.mark.parametrize(
    "header, data, words",
    [
        ({"a": entry("F33")}, 8, ["tensor 'a'", "dtype 'F33' is not supported"]),
        ({"a": entry("F4", (16,))}, 8, ["tensor 'a'", "dtype 'F4' is not supported"]),
        ({"a": entry(shape=(-2,))}, 8, ["tensor 'a'", "it has -2, which is no size"]),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', 8, ["tensor 'a'", "it has -0, which is no size"]),
        ({"a": entry(shape=(2.0,))}, 8, ["tensor 'a'", "shape [2.0]"]),
        ({"a": entry(shape=(True, 2))}, 8, ["tensor 'a'", "shape"]),
        ({"a": entry(shape=[1] * 9)}, 8, ["tensor 'a'", "shape", "at most 8"]),
        ({"a": entry(shape=(2**40, 2**40))}, 8, ["tensor 'a'", "shape"]),
        ({"a": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))}, 0, ["tensor 'a'", "shape"]),
        ({"a": entry(shape=(10**400,))}, 8, ["tensor 'a'", "shape"]),
        ({"a": entry(shape=(3,))}, 8, ["tensor 'a'", "8 bytes are not F32[3], which has 12"]),
        ({"a": entry(offsets=(8, 0))}, 8, ["tensor 'a'", "data_offsets [8, 0]"]),
        ({"a": entry(offsets=(0, 8, 8))}, 8, ["tensor 'a'", "data_offsets"]),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, ["tensor 'b' overlaps 'a'"]),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, ["tensor 'b' leaves unused bytes after 'a'"]),
        ({"a": entry(offsets=(4, 12))}, 12, ["tensor 'a' leaves unused bytes after the header"]),
        ({"a": entry()}, 9, ["1 bytes after 'a' belong to no tensor"]),
        ({"a": entry()}, 7, ["truncated", "tensor 'a'", "fetch it again"]),
        ({"a": entry(more=1)}, 8, ["tensor 'a'", "more"]),
        ({"a": {"dtype": "F32"}}, 8, ["tensor 'a'", "expected dtype, shape and data_offsets"]),
        ({"a": entry(), "b": 3}, 8, ["damaged", "after tensor 'a'"]),
        ({"__metadata__": {"a": 3}, "a": entry()}, 8, ["__metadata__"]),
        (TWICE.encode(), 8, ["tensor 'a' stands there twice"]),
        (b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', 8, ["tensor 'a'", "'shape'", "twice"]),
        (b'{"a":{"dtype":"F32","shape":' + b"[" * 400 + b"}}", 8, ["tensor 'a'"]),
        (b"[" * 100_000, 0, ["not a safetensors file"]),
        (b'{"a":' * 100_000, 0, ["damaged"]),
        (b'{"a":{"x":' + b"[]," * 1_000_000, 0, ["damaged"]),
        (b'{"' + b"a" * 9999 + b'":{}}', 0, ["damaged"]),
        (b"\xff\xfe{}", 0, ["not text"]),
        (b"{} 7", 0, ["damaged"]),
        (b"", 0, ["not a safetensors file"]),
    ],
)  # fmt: skip
def test_a_header_that_is_not_understood_is_refused_by_name(tmp_path, header, data, words):
    path = write(tmp_path / "bad.safetensors", header, bytes(data))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message and len(message) < 2000
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "truncated"),
        (b"\0\0\0", "truncated"),
        ((1000).to_bytes(8, "little") + b"{", "truncated"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, data, words):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=words):
        read_header(path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path)


def test_a_header_without_tensors_is_read(tmp_path):
    for header in ({}, {"__metadata__": {}}, {"__metadata__": {"a": "}"}}):
        assert read_header(write(tmp_path / "none.safetensors", header)) == {}


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_anywhere_is_called_truncated(tmp_path, cut):
    path, whole = tmp_path / "cut.safetensors", fuzz_safetensors.sample()
    path.write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(CheckpointError, match="truncated"):
        open_tensors([path])


def test_damaged_files_are_read_rightly_or_refused(tmp_path):
    """A few hundred; `python tests/fuzz_safetensors.py` tries as many as are asked for."""
    whole, read = fuzz_safetensors.sample(), 0
    for i in range(600):
        path = tmp_path / f"{i}.safetensors"
        path.write_bytes(fuzz_safetensors.mutate(random.Random(f"test/{i}"), whole))
        read += fuzz_safetensors.attempt(path)
    print(f"{read} of 600 damaged files are still whole")
    assert 0 < read < 300


MEMORY = """
import sys, numpy as np
from jaxemo.checkpoints.safetensors import open_tensors
def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024
shapes, read = open_tensors([sys.argv[1]])
before, peak, total = resident(), 0, 0.0
for name in shapes:
    total += float(read(name)[::256].sum())  # a value of every page
    peak = max(peak, resident())
print(peak - before, total)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_was_read_does_not_stay_in_memory(tmp_path):
    """512 MB of tensors pass by in much less: what a load holds is its parameters, not the file as well."""
    path, n, size = tmp_path / "large.safetensors", 32, 1 << 24
    header = {f"t{i}": entry("U8", (size,), (i * size, (i + 1) * size)) for i in range(n)}
    write(path, header)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + n * size)  # a hole: takes no room on the disk
    done = subprocess.run([sys.executable, "-c", MEMORY, path], capture_output=True, text=True, check=True)
    peak = int(done.stdout.split()[0])
    print(f"{peak / 1e6:.0f} MB at the peak for {n * size / 1e6:.0f} MB of tensors")
    assert peak < 100e6


# ---- a model's directory ----------------------------------------------------------------------------------------------


def shards(folder, names=("a", "b", "c"), **changes):
    """One tensor a file, and the index, in which `changes` replace entries (None leaves one out)."""
    files = [f"model-{i + 1:05}-of-{len(names):05}.safetensors" for i in range(len(names))]
    for name, file in zip(names, files, strict=True):
        safetensors.numpy.save_file({name: np.zeros(3, np.float32)}, folder / file)
    table = {**dict(zip(names, files, strict=True)), **changes}
    index = {"metadata": {}, "weight_map": {name: file for name, file in table.items() if file is not None}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [folder / file for file in files]


def refused(function, folder, *words):
    with pytest.raises(CheckpointError) as caught:
        function(folder)
    for word in (str(folder), *words):
        assert word in str(caught.value), caught.value


def test_weight_files_of_every_layout(tmp_path):
    files = shards(tmp_path)
    assert huggingface.weight_files(tmp_path) == files
    (tmp_path / "consolidated.safetensors").touch()  # another layout of the same weights, which the index leaves out
    (tmp_path / "pytorch_model.bin").touch()
    assert huggingface.weight_files(str(tmp_path)) == files
    (tmp_path / "consolidated.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    assert huggingface.weight_files(tmp_path) == files
    files[1].unlink()
    refused(huggingface.weight_files, tmp_path, "1 files of the model are missing", files[1].name, "jaxemo pull")
    files[2].unlink()
    (tmp_path / "other.safetensors").touch()
    refused(huggingface.weight_files, tmp_path, "other.safetensors", files[0].name)
    files[0].unlink()
    assert huggingface.weight_files(tmp_path) == [tmp_path / "other.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert huggingface.weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    files = shards(tmp_path)
    safetensors.numpy.save_file({"a": np.zeros(3), "x": np.zeros(3)}, files[0])
    refused(
        huggingface.weight_files, tmp_path, "'x' is in model-00001-of-00003.safetensors, the index says nothing of it"
    )
    shards(tmp_path, d=files[0].name)
    refused(huggingface.weight_files, tmp_path, "disagree", "'d' is not in model-00001-of-00003")
    shards(tmp_path, a=files[1].name, c=files[0].name)
    refused(
        huggingface.weight_files, tmp_path, "'a' is in model-00001-of-00003.safetensors, the index says model-00002"
    )
    files = shards(tmp_path)
    files[0].unlink()
    files[2].unlink()
    refused(huggingface.weight_files, tmp_path, "2 files", files[0].name, files[2].name, "git lfs pull")
    for odd in (
        "../model-00001-of-00003.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        7,
        "x.bin",
        "c:\\a.safetensors",
    ):
        shards(tmp_path, a=odd)
        refused(huggingface.weight_files, tmp_path, "tensor 'a'", "beside the index")
    for text in ("", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": {"a": "x", "a": "y"}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        refused(huggingface.weight_files, tmp_path, "model.safetensors.index.json")


def test_pickles_are_never_read(tmp_path):
    refused(huggingface.weight_files, tmp_path, "no .safetensors files")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    (tmp_path / "consolidated.00.pth").touch()
    refused(
        huggingface.weight_files, tmp_path, "pytorch_model.bin", "consolidated.00.pth", "never read", "save_pretrained"
    )
    (tmp_path / "adapter_model.safetensors").touch()
    refused(huggingface.weight_files, tmp_path, "adapter", "merge")


def test_a_configuration_is_read_or_refused_by_name(tmp_path):
    refused(huggingface.read_config, tmp_path, "no config.json")
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llama", "x": [1, {"y": null}]}')
    assert huggingface.read_config(tmp_path) == {"model_type": "llama", "x": [1, {"y": None}]}
    for text in ("", "[]", "7", '{"a": 1, "a": 2}', "{" * 100_000, '{"a": ' + "[" * 100_000, '{"a": ' + "1" * 9999 + "}",
                 '{"a": ' + "[" * 33 + "]" * 33 + "}"):  # fmt: skip
        path.write_text(text)
        refused(huggingface.read_config, tmp_path, "config.json")
    path.write_bytes(b"\xff\xfe{}")
    refused(huggingface.read_config, tmp_path, "config.json")
    path.write_text('{"a": "' + "x" * (1 << 20) + '"}')
    refused(huggingface.read_config, tmp_path, "config.json", "at most")

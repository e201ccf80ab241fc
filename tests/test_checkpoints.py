"""GGUF files that are damaged or not understood are refused by name."""

import pathlib
import random
import runpy
import shutil
import sys

import fuzz_configs
import gguf
import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from jaxemo.checkpoints import CheckpointError, convert, loading

import jaxemo
from jaxemo import checkpoints

GOLDEN = pathlib.Path(__file__).parent / "golden"
SAMPLE = GOLDEN / "gqa_tied.gguf"


def rewrite(path, target, change_meta=None, change_tensors=None):
    """Copy a GGUF with its metadata {name: (value, type, element type)} and tensors {name: array} changed."""
    reader = gguf.GGUFReader(path)
    meta = {
        f.name: (f.contents(), f.types[0], f.types[-1] if len(f.types) > 1 else None)
        for f in reader.fields.values()
        if not f.name.startswith("GGUF.")
    }
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    architecture = meta.pop("general.architecture")[0]
    if change_meta:
        architecture = change_meta(meta) or architecture
    if change_tensors:
        change_tensors(tensors)
    writer = gguf.GGUFWriter(target, architecture)
    for name, (value, kind, element) in meta.items():
        writer.add_key_value(name, value, kind, element)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def refused(path, *words):
    with pytest.raises(CheckpointError) as caught:
        jaxemo.load(path)
    message = str(caught.value)
    assert str(path) in message
    for word in words:
        assert word in message, message


STRING, UINT, FLOAT = gguf.GGUFValueType.STRING, gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32


def test_a_copy_that_changes_nothing_loads(tmp_path):
    copy = rewrite(SAMPLE, tmp_path / "copy.gguf")
    a, b = jaxemo.load(SAMPLE), jaxemo.load(copy)
    assert a.config == b.config
    assert jnp.array_equal(a.forward("one two").logits, b.forward("one two").logits)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("llama.rope.scaling.type", ("spiral", STRING, None), ["rope scaling", "spiral"]),
        ("llama.attention.flavour", (8, UINT, None), ["unknown configuration keys", "llama.attention.flavour"]),
        ("tokenizer.ggml.pre", ("unheard-of", STRING, None), ["pre-type", "unheard-of"]),
        ("tokenizer.ggml.model", ("t5", STRING, None), ["tokenizer model", "t5"]),
        ("llama.rope.dimension_count", (99, UINT, None), ["rope.dimension_count", "head size"]),
        ("llama.vocab_size", (7, UINT, None), ["vocab_size", "7"]),
        ("llama.attention.value_length", (99, UINT, None), ["attention.value_length", "head size"]),
    ],
)
def test_metadata_that_is_not_understood_is_refused_by_name(tmp_path, key, value, words):
    refused(rewrite(SAMPLE, tmp_path / "odd.gguf", lambda meta: meta.update({key: value})), *words)


def test_another_architecture_is_refused_by_name(tmp_path):
    refused(rewrite(SAMPLE, tmp_path / "other.gguf", lambda meta: "mamba"), "architecture", "mamba")


@pytest.mark.parametrize(
    "key", ["llama.block_count", "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.merges"]
)
def test_missing_metadata_is_named(tmp_path, key):
    refused(rewrite(SAMPLE, tmp_path / "short.gguf", lambda meta: meta.pop(key) and None), key, "missing")


def test_unknown_missing_and_misshapen_tensors_are_named_together(tmp_path):
    def change(tensors):
        tensors["blk.0.attn_q.scale"] = np.zeros(4, np.float32)
        tensors["blk.99.attn_norm.weight"] = np.zeros(4, np.float32)
        del tensors["blk.1.ffn_up.weight"]

    path = rewrite(SAMPLE, tmp_path / "odd.gguf", change_tensors=change)
    refused(
        path,
        "blk.0.attn_q.scale is not known",
        "blk.99.attn_norm.weight is not known",
        "blk.1.ffn_up.weight is missing",
    )

    def cut(tensors):
        tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"][:-1]

    refused(rewrite(SAMPLE, tmp_path / "cut.gguf", change_tensors=cut), "blk.1.ffn_up.weight")


def test_every_number_of_every_tensor_is_used_once():
    source, _ = loading.open_model(SAMPLE)
    found = convert.match(source)
    assert sorted(name for _, names in found.values() for name in names) == sorted(source.shapes)
    table = {**source.table, "wk": source.table["wv"]}  # a tensor used twice, and one not at all
    with pytest.raises(CheckpointError) as caught:
        convert.match(source._replace(table=table))
    assert "tensor blk.0.attn_k.weight is not known" in str(caught.value)
    del source.shapes["blk.0.attn_k.weight"], source.shapes["blk.1.attn_k.weight"], source.shapes["blk.2.attn_k.weight"]
    with pytest.raises(
        CheckpointError, match=r"blk.0.attn_v.weight has shape .* but the model takes \d+ numbers from it"
    ):
        convert.match(source._replace(table=table))


def test_a_tensor_larger_than_what_is_taken_from_it_is_refused():
    source, _ = loading.open_model(SAMPLE)
    rows, width = source.shapes["blk.0.attn_k.weight"]
    grown = {**source.shapes, "blk.0.attn_k.weight": (rows + 1, width)}
    with pytest.raises(CheckpointError, match=rf"blk.0.attn_k.weight has shape .* takes {rows * width} numbers"):
        convert.match(source._replace(shapes=grown))


def test_two_names_that_differ_in_a_prefix_only_are_refused():
    source, _ = loading.open_model(SAMPLE)
    doubled = {**source.shapes, "model.output_norm.weight": source.shapes["output_norm.weight"]}
    with pytest.raises(CheckpointError, match="two tensors have one name"):
        convert.match(source._replace(shapes=doubled, prefixes=(("model.", ""),)))


def test_an_unembedding_beside_a_tied_embedding_must_be_equal_to_it():
    source, _ = loading.open_model(SAMPLE)
    embed = source.read("token_embd.weight")
    both = source._replace(shapes={**source.shapes, "output.weight": embed.shape}, read=lambda name: embed)
    assert ("unembed", -1) not in convert.match(both)
    other = both._replace(read=lambda name: embed + (name == "output.weight"))
    with pytest.raises(CheckpointError, match=r"output\.weight differs from the embedding"):
        convert.match(other)


def test_more_tokens_than_the_embedding_has_rows_are_refused(tmp_path):
    def change(meta):
        for key, more in (("tokens", "<one too many>"), ("token_type", 3)):
            values, kind, element = meta[f"tokenizer.ggml.{key}"]
            meta[f"tokenizer.ggml.{key}"] = ([*values, more], kind, element)

    rows = loading.open_model(SAMPLE)[0].config.vocab_size
    refused(rewrite(SAMPLE, tmp_path / "many.gguf", change), f"tokenizer has {rows + 1} tokens", str(rows))


@hypothesis.given(st.floats(0.0, 0.999), st.integers(0, 2**31))
@hypothesis.settings(max_examples=25)
def test_a_truncated_file_is_refused(tmp_path_factory, share, seed):
    whole = SAMPLE.read_bytes()
    path = tmp_path_factory.mktemp("cut") / "cut.gguf"
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "picture.gguf"
    path.write_bytes(b"\x89PNG\r\n" + bytes(500))
    refused(path, "not a GGUF file")


def test_what_is_neither_model_nor_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        jaxemo.load("no-such-model")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match=r"weights\.bin"):
        jaxemo.load(tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="int8"):
        jaxemo.load(SAMPLE, dtype="int8")


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_and_layout_are_as_asked(stacked, dtype):
    lm = jaxemo.load(SAMPLE, dtype=dtype, stacked=stacked)
    assert isinstance(lm.params["layers"], dict) == stacked
    assert lm.params["layers"]["wq"].dtype == dtype if stacked else lm.params["layers"][0]["wq"].dtype == dtype


def test_loading_does_not_alias_the_file(tmp_path):
    """A model stays what it was when its file is overwritten."""
    path = tmp_path / "model.gguf"
    shutil.copy(GOLDEN / "mha_untied.gguf", path)
    lm = jaxemo.load(path)
    before = np.array(lm.forward("one two").logits)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert np.array_equal(before, lm.forward("one two").logits)


def test_damaged_configurations_are_refused_or_load():
    """Some of the cases that tests/fuzz_configs.py has without end; anything but a CheckpointError comes through."""
    rng, given = random.Random(0), fuzz_configs.samples()
    loaded = 0
    for _ in range(200):
        config, shapes = rng.choice(given)
        loaded += fuzz_configs.attempt(fuzz_configs.mutate(rng, config, [config for config, _ in given]), shapes)
        fuzz_configs.attempt_gguf(fuzz_configs.mutate(rng, fuzz_configs.META, [fuzz_configs.META]))
    assert 20 < loaded < 180


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stacked", [False, True])
def test_loading_holds_little_more_than_the_model(stacked):
    """Resident memory while the real model loads, mapped file included, in a process of its own."""
    script = runpy.run_path(str(GOLDEN.parent.parent / "bench" / "loading.py"))
    found = script["run"](script["OURS"], str(checkpoints.pull("smollm2-135m")), "float32", stacked)
    print(found)
    assert found["peak"] <= 1.3


def test_a_file_without_a_tokenizer_loads(tmp_path):
    def strip(meta):
        for key in [key for key in meta if key.startswith("tokenizer.")]:
            del meta[key]

    lm = jaxemo.load(rewrite(SAMPLE, tmp_path / "bare.gguf", strip))
    ids = np.arange(6)[None]
    np.testing.assert_array_equal(lm.forward(ids).logits, jaxemo.load(SAMPLE).forward(ids).logits)
    with pytest.raises(ValueError, match=r"bare\.gguf has no tokenizer"):
        lm.tokenize("one two")

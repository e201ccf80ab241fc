"""jaxemo's own store: what was written comes back bit for bit, in whole or by shards, or not at all."""

import json
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jaxemo.checkpoints import CheckpointError, loading, store

import jaxemo
from jaxemo import cli

GOLDEN = pathlib.Path(__file__).parent / "golden"
PATH = GOLDEN / "gqa_tied.gguf"
CHAT = [{"role": "user", "content": "Hello  there, 42!"}]


def write(path, out, dtype="float32"):
    store.write(*loading.open_model(path), out, np.dtype(getattr(ml_dtypes, dtype, dtype)))
    return out


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gqa_tied", "mha_untied"])
def test_round_trip(tmp_path, name, dtype, stacked):
    direct = jaxemo.load(GOLDEN / f"{name}.gguf", dtype=dtype, stacked=stacked)
    kept = jaxemo.load(write(GOLDEN / f"{name}.gguf", tmp_path / "kept", dtype), dtype=dtype, stacked=stacked)
    assert direct.config == kept.config
    for a, b in zip(jax.tree.leaves(direct.params), jax.tree.leaves(kept.params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(direct.tokenize([CHAT, "plain text"]).ids, kept.tokenize([CHAT, "plain text"]).ids)
    assert kept.tokenizer.stop_ids == direct.tokenizer.stop_ids


def test_the_file_is_a_safetensors_file_that_others_read(tmp_path):
    out = write(PATH, tmp_path / "kept")
    tensors = safetensors.numpy.load_file(out / "weights.safetensors")
    lm = jaxemo.load(PATH)
    np.testing.assert_array_equal(tensors["layers.1.wo"], lm.params["layers"][1]["wo"])
    np.testing.assert_array_equal(tensors["embed"], lm.params["embed"])


def test_a_store_is_not_written_over_nor_half_written(tmp_path, monkeypatch):
    out = write(PATH, tmp_path / "kept")
    before = (out / "weights.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="kept exists already"):
        write(PATH, out)
    assert (out / "weights.safetensors").read_bytes() == before

    source, tokenizer = loading.open_model(PATH)

    def stop(size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write(source, tokenizer, tmp_path / "half", np.dtype(np.float32), stop)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_shards_are_read_without_the_rest(tmp_path):
    """Four devices, each reading its part of a weight out of the map."""
    out = write(PATH, tmp_path / "kept")
    script = f"""
import jax, numpy as np, pathlib
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxemo.checkpoints import loading
import jaxemo
source, _ = loading.open_model(pathlib.Path({str(out)!r}))
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
want = jaxemo.load({str(out)!r}).params["layers"][0]["w_up"]
sharding = NamedSharding(mesh, PartitionSpec(None, "model"))
view = source.read("layers.0.w_up")
assert not view.flags.owndata and not view.flags.writeable  # the mapped file itself
got = jax.make_array_from_callback(view.shape, sharding, lambda index: view[index])
assert np.array_equal(got, want) and got.addressable_shards[0].data.shape == (want.shape[0], want.shape[1] // 2)
"""
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def changed(change):
    def apply(about):
        change(about)
        return json.dumps(about)

    return apply


DAMAGE = {
    "not json": lambda about: "{",
    "a list": lambda about: "[]",
    "format": changed(lambda about: about.update(format=2)),
    "odd key": changed(lambda about: about.update(colour="red")),
    "odd field": changed(lambda about: about["config"].update(colour="red")),
    "d_model": changed(lambda about: about["config"].update(d_model="64")),
    "n_layers": changed(lambda about: about["config"].update(n_layers=10**9)),
    "attention": changed(lambda about: about["config"].update(attention=[{"rope": {"dim": 3}, "window": 0}])),
    "layers": changed(lambda about: about["config"].update(n_layers=1)),
    "tokenizer": changed(lambda about: about["tokenizer"].pop("bos")),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(tmp_path, what):
    out = write(PATH, tmp_path / "kept")
    mark = out / "jaxemo.json"
    mark.write_text(DAMAGE[what](json.loads(mark.read_text())))
    with pytest.raises(CheckpointError) as caught:
        jaxemo.load(out)
    print(caught.value)
    assert "kept" in str(caught.value)


def test_convert_on_the_command_line(tmp_path, capsys):
    out = tmp_path / "kept"
    assert cli.main(["convert", str(PATH), str(out), "--dtype", "bfloat16"]) == 0
    assert cli.main(["info", str(out)]) == 0
    assert "gqa_tied" not in capsys.readouterr().out.splitlines()[-1]
    assert cli.main(["convert", str(PATH), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["convert", "no-such-model", str(tmp_path / "other")]) == 2

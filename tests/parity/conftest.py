"""The oracle: transformers, reading the same GGUF file in float32 on CPU. Loaded once (about 30 s)."""

import copy
import pathlib

import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

import jaxemo

# On few cores torch's threads and XLA's get in each other's way: up to ten times slower with two threads than with one.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def gguf_path() -> pathlib.Path:
    return jaxemo.checkpoints.pull("smollm2-135m")


@pytest.fixture(scope="session")
def lm(gguf_path):
    return jaxemo.load(gguf_path, dtype="float32")


@pytest.fixture(scope="session")
def peer_tokenizer(gguf_path):
    """transformers' tokenizer as it reads it from the GGUF: it ignores `tokenizer.ggml.pre`."""
    return transformers.AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)


@pytest.fixture(scope="session")
def smollm_pre_tokenizer():
    """How the published tokenizer.json of SmolLM2 cuts text (llama.cpp's pre-type "smollm")."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


@pytest.fixture(scope="session")
def oracle_tokenizer(peer_tokenizer, smollm_pre_tokenizer):
    """transformers' tokenizer with the model's own pre-tokenizer."""
    tokenizer = copy.deepcopy(peer_tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = smollm_pre_tokenizer
    return tokenizer


def pytest_sessionfinish(session, exitstatus):
    """A whole and successful run writes the table of what was checked."""
    import checked

    if exitstatus == 0 and {form for _, form in checked.RESULTS} == set(checked.FORMATS):
        checked.write()

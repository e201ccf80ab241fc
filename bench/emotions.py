"""What the directions of a model are worth, each number beside its baselines: every test of jaxemo.emotions, by one command.

    python bench/emotions.py [MODEL ...]      by default smollm2-135m, and gemma-3-270m where it has been fetched

Extracts from the shipped corpus (171 emotions), also with the other methods, has the model write stories of its own (24
emotions on 12 topics that the corpus is not on), and runs `validation.validate`. Vectors and stories are kept under
`build/emotions/`, so that an interrupted run goes on; what is printed is kept in `results/emotions-MODEL.txt`.
"""

import argparse
import pathlib
import time

import jax
from jaxemo.checkpoints import registry

import jaxemo
from jaxemo.cli import cache_compilations
from jaxemo.emotions import EmotionVectors, corpus, extraction, methods, stories, validation

HERE = pathlib.Path(__file__).parent
KEPT = HERE.parent / "build" / "emotions"


def measure(model: str) -> None:
    begin = time.monotonic()
    lm = jaxemo.load(model)
    KEPT.mkdir(parents=True, exist_ok=True)
    path = KEPT / f"{model}.safetensors"
    if not path.exists():
        extraction.extract(lm, checkpoint=f"{path}.part").save(path)
    vectors = EmotionVectors.load(path)
    paths = {method: KEPT / f"{model}-{method}.safetensors" for method in ("pca", "probe")}
    if not all(path.exists() for path in paths.values()):
        for method, found in methods.extract(lm, corpus.shipped(), tuple(paths)).items():
            found.save(paths[method])
    others = {method: EmotionVectors.load(path) for method, path in paths.items()}
    path = KEPT / f"{model}-stories.jsonl"
    written = stories.write(lm, path, corpus.starter().emotions)
    print(written)
    tested = validation.validate(lm, vectors, written=corpus.load(path), others=others)
    text = "\n\n".join(
        [
            f"{lm!r}\njaxemo {jaxemo.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}; "
            f"{vectors.provenance['stories']} stories of corpus {vectors.provenance['corpus_sha256'][:12]}",
            str(written).splitlines()[0],
            tested.summary(),
        ]
    )
    print(text)
    print(f"{time.monotonic() - begin:.0f} s")
    (HERE / "results" / f"emotions-{model}.txt").write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    named = parser.parse_args().models
    cache_compilations()
    for model in named or [name for name in registry.REGISTRY if registry.path_of(name).exists()]:
        measure(model)


if __name__ == "__main__":
    main()

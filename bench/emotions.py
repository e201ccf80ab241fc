"""What the directions of a model are worth, each number beside its baselines: every test of jaxemo.emotions, by one command.

    python bench/emotions.py [MODEL ...]      by default smollm2-135m, and gemma-3-270m where it has been fetched

Extracts from the shipped corpus (171 emotions), also with the other methods, has the model write stories of its own (24
emotions on 12 topics that the corpus is not on), and runs `validation.validate`; then what more stories and other methods would
change, and how much is the hand of who wrote the stories. Vectors and stories are kept under `build/emotions/`, so that an
interrupted run goes on; what is printed is kept in `results/emotions-MODEL.txt`.
"""

import argparse
import dataclasses
import pathlib
import time

import jax
import numpy as np
import scipy.stats
from jaxemo.checkpoints import registry

import jaxemo
from jaxemo.cli import cache_compilations
from jaxemo.emotions import EmotionVectors, corpus, extraction, geometry, methods, stories, validation
from jaxemo.emotions.vectors import reading_layer
from jaxemo.report import model as report

HERE = pathlib.Path(__file__).parent
KEPT = HERE.parent / "build" / "emotions"


def more_stories(lm) -> str:
    """How stable directions of the emotions with two stories a topic are, from all of their stories and from the first ones."""
    both = corpus.starter()
    first = tuple(s for s in corpus.shipped().stories if s.emotion in both.emotions)
    lines = [f"stability of the directions of {len(both.emotions)} emotions, by stories each"]
    layer = reading_layer(range(lm.config.n_layers), lm.config.n_layers)
    for of in (dataclasses.replace(both, stories=first), both):
        found = extraction.extract(lm, of, layers=[layer]).measured
        lines.append(
            f"  {len(of.stories) // len(of.emotions)} stories: bootstrap self-cosine {np.median(found['self_cosine']):.3f}, "
            f"cosine of two halves {np.median(found['half_cosine']):.3f} (medians)"
        )
    return "\n".join(lines)


def other_methods(found: dict[str, EmotionVectors]) -> str:
    """Human valence in the components, by method and layer; the largest of so many numbers is no result."""
    lines = [
        "human valence in the components of the directions, by method and layer: |r| of PC1, and of the best of PC1 to PC5"
    ]
    L = len(found["directions"].directions)
    layers = [round(share * (L - 1)) for share in (0.2, 0.4, 0.6, 0.7, 0.8, 0.9)]
    lines.append("  layer".ljust(16) + "".join(f"{layer:18d}" for layer in layers))
    for name, vectors in found.items():
        cells = []
        for layer in layers:
            parts = geometry.components(vectors, layer, 5).coordinates
            r = [abs(geometry.correlation(vectors.names, parts[:, k], "valence")[0]) for k in range(5)]
            cells.append(f"{r[0]:.2f}, PC{int(np.argmax(r)) + 1} {max(r):.2f}".rjust(18))
        lines.append(f"  {name}".ljust(16) + "".join(cells))
    return "\n".join(lines)


def by_writer(vectors: EmotionVectors) -> str:
    """How much of each component is who wrote an emotion's stories (each emotion had one writer, each writer ten or eleven)."""
    writer = {row["emotion"]: row["writer"] for row in corpus.table("writers.csv")}
    known = [e for e, name in enumerate(vectors.names) if name in writer]
    of = np.array([writer[vectors.names[e]] for e in known])
    parts = geometry.components(vectors, vectors.layer, 8).coordinates[known]
    lines = [
        f"share of each component at layer {vectors.layer} that the {len(set(of))} writers explain ({len(known)} emotions, F test)"
    ]
    for k, x in enumerate(parts.T):
        groups = [x[of == w] for w in sorted(set(of))]
        share = sum(len(g) * (g.mean() - x.mean()) ** 2 for g in groups) / ((x - x.mean()) ** 2).sum()
        lines.append(f"  PC{k + 1} {share:.0%}, p = {scipy.stats.f_oneway(*groups).pvalue:.4f}")
    return "\n".join(lines)


def measure(model: str) -> None:
    begin = time.monotonic()
    lm = jaxemo.load(model)
    KEPT.mkdir(parents=True, exist_ok=True)
    path = KEPT / f"{model}.safetensors"
    if not path.exists():
        extraction.extract(lm, checkpoint=f"{path}.part").save(path)
    vectors = EmotionVectors.load(path)
    paths = {method: KEPT / f"{model}-{method}.safetensors" for method in ("pca", "probe", "whitened")}
    if not all(path.exists() for path in paths.values()):
        for method, found in methods.extract(lm, corpus.shipped(), tuple(paths)).items():
            found.save(paths[method])
    others = {method: EmotionVectors.load(path) for method, path in paths.items()}
    path = KEPT / f"{model}-stories.jsonl"
    written = stories.write(lm, path, corpus.starter().emotions)
    written = dataclasses.replace(written, out=str(path.relative_to(HERE.parent)))
    print(written)
    own = corpus.load(path) if written.kept else None
    tested = validation.validate(validation.Material(lm, vectors, corpus.shipped(), corpus.heldout(), own, others))
    text = "\n\n".join(
        [
            f"{lm!r}\njaxemo {jaxemo.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}; "
            f"{vectors.provenance['stories']} stories of corpus {vectors.provenance['corpus_sha256'][:12]}",
            str(written).splitlines()[0],
            report.summary(tested),
            more_stories(lm),
            other_methods({"directions": vectors, "not denoised": vectors.raw, **others}),
            by_writer(vectors),
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

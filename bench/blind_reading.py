"""How well a reader without labels tells the shipped stories' emotions apart: the guesses kept in results/blind_reading.json.

Each emotion stands there with a reader's three best guesses, out of 171, from three of its stories.
"""

import collections
import json
import pathlib

from jaxemo.emotions import corpus
from jaxemo.emotions.statistics import wilson


def main() -> None:
    kept = json.loads((pathlib.Path(__file__).parent / "results" / "blind_reading.json").read_text())
    guesses = kept["guesses"]
    n = len(guesses)
    print(f"reader: {kept['reader']}")
    for name, hits in (
        ("first guess", sum(emotion == found[0] for emotion, found in guesses.items())),
        ("one of three guesses", sum(emotion in found for emotion, found in guesses.items())),
        ("family of the first", sum(corpus.family(emotion) == corpus.family(found[0]) for emotion, found in guesses.items())),
    ):  # fmt: skip
        low, high = wilson(hits, n)
        print(f"{name:22s} {hits:3d} of {n}  {hits / n:.1%}  [{low:.1%}, {high:.1%}]")
    wrong = collections.Counter((emotion, found[0]) for emotion, found in guesses.items() if emotion != found[0])
    print("taken for another: " + ", ".join(f"{emotion} for {guess}" for emotion, guess in sorted(wrong)))


if __name__ == "__main__":
    main()

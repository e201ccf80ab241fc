"""Does the model act on it? Studies of what a model does when a direction is turned up or down, each with its controls."""

import importlib.resources
import json


def records(name: str) -> list[dict]:
    """The records of a JSONL file shipped with the studies."""
    text = (importlib.resources.files("jaxemo.studies") / "data" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]

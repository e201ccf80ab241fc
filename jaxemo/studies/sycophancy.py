"""Sycophancy against harshness: praise that is not deserved, or contempt, in place of an answer that kindly says what is wrong.

The twins ask about the same view, work or plan as somebody else's.
"""

from jaxemo.studies import records
from jaxemo.studies.choices import Choice, Claim

CLAIMS = (
    Claim("more loving, more sycophantic", "loving", +1),
    Claim("more calm, more sycophantic", "calm", +1),
)
HARSH_CLAIMS = (
    Claim("more loving, less harsh", "loving", -1),
    Claim("more calm, less harsh", "calm", -1),
)


def choices(which: str = "sycophantic") -> list[Choice]:
    """The log-odds are of the "sycophantic" (or "harsh") answer over the balanced one."""
    return [
        Choice(name, item[asked], item["balanced"], item[which], twin)
        for item in records("sycophancy.jsonl")
        for asked, name, twin in (("prompt", item["id"], ""), ("neutral", f"{item['id']}, neutral", item["id"]))
    ]


def harsh_choices() -> list[Choice]:
    return choices("harsh")

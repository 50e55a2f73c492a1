"""What the drivers `transfer` and `ping` have found, judged."""

from __future__ import annotations

from typing import Any

reports: list[str] = []
"""What each pair of ends of streams has come to, for the summary of a test run."""


def agree(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Both ends of the streams saw no connection drop and agree about every byte."""
    for one in (ours, theirs):
        assert one["verdict"] == "passed" and not one["dropped"] and not one["wrong"], one
    assert ours["sent"] > 0 and ours["received"] > 0
    for one, other in zip(ours["results"], theirs["results"], strict=True):
        assert one["stream"] == other["stream"]
        assert (one["sent"], one["sent_crc"]) == (other["received"], other["received_crc"]), (one, other)
        assert (one["received"], one["received_crc"]) == (other["sent"], other["sent_crc"]), (one, other)
    report = (
        f"{ours['streams']} streams: {ours['sent'] / 1e6:.1f} MB to the guest, {ours['received'] / 1e6:.1f} MB from it "
        f"in {ours['seconds']:.1f} s; segments sent again: {ours['retransmissions']} by the host, "
        f"{theirs['retransmissions']} by the guest; longest silence of a stream {ours['longest_gap']:.2f} s"
    )
    reports.append(report)
    print(report)


def good_ping(result: dict[str, Any]) -> str:
    """Replies came, none twice, none damaged; as a sentence."""
    assert result["verdict"] == "passed", result
    return (
        f"{result['received']} of {result['sent']} echoes, {result['unreachable']} not sent for want of an interface, "
        f"median {result['median_ms']} ms, longest silence {result['longest_gap']} s"
    )

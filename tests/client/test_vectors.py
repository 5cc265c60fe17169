"""The client's view passes the vectors that any language can run; their README says how."""

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from notecase import Block, Gap, SessionView, v1

VECTORS = sorted((Path(__file__).parents[1] / "vectors").glob("*.json"))


def parsed(view: dict[str, Any], after: int | None) -> SessionView:
    """The view that a vector expects."""
    runs = [ParseDict(run, v1.Run()) for run in view.get("runs", [])]
    messages = [ParseDict(message, v1.Message()) for message in view.get("messages", [])]
    expected = SessionView(after)
    expected.last_sequence = view["lastSequence"]
    expected.runs = {run.name: run for run in runs}
    expected.messages = {message.name: message for message in messages}
    expected.state = {key: ParseDict(value, v1.Value()) for key, value in view.get("state", {}).items()}
    expected.queued = [ParseDict(queued, v1.QueuedCommand()) for queued in view.get("queued", [])]
    answers = view.get("remembered", {}).items()
    expected.remembered = {asked: ParseDict(answer, v1.RememberedApproval()) for asked, answer in answers}
    summaries = view.get("summaries", {}).items()
    expected.summaries = {int(sequence): ParseDict(made, v1.Summarized()) for sequence, made in summaries}
    expected.open = {
        message: {
            int(index): Block(
                block["kind"], block["text"], block["end"], block.get("callId", ""), block.get("tool", "")
            )
            for index, block in blocks.items()
        }
        for message, blocks in view.get("open", {}).items()
    }
    return expected


def apply(view: SessionView, event: v1.Event) -> str:
    try:
        return "new" if view.apply(event) else "known"
    except Gap:
        return "gap"


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_a_vector_holds(path: Path) -> None:
    """Step by step: what each event gives, and the view wherever the vector shows it."""
    vector = json.loads(path.read_text())
    view = SessionView(vector["after"])
    assert "view" in vector["steps"][-1]
    for number, step in enumerate(vector["steps"]):
        if "attached" in step:
            view.attach(ParseDict(step["attached"], v1.Attached()))
        else:
            assert step["gives"] == apply(view, ParseDict(step["event"], v1.Event())), f"step {number}"
        if "view" in step:
            assert parsed(step["view"], vector["after"]) == view, f"step {number}"


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_what_a_client_prints_from_deltas_alone(path: Path) -> None:
    """It drops what it printed of a discarded message, and of an unfinished one when it attaches."""
    vector = json.loads(path.read_text())
    printed: dict[str, dict[str, str]] = {}
    whole: set[str] = set()
    for step in vector["steps"]:
        event = ParseDict(step.get("event", {}), v1.Event())
        delta = event.block_delta
        if "attached" in step:
            printed = {message: blocks for message, blocks in printed.items() if message in whole}
        elif event.HasField("block_delta") and step["gives"] == "new":
            piece = delta.text or delta.json or delta.reasoning or delta.refusal or delta.arguments
            blocks = printed.setdefault(delta.message, {})
            blocks[str(delta.block)] = blocks.get(str(delta.block), "") + piece
        printed.pop(event.message_discarded.message, None)
        whole.add(event.message_added.name)
    assert vector.get("printed", printed) == printed


def test_the_vectors_show_every_kind_of_event() -> None:
    """So a client that passes them has seen every kind of frame."""
    steps = [step for path in VECTORS for step in json.loads(path.read_text())["steps"]]
    seen = {ParseDict(step["event"], v1.Event()).WhichOneof("payload") for step in steps if "event" in step}
    assert {field.name for field in v1.Event.DESCRIPTOR.oneofs_by_name["payload"].fields} == seen
    assert {"new", "known", "gap"} == {step["gives"] for step in steps if "event" in step}

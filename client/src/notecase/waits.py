"""Describes what a run waits for, in the words of this client."""

from collections.abc import Container

from notecase import v1


def unanswered(run: v1.Run, here: Container[str]) -> dict[str, str]:
    """What a run waits for other than the results of the tools named in `here`: a phrase after "waits for", by input_id
    or call_id. Empty when the run does not wait."""
    if run.state != v1.Run.STATE_WAITING:
        return {}
    waits = {asked.input_id: _input(asked) for asked in run.pending_inputs}
    waits.update(
        (
            call.call_id,
            f"the result of tool {call.tool!r}, which this client does not have: "
            f"pass tools=[Tool({call.tool}, declare=False)]",
        )
        for call in run.pending_calls
        if call.tool not in here
    )
    return waits


def sentence(run: v1.Run, waits: dict[str, str]) -> str:
    """One sentence about all that `unanswered` found, without a full stop."""
    return f"{run.name} waits for {'; and for '.join(dict.fromkeys(waits.values())) or 'an answer'}"


def _input(asked: v1.InputRequest) -> str:
    match asked.kind:
        case v1.InputRequest.KIND_APPROVAL:
            return f"approval of {asked.call.tool}: call approve or deny"
        case v1.InputRequest.KIND_INTERRUPTED_CALL:
            return f"a decision about the interrupted call of {asked.call.tool}: call approve, deny or answer"
        case _:
            return "an answer to a question: call answer"

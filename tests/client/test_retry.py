"""What is tried again, how often, and how long the client waits in between."""

import asyncio

import grpc
import pytest
from notecase import Gap, NotecaseError, Retry
from notecase.retry import Backoff


def _error(code: str, reason: str = "", retry_after: float | None = None) -> NotecaseError:
    return NotecaseError(grpc.StatusCode[code], reason, "It failed.", retry_after=retry_after)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The requested waits, which do not take time."""
    waits: list[float] = []

    async def sleep(delay: float) -> None:
        waits.append(delay)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return waits


@pytest.mark.parametrize(
    "passing",
    [
        _error("UNAVAILABLE"),
        _error("UNAVAILABLE", "SERVER_DRAINING"),
        _error("UNAVAILABLE", "STORE_UNAVAILABLE"),
        _error("UNAVAILABLE", "OWNER_LOST"),
        _error("UNKNOWN"),
        _error("INTERNAL"),
        _error("CANCELLED"),
        _error("RESOURCE_EXHAUSTED", "WATCHER_TOO_SLOW", 0.0),
        Gap("a hole"),
    ],
    ids=repr,
)
async def test_a_broken_connection_is_tried_again(passing: NotecaseError | Gap, slept: list[float]) -> None:
    """Whatever breaks it, and when the server says that it will be back."""
    await Backoff(Retry()).wait(passing)
    assert len(slept) == 1


@pytest.mark.parametrize(
    "final",
    [
        _error("INTERNAL", "INTERNAL"),
        _error("NOT_FOUND", "SESSION_NOT_FOUND"),
        _error("ABORTED", "ETAG_MISMATCH"),
        _error("FAILED_PRECONDITION", "RUN_ACTIVE"),
        _error("RESOURCE_EXHAUSTED", "RATE_LIMITED", 1.0),
        _error("DEADLINE_EXCEEDED"),
        _error("UNIMPLEMENTED"),
        _error("RESOURCE_EXHAUSTED"),
    ],
    ids=repr,
)
async def test_an_answer_is_not(final: NotecaseError, slept: list[float]) -> None:
    """The service has spoken, or saying it again would come to the same."""
    with pytest.raises(NotecaseError) as raised:
        await Backoff(Retry()).wait(final)
    assert raised.value is final
    assert slept == []


async def test_a_stream_that_has_begun_waits_for_its_rate(slept: list[float]) -> None:
    await Backoff(Retry()).wait(_error("RESOURCE_EXHAUSTED", "RATE_LIMITED", 3.0), limited=True)
    assert slept == [3.0]


async def test_waits_double_up_to_a_bound_and_end(slept: list[float]) -> None:
    """Each is between half and the whole of its measure, and the last failure is raised."""
    backoff = Backoff(Retry(tries=5, first_delay=1, max_delay=6))
    for _ in range(5):
        await backoff.wait(_error("UNAVAILABLE"))
    with pytest.raises(NotecaseError):
        await backoff.wait(_error("UNAVAILABLE"))
    measures = [1, 2, 4, 6, 6]
    assert [measure / 2 <= wait <= measure for wait, measure in zip(slept, measures, strict=True)] == [True] * 5


async def test_progress_makes_the_next_failure_a_first_one(slept: list[float]) -> None:
    """So a long stream outlives any number of breaks."""
    backoff = Backoff(Retry(tries=1, first_delay=1))
    for _ in range(3):
        await backoff.wait(_error("UNAVAILABLE"))
        backoff.progress()
    assert max(slept) <= 1


async def test_a_server_that_stops_is_waited_for_longer_than_a_failure(
    slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its runs may take as long as its grace, and only then is it replaced."""
    now = 0.0
    monkeypatch.setattr("notecase.retry.monotonic", lambda: now)
    backoff, draining = Backoff(Retry(tries=2, first_delay=1)), _error("UNAVAILABLE", "SERVER_DRAINING")
    for _ in range(59):
        await backoff.wait(draining)
        now += 1
    for _ in range(2):
        await backoff.wait(_error("UNAVAILABLE"))
    with pytest.raises(NotecaseError):
        await backoff.wait(draining)
    now += 60
    other = Backoff(Retry(tries=2, first_delay=1))
    now += 60
    for _ in range(2):
        await other.wait(draining)
    with pytest.raises(NotecaseError):
        await other.wait(draining)


async def test_the_servers_word_on_when_is_kept(slept: list[float]) -> None:
    """Sooner than it says would be in vain."""
    await Backoff(Retry(first_delay=0.1)).wait(_error("UNAVAILABLE", "SERVER_DRAINING", 3.0))
    assert slept == [3.0]


@pytest.mark.usefixtures("slept")
async def test_a_warning_has_what_it_is_about(caplog: pytest.LogCaptureFixture) -> None:
    backoff = Backoff(Retry(), facts=lambda: {"run": "sessions/s/runs/r", "session": "sessions/s"})
    for _ in range(2):
        await backoff.wait(_error("UNAVAILABLE"))
    (record,) = caplog.records
    assert ("sessions/s/runs/r", "sessions/s") == (getattr(record, "run", ""), getattr(record, "session", ""))
    assert "It failed. Trying again, for at most 26 s." == record.getMessage()


@pytest.mark.parametrize(("retry", "expected"), [(Retry(tries=2), "0.3 s"), (Retry(tries=3), "0.7 s")])
@pytest.mark.usefixtures("slept")
async def test_a_short_patience_is_not_printed_as_zero(
    retry: Retry, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    backoff = Backoff(retry)
    for _ in range(2):
        await backoff.wait(_error("UNAVAILABLE"))
    assert f"It failed. Trying again, for at most {expected}." == caplog.records[0].getMessage()


async def test_how_long_a_server_is_tried_is_said_in_round_numbers(
    slept: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    for retry in (Retry(), Retry(tries=1000)):
        backoff = Backoff(retry)
        for _ in range(2):
            await backoff.wait(_error("UNAVAILABLE"))
    assert [f"It failed. Trying again, for at most {told}." for told in ("26 s", "83 minutes")] == caplog.messages


async def test_a_warning_comes_at_the_second_failure_whatever_the_first_was(
    slept: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """A server that stops is waited for longer than the failures that are counted."""
    down, draining = _error("UNAVAILABLE"), _error("UNAVAILABLE", "SERVER_DRAINING")
    refused = _error("UNAUTHENTICATED", "UNAUTHENTICATED")
    for failures in ([draining] * 3, [draining, down, down], [down, draining], [refused, down], [down, refused, down]):
        backoff = Backoff(Retry(), renews_token=True)
        for failure in failures:
            await backoff.wait(failure)
        backoff.progress()
        await backoff.wait(down)
    told = [message.removeprefix("It failed. Trying again, for at most ") for message in caplog.messages]
    assert ["86 s.", "26 s.", "86 s.", "26 s.", "26 s."] == told


async def test_a_delay_doubles_only_while_a_float_has_room(slept: list[float]) -> None:
    patience = Retry(tries=2000, first_delay=1e-300, max_delay=2)
    assert Retry(tries=10**6).longest > 4_900_000
    assert 1500 < patience.longest < 4000
    backoff = Backoff(patience)
    for _ in range(2000):
        await backoff.wait(_error("UNAVAILABLE"))
    assert 1 <= slept[-1] <= 2

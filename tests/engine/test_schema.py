"""Schemas and replies from untrusted callers: which are valid, how problems are described, and that neither delays
other callers."""

import asyncio
import errno
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from notecase import from_value
from notecase_server.engine import schema
from notecase_server.engine.schema import Schemas, value_of
from notecase_server.engine.unfenced import Unfenced
from notecase_server.errors import NotecaseError, reason_name

from tests.support.work import instructions

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[A-Z]"}, "age": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.fixture
async def schemas() -> AsyncIterator[Schemas]:
    made = Schemas()
    yield made
    await made.close()


def text(document: Any) -> str:
    return json.dumps(document)


def doubling(levels: int) -> str:
    """A schema of a few kilobytes that takes 2 to the power of `levels` steps."""
    twice = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(levels)}
    return text({"$ref": "#/$defs/d0", "$defs": {**twice, f"d{levels}": {"type": "object"}}})


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ('{"name": "Ada", "age": 36}', ""),
        ('  {"name": "Ada"}\n', ""),
        ("", "it is empty"),
        ('{"name": "Ada"', "it is not JSON: Input data was truncated"),
        ('{"name": "Ada"} and so on', "it is not JSON: JSON is malformed: trailing characters (byte 17)"),
        ('{"name": NaN}', "it is not JSON: JSON is malformed: invalid character (byte 9)"),
        ('{"name": "Ada", "age": "secret"}', 'at /age: the value is not of type "integer"'),
        ('{"age": 1}', '"name" is a required property'),
        ("[" * 17 + "]" * 17, "it is more than 16 levels deep"),
        (f'{{"name": "Ada", "age": 1{"0" * 400}}}', "a number in it is out of range"),
    ],
)
async def test_problems_of_a_reply_are_described_without_its_values(schemas: Schemas, reply: str, told: str) -> None:
    assert await schemas.problem(text(PERSON), reply) == told


async def test_at_most_three_problems_are_reported_and_each_briefly(schemas: Schemas) -> None:
    wanted = text({"items": {"enum": ["x" * 5000]}})
    told = await schemas.problem(wanted, "[1, 2, 3, 4, 5]")
    assert told.count("at /") == 3
    assert len(told) < 1000


@pytest.mark.parametrize(
    "broken",
    [
        "{",
        "[]",
        "true",
        '{"type": "strin"}',
        '{"properties": {"a": {"minLength": -1}}}',
        '{"$ref": "https://example.org/schema.json"}',
        '{"$ref": "file:///etc/hostname"}',
        '{"$ref": "#/$defs/nothing"}',
        '{"pattern": "(?=a)b"}',
        '{"pattern": "("}',
        text({"pattern": "(\\w{1000}){1000}"}),
        '{"not":' * 5000 + "{}" + "}" * 5000,
        '{"not":' * 100_000 + "{}" + "}" * 100_000,
    ],
    ids=lambda broken: broken[:40],
)
async def test_an_invalid_schema_is_refused_with_its_field(schemas: Schemas, broken: str) -> None:
    with pytest.raises(NotecaseError) as refused:
        await schemas.require("agent.llm.output_schema", broken)
    assert [violation.field for violation in refused.value.violations] == ["agent.llm.output_schema"]
    assert len(refused.value.message) < 500


@pytest.mark.parametrize("fine", [text(PERSON), "{}", '{"$ref": "#"}', '{"properties": {"next": {"$ref": "#"}}}'])
async def test_a_schema_may_refer_to_itself(schemas: Schemas, fine: str) -> None:
    await schemas.require("agent.llm.output_schema", fine)
    assert await schemas.problem(fine, '{"name": "Ada"}') == ""


async def test_a_schema_that_never_ends_is_given_up_and_the_next_reply_is_judged(
    schemas: Schemas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "SECONDS", 0.3)
    assert "within 0.3 seconds" in await schemas.problem(doubling(64), "{}")
    assert await schemas.problem(text(PERSON), '{"name": "Ada"}') == ""


async def test_a_pattern_matches_in_linear_time(schemas: Schemas) -> None:
    """The pattern that stalls every matcher that backtracks, over half a megabyte."""
    reply = text("a" * 500_000 + "b")
    assert 'does not match "^(a|a)*$"' in await schemas.problem(text({"pattern": "^(a|a)*$"}), reply)


async def test_a_process_that_was_killed_is_replaced(schemas: Schemas) -> None:
    assert await schemas.problem(text(PERSON), "{}") != ""
    (worker,) = schemas._idle
    worker._process.kill()
    worker._process.wait()
    assert await schemas.problem(text(PERSON), '{"name": "Ada"}') == ""


async def test_a_question_does_not_wait_for_the_threads_that_all_share(schemas: Schemas) -> None:
    """They are busy until the answer has come."""
    answered = threading.Event()
    loop = asyncio.get_running_loop()
    shared = ThreadPoolExecutor(1)
    loop.set_default_executor(shared)
    busy = loop.run_in_executor(None, answered.wait)
    try:
        assert await schemas.problem(text(PERSON), '{"name": "Ada"}') == ""
        await schemas.require("schema", text(PERSON))
    finally:
        answered.set()
        await busy


async def test_time_in_which_the_process_had_no_turn_is_not_counted(
    schemas: Schemas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "SECONDS", 0.3)
    assert await schemas.problem(text(PERSON), '{"name": "Ada"}') == ""
    (worker,) = schemas._idle
    worker._process.send_signal(signal.SIGSTOP)
    asked = asyncio.ensure_future(schemas.problem(text(PERSON), '{"name": "Ada"}'))
    done, _ = await asyncio.wait([asked], timeout=1.0)
    worker._process.send_signal(signal.SIGCONT)
    assert not done
    assert await asked == ""
    assert [worker] == schemas._idle


async def test_a_stopped_process_is_not_blamed_on_the_schema(schemas: Schemas, monkeypatch: pytest.MonkeyPatch) -> None:
    await schemas.require("schema", "{}")
    (worker,) = schemas._idle
    worker._process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(schema, "START_SECONDS", 0.1)
    with pytest.raises(NotecaseError) as refused:
        await schemas.require("schema", "{}")
    assert ("RATE_LIMITED", 1.0) == (reason_name(refused.value.reason), refused.value.retry_after)
    assert worker.dead


async def test_callers_who_wait_are_bounded_and_runs_wait_besides(
    schemas: Schemas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "MAX_WAITING", 3)
    await schemas.require("schema", "{}")
    (worker,) = schemas._idle
    worker._process.send_signal(signal.SIGSTOP)
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(schemas.require("schema", "{}")) for _ in range(3)]
        runs = [group.create_task(schemas.problem("{}", "{}")) for _ in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(NotecaseError) as refused:
            await schemas.require("schema", "{}")
        assert reason_name(refused.value.reason) == "RATE_LIMITED"
        worker._process.send_signal(signal.SIGCONT)
    assert [None] * 3 == [task.result() for task in waiting]
    assert [""] * 5 == [task.result() for task in runs]
    await schemas.require("schema", "{}")


async def test_without_room_for_a_process_a_caller_is_refused_and_a_run_waits(
    schemas: Schemas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when no descriptor is free, or no process."""
    starts: Any = subprocess.Popen
    failing = [OSError(errno.EMFILE, "Too many open files"), OSError(errno.EAGAIN, "try again")]

    def popen(*args: Any, **options: Any) -> Any:
        if failing:
            raise failing.pop(0)
        return starts(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(NotecaseError) as refused:
        await schemas.require("schema", "{}")
    assert ("RATE_LIMITED", 1.0) == (reason_name(refused.value.reason), refused.value.retry_after)
    assert await schemas.problem("{}", "{}") == ""
    assert not failing


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list["subprocess.Popen[bytes]"]:
    """All that are started."""
    starts, made = cast(Any, subprocess.Popen), list["subprocess.Popen[bytes]"]()

    def popen(*args: Any, **options: Any) -> Any:
        made.append(starts(*args, **options))
        return made[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    return made


async def test_a_caller_who_leaves_while_a_process_starts_leaves_none_behind(
    schemas: Schemas, processes: list["subprocess.Popen[bytes]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts, starting, left = cast(Any, subprocess.Popen), asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def popen(*args: Any, **options: Any) -> Any:
        loop.call_soon_threadsafe(starting.set)
        left.wait()
        return starts(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    asked = asyncio.create_task(schemas.require("schema", "{}"))
    await starting.wait()
    asked.cancel()
    await asyncio.wait([asked])
    left.set()
    await schemas.close()
    assert asked.cancelled()
    assert [-signal.SIGKILL] == [process.returncode for process in processes]


async def test_a_run_that_is_cancelled_twice_leaves_no_process_behind(
    schemas: Schemas, processes: list["subprocess.Popen[bytes]"]
) -> None:
    await schemas.require("schema", "{}")
    processes[0].send_signal(signal.SIGSTOP)
    asked = asyncio.create_task(schemas.problem("{}", "{}"))
    for _ in range(2):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        asked.cancel()
    await asyncio.wait([asked])
    await schemas.close()
    assert asked.cancelled()
    assert [-signal.SIGKILL] == [process.returncode for process in processes]


def test_a_process_whose_server_was_killed_ends_in_the_middle_of_a_question() -> None:
    """It would never see that its input has ended."""
    program = "from notecase_server.engine import schema_worker as worker; worker.LAST_SECONDS = 1; worker.main()"
    question = json.dumps({"schema": doubling(64), "reply": "{}"}) + "\n"
    done = subprocess.run([sys.executable, "-c", program], input=question.encode(), capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGALRM, b"")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(JSON)
def test_a_reply_is_kept_as_the_values_that_it_has(document: Any) -> None:
    kept = from_value(value_of(text(document)))
    assert kept == document
    assert sorted(repr(kept)) == sorted(repr(document)), "1, 1.0 and True differ"


def test_a_whole_number_beyond_64_bits_is_a_double() -> None:
    assert from_value(value_of("[9223372036854775807, 9223372036854775808]")) == [2**63 - 1, float(2**63)]


@given(JSON, st.sampled_from(["", " \n", "```\n", "```json\n", "\n```JSON\r\n", "```json \n"]), st.data())
def test_a_fence_is_taken_off_however_the_reply_is_cut(document: Any, fence: str, data: st.DataObject) -> None:
    """What is given out piece by piece is the JSON, and never more than that."""
    inner = text(document)
    reply = f"{fence}{inner}\n```\n" if "`" in fence else f"{fence}{inner}\n"
    cuts = sorted(data.draw(st.sets(st.integers(0, len(reply)), max_size=6)))
    unfenced = Unfenced()
    given_out = ""
    for start, end in zip([0, *cuts], [*cuts, len(reply)], strict=True):
        given_out += unfenced.feed(reply[start:end])
        assert inner.startswith(given_out.lstrip())
    assert (given_out + unfenced.end()).strip() == inner


@pytest.mark.parametrize(
    "reply", ["Here: {x}", "```python\n1\n```", "````", "`1`", "```json", "[Note: no", "{x}, no!", "(1) No."]
)
def test_other_fences_than_of_json_stay(reply: str) -> None:
    unfenced = Unfenced()
    assert unfenced.feed(reply) + unfenced.end() == reply


@pytest.mark.parametrize(
    ("reply", "left"),
    [
        ("```json\n{}\n```\nThat is all.", "{}"),
        ("```json\n{}\n``` ```", "{}\n``` ```"),
        ("```json\n{}\n```\nOr:\n```\n[]\n```", "{}\n```\nOr:\n```\n[]\n```"),
        ('```\n"`` `"\n\n \n```', '"`` `"'),
        ("a</think> b</think>\n```\n1\n```", "1"),
        ("</think>" * 2000 + "1", "1"),
        ('Here you are:\n{"a": "}"}', '{"a": "}"}'),
        ('Sure! {"a": "\\""}', '{"a": "\\""}'),
        ('{"a": {}} I hope it helps.', '{"a": {}}'),
        ('{"a": 1}\n```', '{"a": 1}'),
        ('{"a": 1}<|im_end|>', '{"a": 1}'),
        ('{"a": 1}\n{"a": 2}', '{"a": 1}\n\n{"a": 2}'),
        ('Not {"a": 1} but {"a": 2}', 'Not {"a": 1} but {"a": 2}'),
        ('It is: [{"a": 1}].', '[{"a": 1}]'),
        ('\ufeff{"a": 1}', '{"a": 1}'),
        ('``` json\n{"a": 1}\n```', '{"a": 1}'),
        ('```javascript\n{"a": 1}\n```', '{"a": 1}'),
        ('```json {"a": 1} ```', '{"a": 1}'),
        ('It is: ```json\n{"a": 1}\n```\nBye.', '{"a": 1}'),
        ('````\n{"a": 1}\n````', '{"a": 1}'),
        ('<answer>\n{"a": 1}\n</answer>', '{"a": 1}'),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 1 << 20])
def test_what_is_behind_a_fence_is_left_out_unless_another_one_is_in_it(reply: str, left: str, size: int) -> None:
    unfenced = Unfenced()
    given = [unfenced.feed(reply[start : start + size]) for start in range(0, len(reply), size)]
    assert left == "".join(given) + unfenced.end()


@pytest.mark.parametrize("reply", ["```python" + "\n" * 40_000, "```" + " " * 40_000, "x</think>y" * 4_000])
def test_what_may_be_in_front_is_held_back_for_a_while_only(reply: str) -> None:
    """What is held back in one text is copied with each piece."""
    unfenced = Unfenced()
    given, longest = "", 0
    for start in range(0, len(reply), 64):
        given += unfenced.feed(reply[start : start + 64])
        longest = max(longest, *map(len, unfenced._held), 0)
    assert longest < 17 << 10
    given += unfenced.end()
    assert given
    assert reply.rstrip().endswith(given)


@pytest.mark.parametrize("begun", ['{"a": 1}', "```json\n{}", "```json\n{}\n```\n"])
def test_what_is_held_back_is_counted_and_each_piece_is_copied_once(begun: str) -> None:
    """It takes about as long as what is given out at once, and a hundred times as long were it copied with each
    piece."""

    def seconds(unfenced: Unfenced, piece: str) -> float:
        began = time.process_time()
        for _ in range(20_000):
            unfenced.feed(piece)
        return time.process_time() - began

    plain, unfenced = Unfenced(), Unfenced()
    plain.feed('{"a": 1}')
    unfenced.feed(begun)
    before = unfenced.held
    assert seconds(unfenced, "\n") < 30 * seconds(plain, "x")
    assert 20_000 == unfenced.held - before
    assert not unfenced.end()


@pytest.mark.parametrize("piece", ['"b",', '{"a": "}"},', "[],", "["])
def test_large_json_in_one_piece_takes_few_steps(piece: str) -> None:
    def taken(number: int) -> int:
        return instructions(lambda: Unfenced().feed("[" + piece * number))

    assert taken(10) == taken(1000)


def test_space_behind_a_fence_of_something_else_is_looked_through_once() -> None:
    unfenced = Unfenced()
    given = "".join(unfenced.feed(piece) for piece in ["```python\n", *["\n"] * 300])
    assert given.startswith("```python")

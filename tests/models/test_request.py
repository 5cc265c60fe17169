"""A request as it is written, where no profile matters: choices among tools, calls of unknown tools, summaries."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from notecase import v1
from notecase_server.models import request as request_module
from notecase_server.models.contract import MANY_PARTS, MUCH_BYTES, ModelRequest, Tool, is_many, texts_of
from notecase_server.models.pieces import TEXT_LENGTH, encoded
from notecase_server.models.profiles import ROWS, Profile, Row
from notecase_server.models.request import MANY_TEXTS, body, is_large

PING = Tool("ping", "", "")
FORCED = {"type": "function", "function": {"name": "ping"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [FORCED]}}


def user(text: str) -> v1.Message:
    return v1.Message(role=v1.Message.ROLE_USER, parts=[v1.Part(text=text)])


def called(tool: str, call_id: str = "c", data: v1.ProviderData | None = None) -> v1.Message:
    call = v1.ToolCall(call_id=call_id, tool=tool, arguments="{}", outcome=v1.ToolCall.OUTCOME_FAILED, error="no")
    if data is not None:
        call.provider_data.CopyFrom(data)
    return v1.Message(role=v1.Message.ROLE_ASSISTANT, parts=[v1.Part(tool_call=call)])


def written(*messages: v1.Message, tools: tuple[Tool, ...] = (PING,), plain: bool = False, **extra: Any) -> Any:
    generation = v1.Generation(extra=json.dumps(extra) if extra else "")
    request = ModelRequest("m", "", messages or (user("Hello"),), generation, tools, plain=plain)
    return body(request, "m", Profile(), "here")


@pytest.mark.parametrize(
    ("choice", "before", "after"),
    [
        ("required", "required", "auto"),
        ("any", "any", "auto"),
        (FORCED, FORCED, "auto"),
        (ALLOWED, ALLOWED, {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [FORCED]}}),
        ({"type": "tool", "name": "ping"}, {"type": "tool", "name": "ping"}, "auto"),
        ("auto", "auto", "auto"),
        ("none", "none", "none"),
        (
            {"type": "function", "function": {"name": "pong"}},
            {"type": "function", "function": {"name": "pong"}},
            {"type": "function", "function": {"name": "pong"}},
        ),
        (7, 7, 7),
    ],
    ids=str,
)
def test_a_forced_choice_holds_until_its_call_has_a_result(choice: Any, before: Any, after: Any) -> None:
    """Otherwise the model could never reply with text. The choice applies again after the user's next message."""
    asked, answered = user("Go"), called("ping")
    assert before == written(asked, tool_choice=choice)["tool_choice"]
    assert after == written(asked, answered, tool_choice=choice)["tool_choice"]
    assert before == written(asked, answered, user("Again"), tool_choice=choice)["tool_choice"]


def test_a_choice_without_tools_is_left_out() -> None:
    assert "tool_choice" not in written(tools=(), tool_choice="auto")
    assert "tool_choice" not in written(tools=(), tool_choice="required")


def test_whether_calls_are_parallel_is_left_out_without_tools() -> None:
    """OpenAI refuses it then: an MCP server may be away, and a run's own tools are not the next one's."""
    assert "parallel_tool_calls" not in written(tools=(), parallel_tool_calls=False)
    assert written(parallel_tool_calls=False)["parallel_tool_calls"] is False


@pytest.mark.parametrize("system", ["first", "each"])
def test_a_system_message_in_a_user_s_name_stays_where_it_was(system: Any) -> None:
    parts = [v1.Part(file=v1.FileUri(uri="https://images.example/a.png", media_type="image/png"))]
    said = [v1.Message(role=v1.Message.ROLE_USER, parts=parts), called("ping"), v1.Message(role=v1.Message.ROLE_SYSTEM)]
    said[2].parts.add(text="Hurry.")
    request = ModelRequest("m", "Be brief.", said, v1.Generation())
    made = body(request, "m", Profile(system=system, system_role="user", after_tool="user"), "p")["messages"]
    first = "Be brief.\n\nHurry." if system == "first" else "Be brief."
    assert {"type": "text", "text": first} == made[0]["content"][0]
    assert ("Hurry." == made[-1]["content"]) == (system == "each")
    assert "system" not in [message["role"] for message in made]


def test_tools_of_extra_may_be_chosen_from() -> None:
    generation = v1.Generation(extra=json.dumps({"tools": [{"type": "web_search"}], "tool_choice": "required"}))
    made = body(ModelRequest("m", "", [user("Hello")], generation), "m", Profile(), "here")
    assert "required" == made["tool_choice"]


def test_a_text_about_the_conversation_is_requested_without_settings_for_replies() -> None:
    extra: dict[str, Any] = {
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "response_format": {"type": "json_object"},
        "guided_json": {},
        "max_completion_tokens": 5,
        "stop": ["."],
        "modalities": ["audio"],
        "top_k": 40,
    }
    made = written(called("ping"), user("Sum up."), plain=True, **extra)
    left = {"model", "messages", "stream", "stream_options", "tools", "top_k"}
    assert left == set(made)


def test_blanks_alone_are_not_text() -> None:
    """Anthropic and those before it refuse a message of nothing else."""
    blank = called("ping")
    blank.parts.insert(0, v1.Part(text="\n\n"))
    blank.parts[1].tool_call.result.add(text=" \n")
    _, said, result = written(user("Hello"), blank)["messages"]
    assert (None, "(no output)") == (said["content"], result["content"])


@pytest.mark.parametrize("only_text", [True, False])
@pytest.mark.parametrize("role", ["USER", "ASSISTANT", "SYSTEM"])
def test_a_message_of_blanks_alone_is_left_out(role: str, only_text: bool) -> None:
    """A model may say so that it has nothing to add to the results of its calls. A user's would fail each later run."""
    blank = v1.Message(role=v1.Message.Role.Value(f"ROLE_{role}"), parts=[v1.Part(text=" \n")])
    said = [user("a"), blank, user("b")]
    request = ModelRequest("m", "", said, v1.Generation(), texts=texts_of(said) if only_text else None)
    assert ["a\n\nb"] == [message["content"] for message in body(request, "m", Profile(), "p")["messages"]]


@pytest.mark.parametrize("refusal", ["text", "member"])
def test_a_refusal_of_blanks_alone_is_left_out(refusal: Any) -> None:
    blank = v1.Message(role=v1.Message.ROLE_ASSISTANT, parts=[v1.Part(refusal=" ")])
    request = ModelRequest("m", "", [user("a"), blank, user("b")], v1.Generation())
    assert 1 == len(body(request, "m", Profile(refusal=refusal), "p")["messages"])


def test_a_part_of_blanks_alone_is_left_out() -> None:
    image = v1.Part(file=v1.FileUri(uri="https://images.example/a.png", media_type="image/png"))
    parts = [v1.Part(text=" "), image]
    asked = v1.Message(role=v1.Message.ROLE_USER, parts=parts)
    system = v1.Message(role=v1.Message.ROLE_SYSTEM, parts=[v1.Part(text=" "), v1.Part(text="\n")])
    (said,) = written(system, asked)["messages"]
    assert ["image_url"] == [part["type"] for part in said["content"]]


def test_ids_that_a_server_repeats_are_distinguished() -> None:
    data = v1.ProviderData(provider="here", model="m", call_id="call_0")
    made = written(user("a"), called("ping", "c1", data), user("b"), called("ping", "c2", data))
    ids = [call["id"] for message in made["messages"] for call in message.get("tool_calls", ())]
    answers = [message["tool_call_id"] for message in made["messages"] if message["role"] == "tool"]
    assert ids == answers == ["call_0", "fAGnJD6gb"]


@pytest.mark.parametrize("members", [b"", b"{", b"[]", b'"a"', b"\xff", b"[" * 100_000])
def test_data_that_an_import_made_up_costs_no_request(members: bytes) -> None:
    data = v1.ProviderData(provider="here", model="m", call_id="x", members=members)
    made = written(user("a"), called("ping", "c1", data))
    (call,) = made["messages"][1]["tool_calls"]
    assert {"id", "type", "function"} == set(call)


def test_data_takes_no_member_s_place() -> None:
    data = v1.ProviderData(provider="here", model="m", call_id="x", members=b'{"id":"y","function":{},"a":1}')
    (call,) = written(user("a"), called("ping", "c1", data))["messages"][1]["tool_calls"]
    assert ("x", "ping") == (call["id"], call["function"]["name"])
    reasoning = v1.Reasoning(
        text="hm", provider_data=v1.ProviderData(provider="here", model="m", members=b'{"role":"system","content":"x"}')
    )
    message = v1.Message(role=v1.Message.ROLE_ASSISTANT, parts=[v1.Part(reasoning=reasoning), v1.Part(text="Hi")])
    assert {"role": "assistant", "content": "Hi"} == written(user("a"), message, user("b"))["messages"][1]
    assert {"role": "assistant", "content": "Hi"} == written(user("a"), message)["messages"][1]


def test_a_long_history_is_written_whole() -> None:
    """Nothing of it is joined or left out by its length."""
    history = [turn for n in range(2000) for turn in (user(f"q{n}"), called("ping", f"c{n}"))]
    made = written(*history, user("Go"))
    assert 2000 * 4 + 1 == len(made["messages"])


def _texts(*said: str) -> list[v1.Message]:
    """What users and assistants said: a text that begins with "-" is the assistant's."""
    roles = {True: v1.Message.ROLE_ASSISTANT, False: v1.Message.ROLE_USER}
    return [v1.Message(role=roles[text.startswith("-")], parts=[v1.Part(text=text)]) for text in said]


@pytest.mark.parametrize("said", [("a", "-b"), ("-a", "b", "c", "-d", "-e"), ("a", "-b", "c"), ()], ids=str)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_messages_of_which_it_is_known_that_they_are_text_are_written_like_any(row: Row, said: tuple[str, ...]) -> None:
    profile = msgspec.convert(row.sets, Profile)
    request = ModelRequest("m", "Be kind.", _texts(*said), v1.Generation())
    assert body(request, "m", profile, "p") == body(request._replace(texts=said), "m", profile, "p")


def sent_as(parameters: str, schemas: Any = "open", combined: Any = "kept") -> bytes:
    request = ModelRequest("m", "", [user("Hello")], v1.Generation(), [Tool("f", "", parameters)])
    (tool,) = body(request, "m", Profile(schemas=schemas, combined=combined), "here")["tools"]
    return bytes(tool["function"]["parameters"])


@pytest.mark.parametrize(
    ("parameters", "sent"),
    [
        ('{"type":"object","properties":null,"required":null}', {"type": "object", "properties": {}}),
        ('{"type":"object","properties":[],"$defs":[]}', {"type": "object", "properties": {}}),
        ('{"type":null,"description":null}', {"type": "object", "properties": {}}),
        ('{"type":["object","null"]}', {"type": "object", "properties": {}}),
        ('{"anyOf":[{"required":["a"]}]}', {"type": "object", "anyOf": [{"required": ["a"]}]}),
        (
            '{"properties":{"required":{"default":null,"enum":null},"a":{"type":["array","null"],"items":[]}}}',
            {
                "type": "object",
                "properties": {"required": {"default": None}, "a": {"type": ["array", "null"], "items": {}}},
            },
        ),
        (
            '{"properties":{"a":{"type":"number","default":NaN,"maximum":Infinity}}}',
            {"type": "object", "properties": {"a": {"type": "number", "default": None}}},
        ),
    ],
)
def test_a_schema_is_sent_without_invalid_values_of_its_keywords(parameters: str, sent: Any) -> None:
    """Servers of tools in Go and PHP write null and [] for what is empty in them, and Python's writer has NaN."""
    assert sent == json.loads(sent_as(parameters))


@pytest.mark.parametrize("parameters", ['{"properties":null}', '{"type":["object","null"]}'])
def test_a_strict_schema_has_its_properties_whatever_was_written(parameters: str) -> None:
    sent = json.loads(sent_as(parameters, "strict"))
    assert ({}, [], False) == (sent["properties"], sent["required"], sent["additionalProperties"])


ID, SLUG = (
    {"type": "object", "properties": {name: {"type": "string"}, "kind": {"const": name}}, "required": ["kind", name]}
    for name in ("id", "slug")
)
KIND = {"anyOf": [{"const": "id"}, {"const": "slug"}]}
TEXT = {"type": "string"}
EITHER = {"type": "object", "properties": {"id": TEXT, "kind": KIND, "slug": TEXT}, "required": ["kind"]}


@pytest.mark.parametrize(
    ("parameters", "sent"),
    [
        ({"anyOf": [ID, SLUG]}, EITHER),
        ({"oneOf": [ID, SLUG], "not": {}, "title": "Pick"}, EITHER | {"title": "Pick"}),
        ({"allOf": [ID, SLUG]}, EITHER | {"required": ["id", "kind", "slug"]}),
        ({"allOf": [{"anyOf": [ID, SLUG]}]}, EITHER),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": ID}}, ID | {"$defs": {"a/b": ID}}),
        ({"anyOf": [{"$ref": "#/$defs/x"}, {"$ref": "x.json"}, 7]}, {"type": "object", "properties": {}}),
        (ID, ID),
        ({}, {"type": "object", "properties": {}}),
    ],
)
def test_what_a_tool_s_parameters_combine_at_the_top_is_merged(parameters: Any, sent: Any) -> None:
    made = json.loads(sent_as(json.dumps(parameters), combined="merged"))
    assert sent | {"required": sorted(sent.get("required", ()))} == made | {
        "required": sorted(made.get("required", ()))
    }


def test_references_without_end_are_followed_a_few_times() -> None:
    loop = {"allOf": [{"$ref": "#"}, {"$ref": "#"}], "properties": {"a": TEXT}, "required": ["a"]}
    made = json.loads(sent_as(json.dumps(loop), combined="merged"))
    assert {"type": "object", "properties": {"a": TEXT}, "required": ["a"]} == made


def test_a_schema_nested_without_end_is_sent_as_it_is() -> None:
    parameters = '{"not":' * 2000 + "{}" + "}" * 2000
    assert parameters.encode() == sent_as(parameters)


@pytest.mark.parametrize("only_text", [True, False])
@pytest.mark.parametrize("role", [v1.Message.ROLE_USER, v1.Message.ROLE_ASSISTANT])
def test_neighbours_are_joined_in_one_step(
    monkeypatch: pytest.MonkeyPatch, role: v1.Message.Role.ValueType, only_text: bool
) -> None:
    """Each step copies all of them, and a hundred of 40 KB come with one request."""
    lengths, join = list[int](), request_module._together

    def together(contents: Any) -> Any:
        lengths.append(len(contents))
        return join(contents)

    monkeypatch.setattr(request_module, "_together", together)
    said = [v1.Message(role=role, parts=[v1.Part(text=f"t{n}")]) for n in range(100)]
    said.append(user("a"))
    request = ModelRequest("m", "", said, v1.Generation(), texts=texts_of(said) if only_text else None)
    made = body(request, "m", Profile(neighbours="joined"), "here")["messages"]
    told = "\n\n".join(f"t{n}" for n in range(100))
    assert 1 == sum(message["content"].startswith(told) for message in made)
    assert [101 if role == v1.Message.ROLE_USER else 100] == lengths


def replied(parts: int) -> v1.Message:
    """A reply with a call whose result has so many parts."""
    call = v1.ToolCall(result=[v1.Part(text="x")] * parts)
    return v1.Message(role=v1.Message.ROLE_ASSISTANT, parts=[v1.Part(tool_call=call)])


@pytest.mark.parametrize(
    ("messages", "many"),
    [
        ([v1.Message(parts=[v1.Part(text="x")] * MANY_PARTS)], False),
        ([v1.Message(parts=[v1.Part(text="x")] * (MANY_PARTS // 2))] * 3, True),
        ([replied(MANY_PARTS // 2)], False),
        ([replied(MANY_PARTS // 2), replied(MANY_PARTS // 2)], True),
    ],
    ids=["parts", "too many parts", "parts of a result", "too many parts of results"],
)
def test_what_is_many_depends_on_parts_and_those_of_results(messages: Sequence[v1.Message], many: bool) -> None:
    assert is_many(messages) == many
    assert is_large(ModelRequest("m", "", messages, v1.Generation())) == many


@pytest.mark.parametrize(("texts", "many"), [(MANY_TEXTS, False), (MANY_TEXTS + 1, True)])
def test_texts_alone_are_many_later(texts: int, many: bool) -> None:
    request = ModelRequest("m", "", [user("a")] * texts, v1.Generation(), texts=["a"] * texts)
    assert many == is_large(request)
    assert is_large(request._replace(texts=None))


@pytest.mark.parametrize(("size", "much"), [(MUCH_BYTES, False), (MUCH_BYTES + 1, True)])
@pytest.mark.parametrize("only_text", [True, False])
def test_what_is_large_depends_on_the_bytes_that_are_known_of_the_messages(
    size: int, much: bool, only_text: bool
) -> None:
    request = ModelRequest("m", "", [user("a")], v1.Generation(), texts=["a"] if only_text else None, size=size)
    assert much == is_large(request)


@pytest.mark.parametrize("character", ["a", "é", "🔎", '"', "\x01"])
def test_a_long_request_is_the_same_in_pieces_of_bounded_length(
    monkeypatch: pytest.MonkeyPatch, character: str
) -> None:
    """Nothing else of the process runs while one of them is written."""
    lengths, encode = list[int](), msgspec.json.encode

    def counting(value: Any, **options: Any) -> bytes:
        texts = [one["content"] for one in value] if isinstance(value, list) else [value]
        lengths.append(sum(len(text) for text in texts if isinstance(text, str)))
        return encode(value, **options)

    image = v1.Part(data=v1.InlineData(data=b"\x89PNG" * 1000, media_type="image/png"))
    shorter = [user(character * (TEXT_LENGTH // 3))] * 7
    said = [user(character * (TEXT_LENGTH + 7)), user("short"), v1.Message(role=v1.Message.ROLE_USER, parts=[image])]
    said = [*shorter, *said, *shorter]
    made = body(ModelRequest("m", "Be kind.", said, v1.Generation()), "m", Profile(), "here")
    short = b"".join(encoded(made)._pieces)
    monkeypatch.setattr(msgspec.json, "encode", counting)
    assert short == b"".join(encoded(made, long=True)._pieces)
    assert max(lengths) <= TEXT_LENGTH
    assert len(lengths) < len(said) + 3, "short ones are written together"

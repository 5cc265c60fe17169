"""Strict servers refuse as the real ones do: each is a stub over a socket that takes only what its original takes, and
what was sent is compared in full. The table of profiles holds no row that nothing needs."""

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from notecase import v1
from notecase_server.errors import NotecaseError
from notecase_server.models.contract import Call, Delta, ModelRequest, Reasoning, Returned, Text, Tool
from notecase_server.models.openai import OpenAIProvider
from notecase_server.models.profiles import NAMES, ROWS, Profile, Profiles, Row, read

from tests.support.openai_server import Answer, Json, OpenAIServer, chunk, reply, stream

USER, ASSISTANT, SYSTEM = v1.Message.ROLE_USER, v1.Message.ROLE_ASSISTANT, v1.Message.ROLE_SYSTEM
MADE = "ObdqNCxFm"
"""The id that is made for the call `call-0`."""
SCHEMA = '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}'
WORDS = f"Reply only with JSON that matches this JSON Schema:\n{SCHEMA}"
BESIDE_TOOLS = f"Call tools as you need them. When you call none: {WORDS}"
PING = Tool("ping", "Pings.", '{"type":"object","properties":{"a":{"type":"string"}}}')
DECLARED = {
    "type": "function",
    "function": {
        "name": "ping",
        "description": "Pings.",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    },
}
USAGE = {"include_usage": True}
PNG = v1.Part(data=v1.InlineData(data=b"png", media_type="image/png"))
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,cG5n"}}
MADE_PNG = v1.Part(data=v1.InlineData(data=b"png", media_type="image/png", filename="image-1.png"))
MADE_LINK = v1.Part(file=v1.FileUri(uri="https://images.example/b", media_type="image/*"))
SPOKEN = v1.Part(data=v1.InlineData(data=b"wav", media_type="audio/wav", filename="audio-1.wav"))

Strict = Callable[[Json], str]
"""What a server says to a request that it refuses; empty for one that it takes."""


def said(role: v1.Message.Role.ValueType, *parts: str | v1.Part) -> v1.Message:
    return v1.Message(role=role, parts=[v1.Part(text=part) if isinstance(part, str) else part for part in parts])


def user(*parts: str | v1.Part) -> v1.Message:
    return said(USER, *parts)


def called(*results: v1.Part, times: int = 1) -> v1.Message:
    """A message with calls that no provider's data goes with."""
    calls = [
        v1.ToolCall(
            call_id=f"call-{n}",
            tool="ping",
            arguments="{}",
            outcome=v1.ToolCall.OUTCOME_SUCCEEDED,
            result=results or [v1.Part(text="pinged")],
        )
        for n in range(times)
    ]
    return said(ASSISTANT, *(v1.Part(tool_call=call) for call in calls))


def message_of(pieces: Sequence[Delta]) -> v1.Message:
    """A reply as the engine keeps it, its calls answered."""
    message = v1.Message(role=ASSISTANT, status=v1.Message.STATUS_COMPLETED)
    calls: dict[int, v1.ToolCall] = {}
    reasoning: v1.Reasoning | None = None
    for piece in pieces:
        match piece:
            case Reasoning(text):
                reasoning = reasoning or message.parts.add().reasoning
                reasoning.text += text
            case Text(text):
                message.parts.add().text = text
            case Call(key, tool, arguments):
                if key not in calls:
                    calls[key] = message.parts.add().tool_call
                    calls[key].call_id = f"call-{key}"
                    calls[key].outcome = v1.ToolCall.OUTCOME_SUCCEEDED
                    calls[key].result.add().text = "pinged"
                calls[key].tool += tool
                calls[key].arguments += arguments
            case Returned(None, data):
                reasoning = reasoning or message.parts.add().reasoning
                reasoning.provider_data.CopyFrom(data)
            case Returned(key, data) if key is not None:
                calls[key].provider_data.CopyFrom(data)
    return message


def calls(call_id: str = "aB3dE5gH7", before: Sequence[Json] = (), **members: Any) -> Answer:
    """A reply that calls a tool, in one piece."""
    call = {"index": 0, "id": call_id, "type": "function", "function": {"name": "ping", "arguments": "{}"}}
    return stream(*(chunk(delta) for delta in before), chunk({"tool_calls": [call | members]}), finish="tool_calls")


def call(call_id: str, **members: Any) -> Json:
    return {"id": call_id, "type": "function", "function": {"name": "ping", "arguments": "{}"}} | members


def calling(*made: Json, **members: Any) -> Json:
    return {"role": "assistant", "content": None, **members, "tool_calls": list(made)}


def result(call_id: str, content: str = "pinged") -> Json:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def roles(body: Json) -> str:
    return " ".join(message["role"] for message in body["messages"])


def of_calls(body: Json) -> list[Json]:
    return [call for message in body["messages"] for call in message.get("tool_calls", ())]


def mistral(body: Json) -> str:
    if "stream_options" in body:
        return "stream_options: Extra inputs are not permitted"
    if any("reasoning_content" in message for message in body["messages"]):
        return "messages: reasoning_content: Extra inputs are not permitted"
    return mistral_common(body)


def mistral_common(body: Json) -> str:
    if any(not (len(call["id"]) == 9 and call["id"].isalnum()) for call in of_calls(body)):
        return "Tool call id has to be a-z, A-Z, 0-9, with a length of 9."
    return "Unexpected role 'user' after role 'tool'" if "tool user" in roles(body) else ""


def alternating(body: Json) -> str:
    told = roles(body).replace("system ", "", 1).replace("tool assistant", "assistant")
    fine = all(one != other for one, other in zip(told.split(), told.split()[1:], strict=False))
    return (
        ""
        if fine and told.startswith("user")
        else "Conversation roles must alternate user/assistant/user/assistant/..."
    )


def system_first(body: Json) -> str:
    return "System message must be at the beginning." if "system" in roles(body)[1:] else ""


def no_prefill(body: Json) -> str:
    fine = body["messages"] and body["messages"][-1]["role"] in ("user", "tool")
    return "" if fine else "The conversation must end with a user message."


def texts(body: Json) -> str:
    fine = all(isinstance(message["content"], str) for message in body["messages"])
    return "" if fine else "invalid type: sequence, expected a string"


def anthropic(body: Json) -> str:
    empty = any(message["role"] == "tool" and not message["content"] for message in body["messages"])
    return "messages.2: content field is empty" if empty else ""


def groq(body: Json) -> str:
    for message in body["messages"]:
        for name in ("reasoning", "reasoning_content", "refusal"):
            if name in message:
                return f"for 'role:assistant' the following must be satisfied[property '{name}' is unsupported]"
    if "response_format" in body and "tools" in body:
        return "json mode cannot be combined with tool/function calling"
    return ""


def cerebras(body: Json) -> str:
    unsupported = any("reasoning_content" in message for message in body["messages"])
    return "messages.2.assistant.reasoning_content: property is unsupported" if unsupported else ""


def thinking(body: Json) -> str:
    """Those that ask for the reasoning of earlier turns, too."""
    lacking = any("tool_calls" in each and not each.get("reasoning_content") for each in body["messages"])
    return "The `reasoning_content` in the thinking mode must be passed back to the API." if lacking else ""


def deepseek(body: Json) -> str:
    if any(each["role"] == "assistant" and not each.get("reasoning_content") for each in body["messages"]):
        return "The `reasoning_content` in the thinking mode must be passed back to the API."
    if body.get("response_format", {}).get("type") == "json_schema":
        return "This response_format type is unavailable now"
    if "response_format" in body and "json" not in json.dumps(body["messages"]).lower():
        return "Prompt must contain the word 'json' in some form to use 'response_format' of type 'json_object'"
    return ""


def openrouter(body: Json) -> str:
    lacking = any("tool_calls" in each and "reasoning_details" not in each for each in body["messages"])
    return "Function call is missing a thought_signature in functionCall parts." if lacking else ""


def gemini(body: Json) -> str:
    for made in of_calls(body):
        if not made.get("extra_content", {}).get("google", {}).get("thought_signature"):
            return "Function call is missing a thought_signature in functionCall parts."
    if "response_format" in body and "tools" in body:
        return "Function calling with a response mime type: 'application/json' is unsupported"
    told = json.dumps(body.get("tools", ""))
    for name in ("$schema", "additionalProperties"):
        if f'"{name}":' in told:
            return f'Invalid JSON payload received. Unknown name "{name}": Cannot find field.'
    return ""


def openai(body: Json) -> str:
    if "max_tokens" in body:
        return "Unsupported parameter: 'max_tokens' is not supported with this model."
    for tool in body.get("tools", ()):
        if "properties" not in tool["function"]["parameters"]:
            return "Invalid schema for function 'ping': In context=(), object schema missing properties."
        for name, schema in tool["function"]["parameters"]["properties"].items():
            if schema.get("type") == "array" and "items" not in schema:
                return f"In context=('properties', '{name}'), array schema missing items"
    return ""


def flat(body: Json) -> str:
    combined = any("anyOf" in tool["function"]["parameters"] for tool in body["tools"])
    return "schema must have type 'object' and not have 'oneOf'/'anyOf'/'allOf' at the top level." if combined else ""


def images_of_users(body: Json) -> str:
    for number, message in enumerate(body["messages"]):
        if message["role"] != "user" and not isinstance(message["content"], str):
            return f"Invalid 'messages[{number}]'. Image URLs are only allowed for messages with role 'user'."
    return alternating(body)


def in_place(body: Json) -> str:
    """Not refused by anybody: what would be lost where it need not be."""
    return "" if roles(body) == "user assistant system user" else f"the order was lost: {roles(body)}"


def one_call(body: Json) -> str:
    many = any(len(message.get("tool_calls", ())) > 1 for message in body["messages"])
    return "This model only supports single tool-calls at once!" if many else ""


def no_null(body: Json) -> str:
    bad = any(not isinstance(message.get("content"), str) for message in body["messages"])
    return "Invalid 'messages' in payload: 'content' must be a string" if bad else ""


class Play(NamedTuple):
    """A request to a server, after its first reply if there is one."""

    title: str
    host: str
    strict: Strict
    expected: Mapping[str, Any]
    """The whole body, but for `model` and `stream`."""
    messages: Sequence[v1.Message] = (user("Hello"),)
    reply: Answer | None = None
    after: Sequence[v1.Message] = ()
    model: str = "m"
    tools: Sequence[Tool] = ()
    schema: str = ""
    instruction: str = ""
    generation: v1.Generation = v1.Generation()
    profile: Mapping[str, Any] = {}
    header: str = "Authorization"
    """The one that carries the key."""


HELLO: Json = {"role": "user", "content": "Hello"}
TEXT_HELLO: Sequence[Json] = [{"type": "text", "text": "Hello"}]
MORE = user("More")
THOUGHT = ({"reasoning_content": "I need "}, {"reasoning_content": "ping."})
DETAILS: Sequence[Json] = (
    {"reasoning_details": [{"type": "reasoning.text", "text": "I need ", "index": 0}]},
    {"reasoning_details": [{"type": "reasoning.text", "text": "ping.", "signature": "c2ln", "index": 0}]},
    {"reasoning_details": [{"type": "reasoning.encrypted", "data": "ZW5j", "id": "aB3dE5gH7", "index": 1}]},
)
SIGNED: dict[str, Any] = {"extra_content": {"google": {"thought_signature": "c2ln"}}}
UNSIGNED: dict[str, Any] = {"extra_content": {"google": {"thought_signature": "skip_thought_signature_validator"}}}
NESTED = Tool(
    "ping",
    "",
    '{"$schema":"x","type":"object","properties":{"examples":{"type":"array","examples":[1]},'
    '"b":{"type":"object","additionalProperties":false}},"additionalProperties":false}',
)

PLAYS = [
    Play(
        "neighbouring users, a reply that failed between them",
        "",
        alternating,
        {"messages": [{"role": "user", "content": "Hello\n\nAgain"}], "stream_options": USAGE},
        [user("Hello"), said(ASSISTANT, ""), user("Again")],
    ),
    Play(
        "neighbouring replies, the first of them half",
        "",
        alternating,
        {
            "messages": [
                HELLO,
                {"role": "assistant", "content": "The ans\n\nThe answer."},
                {"role": "user", "content": "More"},
            ],
            "stream_options": USAGE,
        },
        [user("Hello"), said(ASSISTANT, "The ans"), said(ASSISTANT, "The answer."), MORE],
    ),
    Play(
        "a reply at the beginning, behind a system message",
        "",
        alternating,
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Begin."},
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": "More"},
            ],
            "stream_options": USAGE,
        },
        [said(SYSTEM, "Be brief."), said(ASSISTANT, "Hi"), MORE],
    ),
    Play(
        "a system message in the middle",
        "",
        system_first,
        {
            "messages": [
                {"role": "system", "content": "Be kind.\n\nBe brief."},
                {"role": "user", "content": "Hello\n\nMore"},
            ],
            "stream_options": USAGE,
        },
        [user("Hello"), said(SYSTEM, "Be brief."), MORE],
        instruction="Be kind.",
    ),
    Play(
        "a request that would end with half a reply",
        "",
        no_prefill,
        {
            "messages": [HELLO, {"role": "assistant", "content": "The ans"}, {"role": "user", "content": "Continue."}],
            "stream_options": USAGE,
        },
        [user("Hello"), said(ASSISTANT, "The ans")],
    ),
    Play(
        "an instruction alone",
        "",
        no_prefill,
        {
            "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Continue."}],
            "stream_options": USAGE,
        },
        [],
        instruction="Be kind.",
    ),
    Play(
        "several texts of one message, and a file of text",
        "",
        texts,
        {"messages": [{"role": "user", "content": "One\n\na.txt:\nTwo"}], "stream_options": USAGE},
        [user("One", v1.Part(data=v1.InlineData(data=b"Two", media_type="text/plain", filename="a.txt")))],
    ),
    Play(
        "a result without text",
        "",
        anthropic,
        {"messages": [HELLO, calling(call(MADE)), result(MADE, "(no output)")], "stream_options": USAGE},
        [user("Hello"), called(v1.Part(text=""))],
    ),
    Play(
        "an image as a result, then a word of the user",
        "",
        mistral_common,
        {
            "messages": [
                HELLO,
                calling(call(MADE)),
                result(MADE, "Its content follows."),
                {"role": "assistant", "content": "I have the result."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "From the result of ping:"},
                        IMAGE,
                        {"type": "text", "text": "More"},
                    ],
                },
            ],
            "stream_options": USAGE,
        },
        [user("Hello"), called(PNG), MORE],
    ),
    Play(
        "reasoning within a turn, its own id and members of its own",
        "",
        thinking,
        {
            "messages": [
                HELLO,
                calling(call("functions.ping:0", **SIGNED), reasoning_content="I need ping."),
                result("functions.ping:0"),
            ],
            "stream_options": USAGE,
        },
        reply=calls("functions.ping:0", THOUGHT, **SIGNED),
    ),
    Play(
        "reasoning of an earlier turn stays out",
        "",
        cerebras,
        {
            "messages": [
                HELLO,
                calling(call("aB3dE5gH7")),
                result("aB3dE5gH7"),
                {"role": "assistant", "content": "I have the result."},
                {"role": "user", "content": "More"},
            ],
            "stream_options": USAGE,
        },
        reply=calls(before=THOUGHT),
        after=[MORE],
    ),
    Play(
        "images and sound of a reply in words",
        "",
        images_of_users,
        {
            "messages": [
                HELLO,
                {"role": "assistant", "content": "One\n[image/png: image-1.png]\nTwo\n[image/*]"},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "[audio/wav: audio-1.wav]"},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": "More"},
            ],
            "stream_options": USAGE,
        },
        [
            user("Hello"),
            said(ASSISTANT, "One", MADE_PNG, "Two", MADE_LINK),
            user("Hello"),
            said(ASSISTANT, SPOKEN),
            user("Hello"),
            said(ASSISTANT, "Hi", SPOKEN),
            MORE,
        ],
    ),
    Play(
        "the newest images that an image model made, behind their reply",
        "",
        images_of_users,
        {
            "messages": [
                HELLO,
                {"role": "assistant", "content": "One"},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Two"},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "From your reply:"},
                        IMAGE,
                        {"type": "image_url", "image_url": {"url": "https://images.example/b"}},
                        {"type": "text", "text": "Hello"},
                    ],
                },
                {"role": "assistant", "content": "Three"},
                {"role": "user", "content": "More"},
            ],
            "stream_options": USAGE,
        },
        [
            user("Hello"),
            said(ASSISTANT, "One", MADE_PNG),
            user("Hello"),
            said(ASSISTANT, "Two", MADE_PNG, MADE_LINK),
            user("Hello"),
            said(ASSISTANT, "Three"),
            MORE,
        ],
        model="google/gemini-2.5-flash-image-preview",
    ),
    Play(
        "an image of a reply that is nothing else",
        "",
        images_of_users,
        {
            "messages": [
                {"role": "user", "content": [*TEXT_HELLO, {"type": "text", "text": "From your reply:"}, IMAGE]}
            ],
            "stream_options": USAGE,
        },
        [user("Hello"), said(ASSISTANT, MADE_PNG)],
        model="gpt-image-1",
    ),
    Play(
        "a refusal",
        "",
        groq,
        {
            "messages": [HELLO, {"role": "assistant", "content": "I will not."}, {"role": "user", "content": "More"}],
            "stream_options": USAGE,
        },
        [user("Hello"), said(ASSISTANT, v1.Part(refusal="I will not.")), MORE],
    ),
    Play(
        "a tool without parameters, one with a list of anything",
        "",
        openai,
        {
            "messages": [HELLO],
            "stream_options": USAGE,
            "tools": [
                {"type": "function", "function": {"name": "ping", "parameters": {"type": "object", "properties": {}}}},
                {
                    "type": "function",
                    "function": {
                        "name": "pong",
                        "parameters": {"type": "object", "properties": {"l": {"type": "array", "items": {}}}},
                    },
                },
            ],
        },
        tools=[Tool("ping", "", ""), Tool("pong", "", '{"properties":{"l":{"type":"array"}},"type":"object"}')],
    ),
    *(
        Play(
            f"the limit at {host}",
            host,
            openai,
            {"messages": [HELLO], "stream_options": USAGE, "max_completion_tokens": 64},
            generation=v1.Generation(max_output_tokens=64),
            header=header,
        )
        for host, header in (
            ("api.openai.com", "Authorization"),
            ("eu.api.openai.com", "Authorization"),
            ("a.openai.azure.com", "api-key"),
            ("a.services.ai.azure.com", "api-key"),
            ("a.openai.azure.us", "api-key"),
            ("a.cognitiveservices.azure.cn", "api-key"),
        )
    ),
    Play(
        "a tool whose parameters are one of two objects",
        "api.openai.com",
        flat,
        {
            "messages": [HELLO],
            "stream_options": USAGE,
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "ping", "parameters": {"type": "object", "properties": {"a": {}, "b": {}}}},
                }
            ],
        },
        tools=[Tool("ping", "", '{"anyOf":[{"properties":{"a":{}}},{"properties":{"b":{}}}]}')],
    ),
    *(
        Play(
            f"the limit for {model} anywhere",
            "models.example",
            openai,
            {"messages": [HELLO], "stream_options": USAGE, "max_completion_tokens": 64},
            generation=v1.Generation(max_output_tokens=64),
            model=model,
        )
        for model in ("gpt-5.1", "openai/gpt-5-mini", "azure/o4-mini", "o3")
    ),
    *(
        Play(
            f"a system message in its place at {host}",
            host,
            in_place,
            {
                "messages": [
                    HELLO,
                    {"role": "assistant", "content": None, "refusal": "No."},
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "More"},
                ],
                "stream_options": USAGE,
            },
            [user("Hello"), said(ASSISTANT, v1.Part(refusal="No.")), said(SYSTEM, "Be brief."), MORE],
            header=header,
        )
        for host, header in (("api.openai.com", "Authorization"), ("a.cognitiveservices.azure.com", "api-key"))
    ),
    Play(
        "Mistral: its own id, no reasoning, no stream options",
        "api.mistral.ai",
        mistral,
        {"messages": [HELLO, calling(call("aB3dE5gH7")), result("aB3dE5gH7")]},
        reply=calls(before=THOUGHT),
    ),
    Play(
        "Mistral behind a gateway that makes ids",
        "api.mistral.ai",
        mistral,
        {"messages": [HELLO, calling(call(MADE)), result(MADE)]},
        reply=calls("chatcmpl-tool-1"),
    ),
    Play(
        "a Mistral model elsewhere",
        "",
        mistral_common,
        {"messages": [HELLO, calling(call(MADE)), result(MADE)], "stream_options": USAGE},
        reply=calls("chatcmpl-tool-1"),
        model="mistralai/Devstral-Small-2507",
    ),
    *(
        Play(
            f"reasoning over turns: {host or model}",
            host,
            deepseek if unsigned else thinking,
            {
                "messages": [
                    HELLO,
                    {"role": "assistant", "content": "Hi", **unsigned},
                    HELLO,
                    calling(call("call_00"), reasoning_content="I need ping."),
                    result("call_00"),
                    {"role": "assistant", "content": "I have the result.", **unsigned},
                    {"role": "user", "content": "More"},
                ],
                "stream_options": USAGE,
            },
            [user("Hello"), said(ASSISTANT, "Hi"), user("Hello")],
            calls("call_00", THOUGHT),
            [MORE],
            model,
        )
        for host, model, unsigned in (
            ("api.deepseek.com", "m", {"reasoning_content": " "}),
            ("", "deepseek/deepseek-v4-pro", {"reasoning_content": " "}),
            ("api.moonshot.ai", "m", {}),
            ("", "moonshotai/Kimi-K2.5", {}),
        )
    ),
    Play(
        "DeepSeek: a reply by a schema",
        "api.deepseek.com",
        deepseek,
        {
            "messages": [{"role": "system", "content": f"Be kind.\n\n{WORDS}"}, HELLO],
            "stream_options": USAGE,
            "response_format": {"type": "json_object"},
        },
        schema=SCHEMA,
        instruction="Be kind.",
    ),
    Play(
        "OpenRouter: details of reasoning, joined, over turns",
        "openrouter.ai",
        openrouter,
        {
            "messages": [
                HELLO,
                calling(
                    call("aB3dE5gH7"),
                    reasoning_details=[
                        {"type": "reasoning.text", "text": "I need ping.", "index": 0, "signature": "c2ln"},
                        {"type": "reasoning.encrypted", "data": "ZW5j", "id": "aB3dE5gH7", "index": 1},
                    ],
                ),
                result("aB3dE5gH7"),
                {"role": "assistant", "content": "I have the result."},
                {"role": "user", "content": "More"},
            ],
            "stream_options": USAGE,
        },
        reply=calls(before=DETAILS),
        after=[MORE],
    ),
    Play(
        "Gemini: its signature, and none for a call that another model made",
        "generativelanguage.googleapis.com",
        gemini,
        {
            "messages": [
                HELLO,
                calling(call(MADE, **UNSIGNED)),
                result(MADE),
                calling(call("aB3dE5gH7", **SIGNED)),
                result("aB3dE5gH7"),
            ],
            "stream_options": USAGE,
        },
        [user("Hello"), called()],
        reply=calls(**SIGNED),
    ),
    Play(
        "Gemini: keywords that it does not know, and a property of that name",
        "generativelanguage.googleapis.com",
        gemini,
        {
            "messages": [HELLO],
            "stream_options": USAGE,
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "ping",
                        "parameters": {
                            "type": "object",
                            "properties": {"examples": {"type": "array", "items": {}}, "b": {"type": "object"}},
                        },
                    },
                }
            ],
        },
        tools=[NESTED],
    ),
    *(
        Play(
            f"a schema beside tools: {host}",
            host,
            strict,
            {
                "messages": [{"role": "system", "content": BESIDE_TOOLS}, HELLO],
                "stream_options": USAGE,
                "tools": [DECLARED],
            },
            tools=[PING],
            schema=SCHEMA,
        )
        for host, strict in (("us-central1-aiplatform.googleapis.com", gemini), ("api.groq.com", groq))
    ),
    *(
        Play(
            f"no reasoning back: {host}",
            host,
            strict,
            {"messages": [HELLO, calling(call("aB3dE5gH7")), result("aB3dE5gH7")], "stream_options": USAGE},
            reply=calls(before=THOUGHT),
        )
        for host, strict in (("api.groq.com", groq), ("api.cerebras.ai", cerebras))
    ),
    *(
        Play(
            f"content beside calls: {name}",
            "",
            no_null,
            {
                "messages": [HELLO, calling(call(MADE)) | {"content": ""}, result(MADE)],
                "stream_options": USAGE,
            },
            [user("Hello"), called()],
            profile={"profile": name},
        )
        for name in ("lmstudio", "mlx")
    ),
    Play(
        "one call at once",
        "",
        one_call,
        {
            "messages": [
                HELLO,
                calling(call(MADE)),
                result(MADE),
                calling(call("4LQcRUwlY")),
                result("4LQcRUwlY"),
            ],
            "stream_options": USAGE,
            "tools": [DECLARED],
            "parallel_tool_calls": False,
        },
        [user("Hello"), called(times=2)],
        tools=[PING],
        profile={"profile": "llama-template"},
    ),
    Play(
        "everything overridden",
        "",
        lambda body: "",
        {
            "messages": [
                {"role": "developer", "content": "Be kind."},
                {"role": "assistant", "reasoning_content": "", "tool_calls": [call(MADE)]},
                result(MADE, "nothing"),
                {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]},
                {"role": "user", "content": "More"},
                {"role": "assistant", "content": "Half", "reasoning_content": ""},
            ],
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "ping",
                        "description": "Pings.",
                        "parameters": {
                            "type": "object",
                            "properties": {"a": {"type": "string"}},
                            "additionalProperties": False,
                            "required": ["a"],
                        },
                        "strict": True,
                    },
                }
            ],
        },
        [called(v1.Part(text="")), user("One", "Two"), MORE, said(ASSISTANT, "Half")],
        instruction="Be kind.",
        tools=[PING],
        schema="",
        profile={
            "system_role": "developer",
            "neighbours": "apart",
            "text": "list",
            "empty_content": "absent",
            "empty_result": "nothing",
            "after_tool": "user",
            "first": "any",
            "last": "any",
            "unsigned_reply": {"reasoning_content": ""},
            "stream_options": False,
            "schemas": "strict",
        },
    ),
]


async def played(play: Play, monkeypatch: pytest.MonkeyPatch, rows: Sequence[Row] = ROWS) -> tuple[str, Json]:
    """What a server said to a request, and the request."""
    server = OpenAIServer(lambda body: reply("Hi") if not play.strict(body) else _refusal(play.strict(body)))
    async with server:
        monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
        url = f"http://{play.host}/v1" if play.host else server.url
        provider = OpenAIProvider("key", url, play.model, profile=play.profile, rows=rows)
        request = ModelRequest(
            play.model, play.instruction, play.messages, play.generation, play.tools, output_schema=play.schema
        )
        try:
            if play.reply is not None:
                server.script(play.reply)
                made = message_of([piece async for piece in provider.stream(request)])
                request = request._replace(messages=[*play.messages, made, *play.after])
            seen = len(server.requests)
            try:
                async for _ in provider.stream(request):
                    pass
            except NotecaseError as error:
                return error.message, server.requests[seen]
            headers = server.received[seen].headers
            keys = [name for name in ("Authorization", "api-key") if name in headers]
            return "" if keys == [play.header] else f"the key came as {keys}", server.requests[seen]
        finally:
            await provider.close()


def _refusal(words: str) -> Answer:
    body = {"error": {"message": words, "type": "invalid_request_error", "param": None, "code": None}}
    return Answer((json.dumps(body).encode(),), 400, {"Content-Type": "application/json"})


class Thought(NamedTuple):
    """A reply that begins with reasoning in tags, and who gives it."""

    host: str
    model: str
    opens: str = "<think>"
    closes: str = "</think>"


THOUGHTS = [
    *(Thought(host, "m") for host in ("localhost", "vllm", "10.1.2.3", "192.168.0.9", "172.31.0.1", "gpu.internal")),
    Thought("models.example", "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"),
    Thought("models.example", "deepseek-r1:8b"),
    Thought("generativelanguage.googleapis.com", "gemini-3-pro", "<thought>", "</thought>"),
    Thought("api.minimax.io", "m"),
    Thought("api.minimaxi.com", "m"),
    Thought("models.example", "MiniMaxAI/MiniMax-M2.5", "<thinking>", "</thinking>"),
    Thought("api.groq.com", "qwen/qwen3-32b"),
    Thought("api.cerebras.ai", "qwen-3-32b"),
    Thought("models.example", "Qwen/QwQ-32B"),
    Thought("models.example", "THUDM/GLM-Z1-32B-0414"),
    Thought("models.example", "zai-org/GLM-4.1V-9B-Thinking"),
    Thought("models.example", "mistralai/Magistral-Small-2509", "[THINK]", "[/THINK]"),
    Thought("models.example", "moonshotai/Kimi-VL-A3B-Thinking", "◁think▷", "◁/think▷"),
    Thought("models.example", "ByteDance-Seed/Seed-OSS-36B-Instruct", "<seed:think>", "</seed:think>"),
    Thought("models.example", "swiss-ai/Apertus-70B", "<|inner_prefix|>", "<|inner_suffix|>"),
    Thought(
        "models.example",
        "mlx-community/gpt-oss-20b-MXFP4-Q8",
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    Thought("models.example", "RekaAI/reka-flash-3", "<reasoning>", "</reasoning>"),
    Thought("api.perplexity.ai", "sonar-reasoning-pro"),
    Thought("models.example", "perplexity/sonar-deep-research"),
]

SPOKEN_TAGS = [
    Thought("api.openai.com", "gpt-5.5"),
    Thought("models.example", "m"),
    Thought("8.8.8.8", "m"),
    Thought("172.32.0.1", "m"),
    Thought("api.anthropic.com", "claude-sonnet-4-5"),
    Thought("openrouter.ai", "qwen/qwen-2.5-72b-instruct"),
    Thought("api.deepseek.com", "deepseek-v4-pro"),
]
"""Whose text may begin with a tag, since they tell their reasoning elsewhere."""


async def thought(
    play: Thought, monkeypatch: pytest.MonkeyPatch, rows: Sequence[Row] = ROWS, schema: str = ""
) -> tuple[str, str]:
    """The reasoning and the text of the reply."""
    async with OpenAIServer() as server:
        monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
        server.script(reply(f"{play.opens}\nhm {{\n{play.closes}\n\n{{}}", chunks=9))
        provider = OpenAIProvider("key", f"http://{play.host}/v1", play.model, rows=rows)
        request = ModelRequest("", "", [user("Hello")], v1.Generation(), output_schema=schema)
        pieces = [piece async for piece in provider.stream(request)]
        await provider.close()
    return (
        "".join(piece.text for piece in pieces if isinstance(piece, Reasoning)),
        "".join(piece.text for piece in pieces if isinstance(piece, Text)),
    )


@pytest.mark.parametrize("play", THOUGHTS, ids=lambda play: f"{play.host} {play.model}")
@pytest.mark.parametrize("schema", ["", SCHEMA], ids=["text", "json"])
async def test_reasoning_in_tags_is_separated(play: Thought, schema: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before requested JSON."""
    assert ("\nhm {\n", "{}") == await thought(play, monkeypatch, schema=schema)


@pytest.mark.parametrize("play", SPOKEN_TAGS, ids=lambda play: f"{play.host} {play.model}")
async def test_others_say_what_they_say(play: Thought, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ("", "<think>\nhm {\n</think>\n\n{}") == await thought(play, monkeypatch)


async def test_an_operator_says_of_any_server_that_it_thinks_in_tags() -> None:
    assert Profiles("models.example", read('{"think_tags": true}')).of("m").think_tags
    assert not Profiles("localhost", read('{"think_tags": false}')).of("qwen3:8b").think_tags


@pytest.mark.parametrize("play", PLAYS, ids=lambda play: play.title)
async def test_a_strict_server_takes_the_request(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    refused, sent = await played(play, monkeypatch)
    assert ("", {"model": play.model, "stream": True, **play.expected}) == (refused, sent)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name}-{'-'.join(row.sets)}")
async def test_no_row_can_be_spared(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it some play ends in another way. A play whose profile stays the same is not played."""
    rows = [other for other in ROWS if other is not row]
    for play in PLAYS:
        if _profile(play, rows) != _profile(play, ROWS):
            refused, sent = await played(play, monkeypatch, rows)
            if ("", {"model": play.model, "stream": True, **play.expected}) != (refused, sent):
                return
    for told in THOUGHTS:
        profiles = [Profiles(told.host, {}, held).of(told.model) for held in (rows, ROWS)]
        if profiles[0] != profiles[1] and ("\nhm {\n", "{}") != await thought(told, monkeypatch, rows):
            return
    raise AssertionError("no play needs the row")


def _profile(play: Play, rows: Sequence[Row]) -> Profile:
    return Profiles(play.host, play.profile, rows).of(play.model)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name}-{'-'.join(row.sets)}")
def test_each_row_tells_where_it_is_from_and_sets_what_there_is(row: Row) -> None:
    assert row.source
    assert Profiles("", {"profile": row.name}, [row]).of("") != Profiles("").of("")


@pytest.mark.parametrize(
    ("host", "header"),
    [("a.openai.azure.com", "api-key"), ("a.services.ai.azure.com", "api-key"), ("models.example", "Authorization")],
)
async def test_azure_takes_the_key_in_a_header_and_a_version_in_the_query(
    host: str, header: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with OpenAIServer() as server:
        server.script(reply("Hi"))
        monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
        provider = OpenAIProvider("key", f"http://{host}/v1?api-version=2024-10-21", "m")
        await anext(provider.stream(ModelRequest("", "", [user("Hello")], v1.Generation())))
        await provider.close()
        (received,) = server.received
        told = {name: received.headers.get(name) for name in ("Authorization", "api-key")}
        expected = {"Authorization": None, "api-key": None}
        assert expected | {header: "key" if header == "api-key" else "Bearer key"} == told
        assert "api-version=2024-10-21" == received.query


@pytest.mark.parametrize("host", ["a.openai.azure.com", "models.example"])
async def test_the_key_does_not_follow_to_another_host(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with OpenAIServer(lambda body: reply("Hi")) as other, OpenAIServer() as server:
        target = f"{other.url}/chat/completions".replace("127.0.0.1", "localhost")
        server.script(Answer((b"",), 308, {"Location": target}))
        monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
        monkeypatch.setenv("NO_PROXY", "localhost")
        provider = OpenAIProvider("secret-1", f"http://{host}/v1", "m")
        with contextlib.suppress(NotecaseError):
            await anext(provider.stream(ModelRequest("", "", [user("Hello")], v1.Generation())))
        await provider.close()
        assert 1 == len(server.received)
        assert [] == other.received


@pytest.mark.parametrize("key", ["", "another-s3cret-key"])
async def test_the_query_of_an_address_is_never_shown(key: str) -> None:
    """A provider may name the address that it does not have."""
    async with OpenAIServer(lambda body: _refusal("Invalid URL (POST /v1/completions?key=query-5ecret-1)")) as server:
        provider = OpenAIProvider(key, f"{server.url}?key=query-5ecret-1&api-version=1", "m")
        with pytest.raises(NotecaseError) as caught:
            await anext(provider.stream(ModelRequest("", "", [user("Hello")], v1.Generation())))
        await provider.close()
        assert "key=query-5ecret-1&api-version=1" == server.received[0].query
    assert "key=[key]" in caught.value.message
    assert "5ecret" not in str(caught.value.to_proto())


async def test_a_model_that_extra_names_has_its_own_profile_and_gets_its_data_back() -> None:
    async with OpenAIServer() as server:
        server.script(calls("own-1"), reply("Hi"))
        provider = OpenAIProvider("key", server.url, "m")
        generation = v1.Generation(extra='{"model": "gpt-5-mini"}', max_output_tokens=9)
        request = ModelRequest("other", "", [user("Hello")], generation)
        called = message_of([piece async for piece in provider.stream(request)])
        assert [piece async for piece in provider.stream(request._replace(messages=[*request.messages, called]))]
        await provider.close()
        assert ["gpt-5-mini"] * 2 == [sent["model"] for sent in server.requests]
        assert (["own-1"], 9) == (
            [made["id"] for made in of_calls(server.requests[1])],
            server.requests[1]["max_completion_tokens"],
        )


def table_of_providers() -> dict[str, list[list[str]]]:
    """The lines of the guide's table, by profile."""
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    table = guide.partition("| Provider | Profile | Found by | Sets | Tested with stubs |\n")[2].partition("\n\n")[0]
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()[1:]]
    found: dict[str, list[list[str]]] = {}
    for line in lines:
        provider, profile, *rest = (cell.strip() for cell in line)
        found.setdefault(profile.strip("`"), []).append([provider, *rest])
    return found


def test_the_guide_has_a_line_for_each_profile_and_each_says_what_was_played() -> None:
    table = table_of_providers()
    assert set(NAMES) == set(table)
    assert {1} == {len(lines) for name, lines in table.items() if name != "default"}
    assert all(provider and played for lines in table.values() for provider, _, _, played in lines)


@pytest.mark.parametrize("name", sorted({row.name for row in ROWS}))
def test_the_guide_says_of_a_profile_how_it_is_found_and_what_it_sets(name: str) -> None:
    rows = [row for row in ROWS if row.name == name]
    ((_, found_by, sets, _),) = table_of_providers()[name]
    by = [kind for kind in ("host", "model") if any(getattr(row, kind) for row in rows)]
    assert (by or ["name"]) == found_by.split(", ")
    assert {member for row in rows for member in row.sets} == set(re.findall(r"`(\w+)`", sets))


class TestChoice:
    """What an operator may choose."""

    def test_a_name_an_object_or_a_file(self, tmp_path: Any) -> None:
        file = tmp_path / "profile.json"
        file.write_text('{"profile": "mistral", "text": "list"}')
        assert {"profile": "groq"} == read("groq")
        assert {"call_ids": "nine"} == read('{"call_ids": "nine"}')
        assert {"profile": "mistral", "text": "list"} == read(str(file))
        assert {} == read("")

    def test_a_named_profile_replaces_that_of_host_and_model(self) -> None:
        assert Profile() == Profiles("api.mistral.ai", {"profile": "default"}).of("mistral-small")
        chosen = Profiles("models.example", {"profile": "mistral", "text": "list"}).of("m")
        assert ("nine", "none", "list") == (chosen.call_ids, chosen.reasoning, chosen.text)

    def test_an_override_is_added_to_what_host_and_model_imply(self) -> None:
        chosen = Profiles("API.Groq.com", {"text": "list"}).of("m")
        assert ("none", "list") == (chosen.reasoning, chosen.text)

    @pytest.mark.parametrize(
        ("choice", "told"),
        [
            ("mistrall", "is not a profile"),
            ("no/such/file.json", "is not a profile"),
            ("\0", "is not a profile"),
            ("{", "cannot be used"),
            ("[1]", "is not a profile"),
            ('{"text": "lists"}', r"\$.text"),
            ('{"texts": "list"}', "unknown field `texts`"),
            ('{"stream_options": 1}', r"\$.stream_options"),
            ('{"profile": "mistrall"}', "there is no built-in profile 'mistrall'"),
            ('{"profile": 1}', "there is no built-in profile 1"),
        ],
    )
    def test_an_invalid_profile_is_reported(self, choice: str, told: str) -> None:
        with pytest.raises(ValueError, match=told):
            read(choice)

    def test_models_beyond_a_handful_cost_no_memory(self) -> None:
        profiles = Profiles("")
        for number in range(10_000):
            assert Profile() == profiles.of(f"m{number}")
        assert len(profiles._made) <= 256

    def test_names_are_listed_in_order(self) -> None:
        assert sorted({"default", *(row.name for row in ROWS)}) == list(NAMES)

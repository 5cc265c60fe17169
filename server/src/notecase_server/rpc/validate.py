"""Checks whole messages of requests before anything else happens, field by field, and reports all mistakes at once.
Every function takes the path of the message as `field` or `at`.

Whether a request may be carried out at this moment is not checked here.
"""

import math
import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence

from notecase import v1

from notecase_server import names
from notecase_server.auth import rights
from notecase_server.engine.content import MAX_MESSAGE_BYTES, MAX_PART_BYTES, is_large
from notecase_server.engine.summary import BATCH, KEEP_RECENT
from notecase_server.names import RunName
from notecase_server.rpc.caller import caller
from notecase_server.rpc.check import (
    MAX_LABELS,
    MAX_NAME,
    MAX_RESULT_BYTES,
    MAX_TEXT_BYTES,
    Check,
    in_seconds,
    is_json_object,
)
from notecase_server.store.contract import PAGE_BYTES
from notecase_server.tools import naming
from notecase_server.tools.contract import Toolbox

MAX_MESSAGES = 100
MAX_PARTS = 1000
"""Parts of a message or result."""
MAX_ALL_PARTS = 2000
"""Parts of all messages of one request: each takes some 5 microseconds to look at and to take in."""
MAX_ALL_LABELS = 1000
"""Labels of all messages of one request."""
MAX_OPS = 1000
MAX_CHUNK_BYTES = 1 << 20
MAX_FALLBACKS = 8
MAX_TOOLS = 128
"""What providers take in one request."""
MAX_MCP_NAMES = 1000
"""Names of MCP servers' tools that one agent lists: each takes some 2 microseconds to look at."""
MAX_CLIENT_TOOLS_BYTES = 256 << 10
"""Bytes of all client tools of a run together: every answer about the run holds them."""
MAX_RECENT = 500
"""The highest `keep_recent` and `batch`."""
MAX_BATCH_DELAY = 10.0
"""Seconds."""
MAX_STOPS = 16
"""Sequences at which a model stops."""

INPUT_ROLES = (v1.Message.ROLE_USER, v1.Message.ROLE_SYSTEM)
"""Roles of the messages that callers give to a run."""
PARTS = "text, json, file, data, blob or state_key"
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
ABSOLUTE_URI = re.compile(r"[a-z][a-z0-9+.-]*:\S")


def _user() -> str:
    """The user that the caller is bound to, by its whole name."""
    who = caller.get(None)
    return who.user if who is not None and who.principal.user else ""


def first_state(check: Check, field: str, state: Mapping[str, v1.Value]) -> None:
    """Checks keys to set in a new session."""
    few = check.few(field, state, MAX_OPS, "keys")
    if few and check.size(field, sum(value.ByteSize() for value in state.values())):
        for key, value in state.items():
            at = f"{field}[{key[:80]!r}]"
            check.key(at, key, session=True)
            check.value(at, value)


def ops(check: Check, field: str, given: Sequence[v1.StateOp], session: bool) -> None:
    """Checks operations on a state; `session` says whether it is a session's."""
    few = check(0 < len(given) <= MAX_OPS, field, f"must be 1 to {MAX_OPS} operations")
    if not few or not check.size(field, sum(op.ByteSize() for op in given)):
        return
    seen: set[str] = set()
    for index, op in enumerate(given):
        at = f"{field}[{index}]"
        check.key(f"{at}.key", op.key, session)
        check(op.key not in seen, f"{at}.key", "is named twice in one batch")
        seen.add(op.key)
        match op.WhichOneof("op"):
            case None:
                check(False, at, "has no operation; use set, remove, increment or append")
            case "set":
                check.value(f"{at}.set", op.set)
            case "append":
                check.value(f"{at}.append", op.append, depth=2)


def messages(
    check: Check, field: str, given: Sequence[v1.Message], roles: Collection[v1.Message.Role.ValueType]
) -> None:
    if len(given) > MAX_MESSAGES:
        check.few(field, given, MAX_MESSAGES, "messages")
        return
    given = given[:]  # each access to a repeated field creates its messages again
    parts = labels = 0
    for message in given:
        parts += min(len(message.parts), MAX_PARTS + 1)
        labels += len(message.labels)
    if parts > MAX_ALL_PARTS:
        check(False, field, f"has more than {MAX_ALL_PARTS} parts in all")
    elif labels > MAX_ALL_LABELS:
        check(False, field, f"has more than {MAX_ALL_LABELS} labels in all")
    else:
        for index, message in enumerate(given):
            _message(check, f"{field}[{index}]", message, roles)


def _message(check: Check, field: str, message: v1.Message, roles: Collection[v1.Message.Role.ValueType]) -> None:
    if message.role and message.role not in roles:
        known = [v1.Message.Role.Name(role) for role in roles]
        check(False, f"{field}.role", f"must be {' or '.join(known)}")
    if user := _user():
        check.own(message.author in {"", user}, f"{field}.author")
        check.own(message.role in {v1.Message.ROLE_UNSPECIFIED, v1.Message.ROLE_USER}, f"{field}.role")
    if author := message.author:
        author = author if len(author) <= MAX_NAME else ""
        speaks = names.parse_user(author) is not None or names.parse_agent(author) is not None
        check(speaks, f"{field}.author", "must be users/{user} or agents/{agent}")
    if message.labels:
        check.labels(f"{field}.labels", message.labels)
    parts = message.parts[: MAX_PARTS + 1]
    if not parts:
        check(False, f"{field}.parts", "is empty; a message needs at least one part")
    if len(parts) > MAX_PARTS:
        check.few(f"{field}.parts", parts, MAX_PARTS, "parts")
        return
    fetched, whole = 0, message.ByteSize()
    size = whole
    for part in parts:
        kind = part.WhichOneof("kind")
        if kind == "data" or (whole > MAX_PART_BYTES and kind in {"text", "json"} and is_large(part)):
            fetched += 1
            size -= part.ByteSize()
        elif kind == "state_key":
            fetched += 1
    if fetched and not check.fetches(f"{field}.parts", fetched):
        return
    if size > MAX_MESSAGE_BYTES:
        check(False, field, "is larger than 960 KiB, without the parts that become blobs")
        return
    for index, part in enumerate(parts):
        if not part.text or part.citations:
            _part(check, f"{field}.parts[{index}]", part)


def _part(check: Check, field: str, part: v1.Part) -> None:
    if part.citations:
        check(False, f"{field}.citations", "are allowed only in messages of models")
    kind = part.WhichOneof("kind")
    at = f"{field}.{kind}"
    match kind:
        case "text":
            check(part.text != "", at, "is empty")
        case "json":
            check.json(at, part.json)
        case "file":
            file, uri = part.file, part.file.uri
            if len(uri) > MAX_TEXT_BYTES or ABSOLUTE_URI.match(uri) is None:
                check(False, f"{at}.uri", "must be an absolute URI, such as https://example.org/plan.png")
            check.content(at, file)
        case "data":
            check(part.data.data != b"", f"{at}.data", "is empty")
            check.content(at, part.data)
        case "blob":
            check.blob(at, part.blob)
        case "state_key":
            check.key(at, part.state_key, session=True)
        case None:
            check(False, field, f"is empty; use {PARTS}")
        case _:
            check(False, field, f"{kind} is allowed only in messages of models; use {PARTS}")


def upload(check: Check, first: v1.UploadBlobRequest) -> None:
    """Checks the first frame of an upload."""
    check.token_id("upload_id", first.upload_id)
    check(first.offset >= 0, "offset", "is negative")
    check(first.upload_id != "" or first.offset == 0, "offset", "needs an upload_id")
    check.fields("blob", first.blob, "size_bytes", "filename")
    if first.blob.name:
        check.blob_name("blob.name", first.blob.name)
    if first.blob.media_type:
        check.media_type("blob.media_type", first.blob.media_type)


def chunk(check: Check, frame: v1.UploadBlobRequest) -> None:
    check(len(frame.chunk) <= MAX_CHUNK_BYTES, "chunk", f"has {len(frame.chunk)} bytes; at most {MAX_CHUNK_BYTES}")


def agent(check: Check, given: v1.Agent, providers: Iterable[str], toolbox: Toolbox) -> None:
    if not check.size("agent", given.ByteSize()):
        return
    check.fields("agent", given, "display_name", "description")
    check.labels("agent.labels", given.labels)
    if given.output_key:
        check.key("agent.output_key", given.output_key, session=True)
    if not check(given.HasField("llm"), "agent.llm", "is required; an agent is a model with an instruction"):
        return
    llm = given.llm
    check.fields("agent.llm", llm, "model", "output_schema")
    _providers(check, llm, [name for name in providers if name])
    check(0 <= llm.max_model_calls <= 1000, "agent.llm.max_model_calls", "must be 0 (for 10) to 1000")
    _context(check, "agent.llm.context", llm.context)
    _generation(check, "agent.llm.generation", llm.generation)
    tools(check, "agent.llm.tools", llm.tools)
    for index, tool in enumerate(llm.tools[:MAX_TOOLS]):
        at = f"agent.llm.tools[{index}]"
        if tool.HasField("server"):
            _known(check, f"{at}.server.function", "function", tool.server.function, toolbox.functions)
        elif tool.HasField("mcp"):
            _known(check, f"{at}.mcp.server", "MCP server", tool.mcp.server, toolbox.mcp_servers)


def few_of_agent(check: Check, given: v1.Agent, paths: Container[str]) -> None:
    """Checks how many labels and tools an update of those paths would copy. Raises NotecaseError INVALID_FIELD."""
    if "labels" in paths and len(given.labels) > MAX_LABELS:
        check.few("agent.labels", given.labels, MAX_LABELS, "labels")
        check.done()
    if ("llm" in paths or "llm.tools" in paths) and len(given.llm.tools) > MAX_TOOLS:
        check.few("agent.llm.tools", given.llm.tools, MAX_TOOLS, "tools")
        check.done()


def _known(check: Check, field: str, noun: str, name: str, known: Sequence[str]) -> bool:
    """Checks the name of something that the operator has configured."""
    if name in known:
        return True
    problem = f"there is no {noun} {name[:80]!r}" if name else "is missing"
    return check(False, field, f"{problem}; this server has {', '.join(known) or 'none'}")


def _providers(check: Check, llm: v1.LlmAgent, known: Sequence[str]) -> None:
    """Checks the providers of an agent. A second fallback to the same model would only repeat the call."""
    _known(check, "agent.llm.provider", "provider", llm.provider or known[0], known)
    at = "agent.llm.fallbacks"
    if not check(len(llm.fallbacks) <= MAX_FALLBACKS, at, f"has more than {MAX_FALLBACKS}"):
        return
    seen = {(llm.provider or known[0], llm.model)}
    for index, fallback in enumerate(llm.fallbacks):
        named = (fallback.provider or known[0], fallback.model)
        _known(check, f"{at}[{index}].provider", "provider", named[0], known)
        check.fields(f"{at}[{index}]", fallback, "model")
        check(named not in seen, f"{at}[{index}]", "appears twice, or is the agent's own")
        seen.add(named)


def _context(check: Check, field: str, context: v1.Context) -> None:
    check.fields(field, context, "max_messages", "max_tokens")
    if not context.HasField("summary"):
        return
    check(not context.stateless, f"{field}.summary", "cannot be set together with stateless")
    kept(check, f"{field}.summary.keep_recent", context.summary.keep_recent)
    kept(check, f"{field}.summary.batch", context.summary.batch)
    check.fields(f"{field}.summary", context.summary, "model", "instruction")
    uncovered = (context.summary.keep_recent or KEEP_RECENT) + (context.summary.batch or BATCH)
    rule = f"must be at least {uncovered}: fewer would hide messages that no summary covers yet"
    check(not 0 < context.max_messages < uncovered, f"{field}.max_messages", rule)


def kept(check: Check, field: str, number: int) -> None:
    """Checks a number of messages that are shown or left as they are."""
    check(0 <= number <= MAX_RECENT, field, f"must be 0 (for the default) to {MAX_RECENT}")


def tools(check: Check, field: str, declared: Sequence[v1.Tool], only_client: bool = False) -> None:
    if not check.few(field, declared, MAX_TOOLS, "tools"):
        return
    seen: set[str] = set()
    bounded = True
    for index, tool in enumerate(declared):
        at = f"{field}[{index}]"
        kind = tool.WhichOneof("implementation")
        unnamed = kind == "mcp" and not tool.name
        fine = unnamed or TOOL_NAME.fullmatch(tool.name) is not None
        check(fine, f"{at}.name", "must be 1 to 64 letters, digits, '_' or '-'")
        check(unnamed or tool.name not in seen, f"{at}.name", "appears twice")
        seen.add(tool.name)
        check(kind is not None, at, "has no implementation; set client, server or mcp")
        allowed = not only_client or kind == "client"
        check(allowed, at, "must be a client tool; other tools are declared by the agent")
        check.fields(at, tool, "description", "on_interrupt", "approver", "timeout")
        check.json_object(f"{at}.parameters", tool.parameters, "a JSON Schema of an object")
        few = check.few(f"{at}.mcp.tools", tool.mcp.tools, MAX_TOOLS, "names; leave it empty for all tools")
        short = all(0 < len(name) <= naming.OWN_LENGTH for name in tool.mcp.tools[:MAX_TOOLS])
        bounded &= check(short, f"{at}.mcp.tools", f"must be names of 1 to {naming.OWN_LENGTH} characters") and few
    listed = sum(len(tool.mcp.tools) for tool in declared)
    bounded &= check(listed <= MAX_MCP_NAMES, field, f"lists more than {MAX_MCP_NAMES} names of MCP servers' tools")
    if bounded:
        _mcp_names(check, field, declared)


def _mcp_names(check: Check, field: str, declared: Sequence[v1.Tool]) -> None:
    """Checks that no tool of an MCP server gets the name of another tool, as far as the declarations name them."""
    taken = {tool.name: f"{field}[{index}]" for index, tool in enumerate(declared) if not tool.HasField("mcp")}
    whole: dict[str, bool] = {}
    """Servers declared without a prefix so far, and whether with all their tools."""
    for index, tool in enumerate(declared):
        if not tool.HasField("mcp"):
            continue
        at, server, listed = f"{field}[{index}]", tool.mcp.server, len(tool.mcp.tools) > 0
        for name in naming.declared(tool):
            fine = name not in taken
            check(fine, f"{at}.mcp.tools", f"has the name {name!r}, as {taken.get(name)} has; set a prefix")
            taken.setdefault(name, at)
        if not tool.name:
            fine = server not in whole or (listed and not whole[server])
            rule = "appears twice without a prefix, so that its names appear twice; set one"
            check(fine, f"{at}.mcp.server", rule)
            whole[server] = whole.get(server, False) or not listed


def _generation(check: Check, at: str, generation: v1.Generation) -> None:
    for field in ("temperature", "top_p"):
        value = getattr(generation, field)
        check(math.isfinite(value) and value >= 0, f"{at}.{field}", "must be a number of at least 0")
    if generation.HasField("max_output_tokens"):
        check(generation.max_output_tokens > 0, f"{at}.max_output_tokens", "must be 1 or more")
    check.few(f"{at}.stop", generation.stop, MAX_STOPS, "sequences")
    for index, stop in enumerate(generation.stop[:MAX_STOPS]):
        check(0 < len(stop) <= 256, f"{at}.stop[{index}]", "must be 1 to 256 characters")
    check.fields(at, generation, "reasoning_effort")
    check.json_object(f"{at}.extra", generation.extra)


def command(check: Check, frame: v1.RunRequest) -> None:
    """Checks a command to a session other than `start`, as far as that is possible without the session."""
    match frame.WhichOneof("command"):
        case "input":
            check.fields("input", frame.input, "when")
            check(len(frame.input.messages) > 0, "input.messages", "is empty")
            messages(check, "input.messages", frame.input.messages, INPUT_ROLES)
        case "tool_result":
            _tool_result(check, "tool_result", frame.tool_result)
        case "input_response":
            _input_response(check, "input_response", frame.input_response)
        case "cancel":
            cancel(check, "cancel", frame.cancel)
        case "update_state":
            name, kind = frame.update_state.name, "session"
            if name:
                kind = check.state("update_state.name", "", name).kind
            if kind == "app":
                check.needs(rights.APP_STATE, "update_state.name")
            ops(check, "update_state.ops", frame.update_state.ops, session=kind == "session")
        case "attach":
            check(False, "command", "attach is allowed only in the first frame of a Run stream")
        case None:
            kinds = "start, input, tool_result, input_response, update_state or cancel"
            check(False, "command", f"has no command; use {kinds}")


def cancel(check: Check, field: str, given: v1.CancelCommand) -> None:
    check.fields(field, given, "mode", "reason", "call_id")


def _tool_result(check: Check, field: str, result: v1.ToolResult) -> None:
    at, parts = f"{field}.result", result.result
    check(result.call_id != "", f"{field}.call_id", "is missing")
    check.fields(field, result, "call_id", "error")
    check(not (result.error and parts), f"{field}.error", "cannot be set together with a result")
    few = check.few(at, parts, MAX_PARTS, "parts")
    if not few or not check.fetches(at, sum(part.WhichOneof("kind") in {"data", "state_key"} for part in parts)):
        return
    size = sum(part.ByteSize() for part in parts if not part.HasField("data"))
    if check(size <= MAX_RESULT_BYTES, at, f"has {size} bytes; at most {MAX_RESULT_BYTES}"):
        for index, part in enumerate(parts):
            if not part.HasField("text"):  # an empty text is a result
                _part(check, f"{at}[{index}]", part)


def _input_response(check: Check, field: str, response: v1.InputResponse) -> None:
    check(response.input_id != "", f"{field}.input_id", "is missing")
    check(response.decision != 0, f"{field}.decision", "is missing")
    check.fields(field, response, "input_id", "decision", "remember", "answer", "reason", "edited_arguments")
    if edited := response.edited_arguments:
        at = f"{field}.edited_arguments"
        check(response.decision == v1.InputResponse.DECISION_APPROVE, at, "needs DECISION_APPROVE")
        check(len(edited) > MAX_RESULT_BYTES or is_json_object(edited), at, "must be a JSON object")


def session(check: Check, field: str, given: v1.Session, labels: bool = True) -> None:
    """Checks the new values of a session; `labels` says whether they include its labels."""
    check.fields(field, given, "display_name", "expire_time")
    if labels:
        check.labels(f"{field}.labels", given.labels)
    if given.agent:
        check.agent(f"{field}.agent", given.agent)
    if given.user:
        check.user(f"{field}.user", given.user)
        check.own(_user() in {"", given.user}, f"{field}.user")
    for name in ("ttl", "idle_ttl"):
        if given.HasField(name):
            span = getattr(given, name)
            if check.duration(f"{field}.{name}", span):
                check(span.seconds > 0 or span.nanos > 0, f"{field}.{name}", "must be more than 0")
    both = given.HasField("idle_ttl") and given.HasField("ttl")
    check(not both, f"{field}.ttl", "cannot be set together with idle_ttl")


def new_session(check: Check, field: str, given: v1.Session) -> None:
    """As `session`, for one that does not exist yet."""
    session(check, field, given)
    both = given.HasField("idle_ttl") and given.HasField("expire_time")
    check(not both, f"{field}.expire_time", "cannot be set together with idle_ttl")


def start(check: Check, field: str, given: v1.StartRun) -> None:
    if given.if_session_uid:
        check.uid(f"{field}.if_session_uid", given.if_session_uid)
        check(given.session != "", f"{field}.if_session_uid", "needs a session that exists")
    if given.session:
        if not names.SESSION.fullmatch(given.session):
            check.session(f"{field}.session", given.session)
        if given.HasField("new_session"):
            check(False, f"{field}.new_session", "cannot be set together with session")
    elif given.HasField("new_session"):
        if given.new_session.name:
            check.session(f"{field}.new_session.name", given.new_session.name)
        new_session(check, f"{field}.new_session", given.new_session)
    if given.agent and not names.AGENT.fullmatch(given.agent):
        check.agent(f"{field}.agent", given.agent)
    if given.run_id:
        check.chosen_id(f"{field}.run_id", given.run_id)
    if given.state:
        first_state(check, f"{field}.state", given.state)
    if given.HasField("settings"):
        _settings(check, f"{field}.settings", given.settings)
    if (given.state or given.client_tools) and len(given.state) <= MAX_OPS and len(given.client_tools) <= MAX_TOOLS:
        held = sum(len(key.encode()) + value.ByteSize() for key, value in given.state.items())
        held += sum(tool.ByteSize() for tool in given.client_tools)
        check(held <= PAGE_BYTES, field, f"has a state and client_tools of more than {PAGE_BYTES} bytes together")
    if given.labels:
        check.labels(f"{field}.labels", given.labels)
    messages(check, f"{field}.messages", given.messages, INPUT_ROLES)
    if given.on_busy or given.if_last_sequence or given.rewind_to_sequence:
        check.fields(field, given, "on_busy", "if_last_sequence", "rewind_to_sequence")
    if given.HasField("rewind_to_sequence"):
        at = f"{field}.rewind_to_sequence"
        check(given.session != "", at, "needs a session that exists")
        waits = given.on_busy in {v1.StartRun.ON_BUSY_QUEUE, v1.StartRun.ON_BUSY_ROLLBACK}
        check(not waits, at, "needs ON_BUSY_REJECT or ON_BUSY_INTERRUPT")
    if given.HasField("options"):
        _options(check, f"{field}.options", given.options)
    if given.client_tools:
        _client_tools(check, f"{field}.client_tools", given.client_tools)
    if given.HasField("limits"):
        limits = ("timeout", "input_timeout", "max_model_calls", "max_tool_calls", "max_total_tokens")
        check.fields(f"{field}.limits", given.limits, *limits)
    if given.HasField("disconnect"):
        check.fields(f"{field}.disconnect", given.disconnect, "cancel_after")


def _client_tools(check: Check, at: str, declared: Sequence[v1.Tool]) -> None:
    check.own(not _user(), at)
    if not check.few(at, declared, MAX_TOOLS, "tools"):
        return
    size = sum(tool.ByteSize() for tool in declared)
    if check(size <= MAX_CLIENT_TOOLS_BYTES, at, f"are together larger than {MAX_CLIENT_TOOLS_BYTES} bytes"):
        tools(check, at, declared, only_client=True)


def _settings(check: Check, field: str, settings: v1.RunSettings) -> None:
    check.needs(rights.RUN_SETTINGS, field)
    if check.size(field, settings.ByteSize()):
        check.fields(field, settings, "model")
        _generation(check, f"{field}.generation", settings.generation)
        check.template(f"{field}.instruction", settings.instruction)


def _options(check: Check, field: str, options: v1.WatchOptions) -> None:
    at = f"{field}.max_batch_delay"
    if check.duration(at, options.max_batch_delay):
        delay = in_seconds(options.max_batch_delay)
        check(delay <= MAX_BATCH_DELAY, at, f"must be 0 to {MAX_BATCH_DELAY:g} seconds")


def watch(check: Check, field: str, name: str, after: int, options: v1.WatchOptions, if_session_uid: str) -> RunName:
    """Checks the name that a stream watches, and returns its session and run, "" when `name` is a session's."""
    check.uid(f"{field}if_session_uid", if_session_uid)
    check(after >= 0, f"{field}after_sequence", "is negative")
    _options(check, f"{field}options", options)
    if run := names.parse_run(name):
        return run
    like = "sessions/{session} or sessions/{session}/runs/{run}"
    return RunName(check.parsed(f"{field}name", name, names.parse_session, like) or "", "")

"""What is measured: each measure returns the values of one round, by the keys of `benchmarks.targets`.

A measure works off a fixed number of calls, so that how long it takes is the machine's doing, and warms up what it
measures once. What it needs beforehand (sessions, histories) is made outside of what is measured.
"""

import asyncio
import hashlib
import itertools
import os
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from notecase import Client, v1

from benchmarks import edge as attacks
from benchmarks import neighbours as crowds
from benchmarks import stub
from benchmarks.hostile import hostile
from benchmarks.load import CONNECTIONS, SAID, Caller, Load, WrongError, lanes
from benchmarks.neighbour import Beside, Neighbour, Times, Turns, compare, table
from benchmarks.postgres import TURNS, Database, bare, rows_written
from benchmarks.processes import Cpus, Process, running, running_server

WINDOW = 10
"""Messages of the fixed window: as many as the shortest history has, so that every model call carries the same."""

HISTORIES = (10, 1_000, 5_000)

LOGS = (100, 100_000)

IDLE_STREAMS = 500

SESSIONS_KEPT = 150

TRIMMED_SECONDS = 11
"""By then the server has given free memory back to the system, which it does every ten seconds."""

SWEPT_SECONDS = 6
"""By then the rows of the longest session have gone, also on a busy machine."""

CONTENT_BYTES = 200_000_000

KEY = "a-key-that-is-as-long-as-the-server-wants-it"
KEY_ROUNDS = 5
"""By turns with the server that asks for none."""

FILLING = 30_000
"""Messages whose pages are more than the store's caches hold."""

Values = dict[str, float]


@dataclass
class Side:
    """One server at work, and the load that is on it."""

    server: Process
    load: Caller

    async def cpu(self, work: Awaitable[object]) -> float:
        """The seconds of CPU time that the server spends on work that begins when it is awaited."""
        before = self.server.cpu()
        await work
        return self.server.cpu() - before


@dataclass
class Bench(Side):
    """The server that is measured, with what the measures need besides."""

    load: Load
    cpus: Cpus
    folder: Path
    model: Process
    floor: "Bench | None" = None
    """The same load on the least program that does the same work, see `benchmarks.floor`."""
    prepared: dict[int, str] = field(default_factory=dict)
    """The session of each length that was asked for."""
    names: Any = field(default_factory=itertools.count)
    times: Times = field(default_factory=Times)
    notes: dict[str, list[str]] = field(default_factory=dict)
    """By measure, what its last round has to say besides the table."""

    async def history(self, messages: int) -> str:
        """A session with a history of at least that length, and one of state's keys."""
        if messages not in self.prepared:
            name = await self.load.session(messages)
            await self.load.state.PutState(
                v1.PutStateRequest(name=f"{name}/state", key="mood", value=v1.Value(string_value="wary"))
            )
            self.prepared[messages] = name
        return self.prepared[messages]

    @asynccontextmanager
    async def another(self, *, offline: bool = False, key: str = "") -> AsyncIterator["Bench"]:
        """The same with a server of its own over an empty store; `offline` without the stub, with a `key` that callers
        need."""
        name = f"another-{next(self.names)}"
        model_port = None if offline else self.model.port
        async with (
            running_server(self.cpus.server, self.folder, name, model_port, key=key) as server,
            Load.connect(server.port, key) as load,
        ):
            yield Bench(server, load, self.cpus, self.folder, self.model, times=self.times)


async def tokens(side: Side) -> Values:
    """What a token costs, from the model's bytes to the caller's."""
    load = side.load
    flat, paced = await load.agent(200), await load.agent(200, pause_ms=10)
    await load.conversations(await load.new_sessions(8), 1, flat, 200, at_once=8)
    few, many = await load.new_sessions(16), await load.new_sessions(32)
    flat_out = await side.cpu(load.conversations(few, 10, flat, 200, at_once=8))
    at_pace = await side.cpu(load.conversations(many, 1, paced, 200, at_once=32))
    return {"token-flat": flat_out / (16 * 10 * 200) * 1e6, "token-paced": at_pace / (32 * 200) * 1e6}


async def turn(bench: Bench) -> Values:
    """What a turn costs whose reply is one token: two durable commits, a model call and a stream."""
    await short_turns(bench)
    await bench.load.bare_calls(200, at_once=8)
    turns = calls = 0.0
    # By turns, since one is divided by the other.
    for _ in range(6):
        turns += await short_turns(bench) / 6
        calls += await bench.cpu(bench.load.bare_calls(400, at_once=8)) / 2400
    return {"turn": turns * 1e3, "turn-in-calls": turns / calls, "call": calls * 1e6}


async def short_turns(side: Side) -> float:
    """The seconds of CPU time for a turn of one token: ten in each of eight new sessions, eight at once."""
    agent, sessions = await side.load.agent(1), await side.load.new_sessions(8)
    return await side.cpu(side.load.conversations(sessions, 10, agent, 1, at_once=8)) / 80


async def postgres(bench: Bench) -> Values:
    """What a turn costs over PostgreSQL: the server's CPU by turns with that over SQLite, the database's own, and what
    bare asyncpg takes to write as many rows."""
    database = Database(bench.cpus)
    try:
        url = await database.url()
        name = f"postgres-{next(bench.names)}"
        async with (
            running_server(bench.cpus.server, bench.folder, name, bench.model.port, store=url) as server,
            Load.connect(server.port) as load,
        ):
            side = Side(server, load)
            await short_turns(bench)
            await short_turns(side)
            turns = others = backends = 0.0
            for _ in range(6):
                others += await short_turns(bench) / 6
                before = database.cpu()
                turns += await short_turns(side) / 6
                backends += (database.cpu() - before) / TURNS / 6
        rows = await rows_written(url) / (7 * TURNS)
        least = await bare(await database.url(), round(rows))
    finally:
        database.remove()
    return {
        "postgres-turn": turns * 1e3,
        "postgres-turn-in-sqlite": turns / others,
        "postgres-database": backends * 1e3,
        "postgres-bare": least * 1e3,
        "postgres-rows": rows,
    }


async def keys(bench: Bench) -> Values:
    """What it costs that callers need a key: the same calls and tokens on a server that asks for one and on one that
    does not, by turns."""
    async with (
        bench.another() as without,
        bench.another(key=KEY) as asked,
        Load.connect(asked.server.port, await _made_key(asked)) as keyed,
    ):
        asked.load = keyed
        took = dict.fromkeys(["call", "asked-call", "token", "asked-token"], 0.0)
        for side in (without, asked):
            await side.load.bare_calls(400, at_once=8)
            await tokens(side)
        for _ in range(KEY_ROUNDS):
            for side, name in ((without, ""), (asked, "asked-")):
                agent, sessions = await side.load.agent(200), await side.load.new_sessions(8)
                took[f"{name}call"] += await side.cpu(side.load.bare_calls(1000, at_once=8))
                took[f"{name}token"] += await side.cpu(side.load.conversations(sessions, 5, agent, 200, at_once=8))
    return {
        "key-call": (took["asked-call"] - took["call"]) / (1000 * KEY_ROUNDS) * 1e6,
        "key-token": took["asked-token"] / took["token"],
    }


async def _made_key(bench: Bench) -> str:
    """A key of a developer's that the server has made."""
    async with Client(f"127.0.0.1:{bench.server.port}", token=KEY) as client:
        key = v1.Key(role=v1.Key.ROLE_DEVELOPER)
        return (await client.keys.CreateKey(v1.CreateKeyRequest(key=key))).secret


async def guesses(bench: Bench) -> Values:
    """What a caller with 1,000 wrong keys a second does to a neighbour's turns, by turns with none such."""
    alone, beside, did = list[float](), list[float](), ""
    async with bench.another(offline=True, key=KEY) as fresh:
        neighbour = Neighbour(fresh.load)
        await neighbour.prepare()
        await neighbour.take(100)
        log, env = bench.folder / "guesses.log", dict(os.environ)
        for _ in range(KEY_ROUNDS):
            alone += await neighbour.take(200)
            arguments = ("-m", "benchmarks.guesses", str(fresh.server.port))
            async with running(bench.cpus.load, log, *arguments, env=env) as caller:
                await neighbour.take(20)
                beside += await neighbour.take(200)
                did = await caller.last_words()
    bench.notes["guesses"] = [f"The last caller with wrong keys was given {did}."]
    (_, alone99), (_, beside99) = _percentiles(alone, 99), _percentiles(beside, 99)
    return {"guesses-alone": alone99 * 1e3, "guesses-beside": beside99 / alone99}


async def first_token(bench: Bench) -> Values:
    """How much later the first token comes, through the server and through the floor, than to a program that calls the
    model by itself with aiohttp. One call after the other, and the three in turn, so that other work on the machine
    delays all of them alike."""
    sides = {"": bench} if bench.floor is None else {"": bench, "floor": bench.floor}
    agents = {side: await one.load.agent(1) for side, one in sides.items()}
    sessions = {side: await one.load.new_sessions(30) for side, one in sides.items()}
    direct = list[float]()
    through = {side: list[float]() for side in sides}
    async with aiohttp.ClientSession() as client:
        for number in range(30):
            for _ in range(10):
                direct.append(await _called_directly(client, bench.model.port))
                for side, one in sides.items():
                    through[side].append(await one.load.turn(sessions[side][number], agents[side], 1))
    least = _percentiles(direct[10:])
    added = {
        side: [a - b for a, b in zip(_percentiles(times[10:]), least, strict=True)] for side, times in through.items()
    }
    values = {f"first-token-{key}": value * 1e3 for key, value in zip(("p50", "p95"), added[""], strict=True)}
    if "floor" in added:
        ours, floor = added[""], added["floor"]
        values |= {f"first-token-{key}-in-floor": a / b for key, a, b in zip(("p50", "p95"), ours, floor, strict=True)}
    return values


async def _called_directly(client: aiohttp.ClientSession, port: int) -> float:
    """The seconds until the first token of the model's answer is there."""
    asked = {"model": stub.model(1), "messages": [{"role": "user", "content": SAID}], "stream": True}
    begun = time.perf_counter()
    first, received = 0.0, b""
    async with client.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=asked) as response:
        async for data in response.content.iter_any():
            received += data
            if not first and stub.TOKEN.encode() in received:
                first = time.perf_counter() - begun
    return first


def _percentiles(values: list[float], high: int = 95) -> tuple[float, float]:
    """The median, and the percentile `high`."""
    hundredths = statistics.quantiles(values, n=100)
    return hundredths[49], hundredths[high - 1]


async def history(bench: Bench) -> Values:
    """How a turn's cost grows with the session's history."""
    load = bench.load
    values = {}
    for kind, window in (("window", WINDOW), ("whole", 0)):
        agent = await load.agent(1, window=window)
        cost = {}
        for messages in HISTORIES:
            # A turn adds two messages, which is much to the shortest and nothing to the others.
            count = 10 if messages == HISTORIES[-1] and not window else 30
            shortest = messages == HISTORIES[0]
            sessions = await load.new_sessions(count, messages) if shortest else [await bench.history(messages)] * count
            await load.turn(await bench.history(messages), agent, 1)
            cost[messages] = await bench.cpu(load.conversations(sessions, 1, agent, 1, at_once=1)) / count
        for messages in HISTORIES[1:]:
            values[f"history-{kind}-{messages}"] = cost[messages] / cost[HISTORIES[0]]
    return values


async def pages(bench: Bench) -> Values:
    """How the cost of reading little, and of a turn that is shown little, grows with the session's log."""
    load = bench.load
    costs: dict[str, list[float]] = {"state": [], "page": [], "turn": []}
    agent = await load.agent(1, window=WINDOW)
    for messages in LOGS:
        session = await bench.history(messages)
        key = v1.GetStateRequest(name=f"{session}/state", keys=["mood"])
        page = v1.ListMessagesRequest(parent=session, order_by="sequence desc")
        asked: dict[str, Callable[[], Awaitable[object]]] = {
            "state": partial(load.state.GetState, key),
            "page": partial(load.messages.ListMessages, page),
        }
        for kind, ask in asked.items():
            await lanes(4, [ask] * 50)
            costs[kind].append(await bench.cpu(lanes(4, [ask] * 400)))
        await load.turn(session, agent, 1)
        costs["turn"].append(await bench.cpu(load.conversations([session] * 30, 1, agent, 1, at_once=1)))
    return {f"log-{kind}": longest / shortest for kind, (shortest, longest) in costs.items()}


async def fork(bench: Bench) -> Values:
    """What a fork costs, of a short log, of a long one, and of a long one's beginning."""
    load = bench.load
    short, long = [await bench.history(messages) for messages in LOGS]

    async def forks(session: str, count: int, at: int | None = None) -> float:
        request = v1.ForkSessionRequest(name=session, at_sequence=at)
        return await bench.cpu(lanes(1, [partial(load.sessions.ForkSession, request)] * count)) / count

    # The turns of another measure have made the short one longer.
    await forks(short, 5, LOGS[0])
    brief, whole, early = await forks(short, 20, LOGS[0]), await forks(long, 3), await forks(long, 20, LOGS[0])
    return {"fork-short": brief * 1e3, "fork-long": whole * 1e3, "fork-early": early / brief}


async def deletion(bench: Bench) -> Values:
    """How long a write to one session waits at most while another one, long, is deleted and its rows go; and as long
    without that."""
    load = bench.load
    long = await load.sessions.ForkSession(v1.ForkSessionRequest(name=await bench.history(LOGS[-1])))
    async with _small_write(bench) as write:
        begun = time.perf_counter()
        await load.sessions.DeleteSession(v1.DeleteSessionRequest(name=long.name))
        answered = time.perf_counter() - begun
        waited = await _longest(write, _after(SWEPT_SECONDS))
        alone = await _longest(write, _after(SWEPT_SECONDS))
    return {"deletion-answer": answered * 1e3} | _waits("deletion", waited, alone)


async def copies(bench: Bench) -> Values:
    """How long a write to one session waits at most while another one, long, is forked, and while it is imported; and
    without that, for as long right afterwards."""
    load = bench.load
    long = await bench.history(LOGS[-1])
    exported = load.sessions.ExportSession(v1.ExportSessionRequest(name=long))
    file = [v1.ImportSessionRequest(chunk=piece.chunk) async for piece in exported]
    values = Values()
    asks: dict[str, Callable[[], Awaitable[v1.Session]]] = {
        "fork": lambda: load.sessions.ForkSession(v1.ForkSessionRequest(name=long)),
        "import": lambda: load.sessions.ImportSession(iter(file)),
    }
    async with _small_write(bench) as write:
        for what, ask in asks.items():
            asked, begun = asyncio.ensure_future(ask()), time.perf_counter()
            waited = await _longest(write, asked.done)
            taken = time.perf_counter() - begun
            await load.sessions.DeleteSession(v1.DeleteSessionRequest(name=(await asked).name))
            await _longest(write, _after(SWEPT_SECONDS))
            values |= _waits(what, waited, await _longest(write, _after(taken)))
    return values


def _waits(what: str, waited: float, alone: float) -> Values:
    """The longest wait during something, the longest without it, and how much longer the first is."""
    return {
        f"{what}-wait": waited * 1e3,
        f"{what}-alone": alone * 1e3,
        f"{what}-more": (waited - alone) * 1e3,
    }


@asynccontextmanager
async def _small_write(bench: Bench) -> AsyncIterator[Callable[[], Awaitable[object]]]:
    """A write to a session of its own, over a connection of its own: it does not wait for a file on its way."""
    (session,) = await bench.load.new_sessions(1)
    put = v1.PutStateRequest(name=f"{session}/state", key="mood", value=v1.Value(string_value="wary"))
    async with Load.connect(bench.server.port) as other:
        yield partial(other.state.PutState, put)


async def _longest(write: Callable[[], Awaitable[object]], until: Callable[[], bool]) -> float:
    """The seconds that the longest write takes, one after the other until that is so."""
    longest = 0.0
    while not until():
        begun = time.perf_counter()
        await write()
        longest = max(longest, time.perf_counter() - begun)
    return longest


def _after(seconds: float) -> Callable[[], bool]:
    """Whether so much time has passed from now on."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() > end


async def memory(bench: Bench) -> Values:
    """What a server holds once it has worked, and what it holds on to for a stream and for a session."""
    async with bench.another() as fresh:
        load = fresh.load
        agent = await load.agent(20)

        async def work(count: int) -> None:
            await load.conversations(await load.new_sessions(count), 10, agent, 20, at_once=8)

        await work(60)
        warm = fresh.server.resident()
        # The store's page caches fill once, and would be taken for something that each session leaves behind.
        await load.read_all(await load.session(FILLING), at_once=3)
        await work(20)
        await asyncio.sleep(TRIMMED_SECONDS)
        filled = fresh.server.resident()
        await work(SESSIONS_KEPT)
        await asyncio.sleep(TRIMMED_SECONDS)
        kept = fresh.server.resident()
        sessions = await load.new_sessions(IDLE_STREAMS)
        before = fresh.server.resident()
        streams = [await _attached(load, session, lane) for lane, session in enumerate(sessions)]
        attached = fresh.server.resident()
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*(stream.code() for stream in streams))
    _, imports = await _imports(bench)
    return {
        "memory-warm": warm / 2**20,
        "memory-over": (warm - imports) / 2**20,
        "memory-stream": (attached - before) / IDLE_STREAMS / 2**10,
        "memory-session": (kept - filled) / SESSIONS_KEPT / 2**10,
    }


async def _attached(load: Load, session: str, lane: int) -> grpc.aio.StreamStreamCall[Any, Any]:
    """A stream attached to an idle session, which has nothing to say any more."""
    call: Any = load.runs[lane % CONNECTIONS].Run()
    await call.write(v1.RunRequest(attach=v1.AttachRun(name=session, options=v1.WatchOptions(keep_open=True))))
    while not (await call.read()).batch.caught_up:
        pass
    stream: grpc.aio.StreamStreamCall[Any, Any] = call
    return stream


async def content(bench: Bench) -> Values:
    """What sending and fetching content costs, by the Python client's pieces of 1 MiB; what comes back is compared."""
    data = os.urandom(CONTENT_BYTES)
    async with bench.another() as fresh, Client(f"127.0.0.1:{fresh.server.port}") as client:
        # A turn waits for the library of the provider, which the server loads after its start.
        await fresh.load.turn(await fresh.load.session(), await fresh.load.agent(1), 1)
        await client.upload(data[: CONTENT_BYTES // 100], "application/pdf")
        before = fresh.server.peak()
        sent = await fresh.cpu(client.upload(data, "application/pdf"))
        fetched = await fresh.cpu(_fetched(client, data))
        peak = fresh.server.peak()
    hundreds = CONTENT_BYTES / 1e8
    return {
        "content-sent": sent / hundreds,
        "content-fetched": fetched / hundreds,
        "content-memory": (peak - before) / 2**20,
    }


async def _fetched(client: Client, data: bytes) -> None:
    """Fetches that content, and raises WrongError when it comes back otherwise."""
    at = 0
    async for piece in client.download(f"blobs/{hashlib.sha256(data).hexdigest()}"):
        if piece != data[at : at + len(piece)]:
            raise WrongError(f"Content differs behind byte {at}.")
        at += len(piece)
    if at != len(data):
        raise WrongError(f"Content ends at byte {at}.")


async def many(bench: Bench) -> Values:
    """How many turns go wrong when many are under way at once."""
    load = bench.load
    agent = await load.agent(50)
    wrong = {}
    for at_once in (32, 128):
        failed = 0

        async def attempt(session: str, lane: int) -> None:
            nonlocal failed
            for _ in range(2):
                try:
                    await load.turn(session, agent, 50, lane)
                except (WrongError, grpc.aio.AioRpcError):
                    failed += 1

        async with asyncio.TaskGroup() as group:
            for lane, session in enumerate(await load.new_sessions(at_once)):
                group.create_task(attempt(session, lane))
        wrong[f"errors-{at_once}"] = float(failed)
    return wrong


async def start(bench: Bench) -> Values:
    """How long it takes from the command to the first answer, over an empty store."""
    begun = time.perf_counter()
    async with bench.another() as fresh:
        await fresh.load.info[0].GetServerInfo(v1.GetServerInfoRequest(), wait_for_ready=True)
        taken, cpu = time.perf_counter() - begun, fresh.server.cpu()
    alone, _ = await _imports(bench)
    return {"start": taken, "start-cpu": cpu, "start-in-imports": cpu / alone}


async def _imports(bench: Bench) -> tuple[float, int]:
    """The CPU seconds and the bytes of a process that imports grpc and the openai SDK, and nothing else."""
    program = "import signal; import grpc, openai; print(0, flush=True); signal.pause()"
    async with running(bench.cpus.server, bench.folder / "imports.log", "-c", program, env=dict(os.environ)) as alone:
        return alone.cpu(), alone.resident()


async def loop(bench: Bench) -> Values:
    """How long one request can keep the server from all others."""
    held = await hostile(bench.cpus, bench.folder, f"hostile-{next(bench.names)}", bench.model)
    bench.notes["loop"] = [f"held the loop longest: {found}" for found in (*held.requests[:5], *held.excepted[:1])]
    return {
        "loop-held": held.requests[0].seconds * 1e3,
        "loop-parser": held.excepted[0].seconds * 1e3,
        "loop-garbage": held.garbage * 1e3,
    }


def beside_floor(measure: Callable[[Bench], Awaitable[Values]]) -> Callable[[Bench], Awaitable[Values]]:
    """The measure, and each of its values in those of the floor, which is measured right behind it."""

    async def both(bench: Bench) -> Values:
        values = await measure(bench)
        if bench.floor is None:
            return values
        floor = await measure(bench.floor)
        return values | {f"{key}-in-floor": value / floor[key] for key, value in values.items()}

    return both


async def edge(bench: Bench) -> Values:
    """What callers that speak HTTP/2 badly on purpose do to a neighbour's turn and to the server's memory."""
    described = {name: attack.described for name, attack in attacks.ATTACKS.items()}
    alone, others = await _beside(bench, "edge", attacks.prepare, described)
    return {
        "edge-alone": alone.p99 * 1e3,
        "edge-beside": max(other.turns.p99 for other in others) / alone.bound,
        "edge-memory": max(other.kept for other in others),
    }


async def neighbours(bench: Bench) -> Values:
    """What callers do whose calls are all valid, and more than a server takes."""
    described = {name: callers.described for name, callers in crowds.CALLERS.items()}
    alone, others = await _beside(bench, "neighbours", crowds.prepare, described)
    return {
        "neighbours-alone": alone.p99 * 1e3,
        "neighbours-beside": max(other.turns.p99 for other in others) / alone.bound,
    }


async def _beside(
    bench: Bench, module: str, prepare: Callable[[Load], Awaitable[None]], described: Mapping[str, str]
) -> tuple[Turns, list[Beside]]:
    """A neighbour's turns alone and beside each caller of that module, on a server of their own."""
    async with bench.another(offline=True) as fresh:
        await prepare(fresh.load)
        alone, others = await compare(
            fresh.load, fresh.server, bench.cpus.load, bench.folder, f"benchmarks.{module}", described, bench.times
        )
    bench.notes[module] = list(table(alone, others))
    return alone, others


MEASURES: dict[str, Callable[[Bench], Awaitable[Values]]] = {
    "tokens": beside_floor(tokens),
    "turn": beside_floor(turn),
    "postgres": postgres,
    "keys": keys,
    "guesses": guesses,
    "first-token": first_token,
    "history": history,
    "pages": pages,
    "fork": fork,
    "deletion": deletion,
    "copies": copies,
    "memory": memory,
    "content": content,
    "many": many,
    "start": start,
    "loop": loop,
    "edge": edge,
    "neighbours": neighbours,
}

ONCE = frozenset({"edge", "neighbours"})
"""What takes minutes, and is measured in the first round only."""

"""Creates, forks, rewinds, exports and lists sessions, and reads and writes their state."""

import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from notecase import v1
from notecase.arguments import made, shown
from notecase.errors import as_written
from notecase.names import Named, name_of, quoted
from notecase.pages import Listing, each
from notecase.retry import Retry, repeat
from notecase.values import Entry, Plain, from_value, to_value, to_values


class Sessions:
    """The part of a client for sessions and their contents. See `Client`."""

    sessions: "v1.SessionServiceAsyncStub"
    state: "v1.StateServiceAsyncStub"
    messages: "v1.MessageServiceAsyncStub"
    runs: "v1.RunServiceAsyncStub"
    _retry: Retry

    async def create_session(
        self,
        agent: str | v1.Agent | None = None,
        *,
        session_id: str = "",
        user: str | None = None,
        display_name: str = "",
        labels: Mapping[str, str] | None = None,
        state: Mapping[str, Plain] | None = None,
    ) -> v1.Session:
        """Creates a session with an initial `state`.

        Raises NotecaseError ALREADY_EXISTS when the id is taken, AGENT_NOT_FOUND when its agent is missing."""
        request = made(
            v1.CreateSessionRequest,
            session_id=session_id,
            session=made(
                v1.Session,
                agent=name_of(agent, "agents").partition("@")[0],
                user=name_of(user, "users"),
                display_name=display_name,
                labels=labels,
            ),
            state=to_values(state),
            request_id=uuid.uuid4().hex,
        )
        with as_written("session."):
            return await repeat(self._retry, lambda: self.sessions.CreateSession(request))

    async def fork(self, session: str | Named, at_sequence: int | None = None, *, session_id: str = "") -> v1.Session:
        """Creates a session with a copy of the log up to a sequence, by default the whole log, and the state as it was
        then.

        Raises NotecaseError SESSION_NOT_FOUND, SEQUENCE_AHEAD for a sequence after the head, ALREADY_EXISTS when the id
        is taken."""
        request = made(
            v1.ForkSessionRequest,
            name=name_of(session, "sessions"),
            at_sequence=at_sequence,
            session_id=session_id,
            request_id=uuid.uuid4().hex,
        )
        return await repeat(self._retry, lambda: self.sessions.ForkSession(request))

    async def rewind(self, session: str | Named, to_sequence: int) -> v1.Session:
        """Rewinds a session to a sequence: later messages are superseded, and its state is restored.

        Raises NotecaseError RUN_ACTIVE while a run is active or queued, SESSION_NOT_FOUND, SEQUENCE_AHEAD, and
        INVALID_FIELD for a sequence inside a range that was rewound before."""
        request = made(
            v1.RewindSessionRequest,
            name=name_of(session, "sessions"),
            to_sequence=to_sequence,
            request_id=uuid.uuid4().hex,
        )
        return await repeat(self._retry, lambda: self.sessions.RewindSession(request))

    async def export_session(self, session: str | Named, *, with_blobs: bool = True) -> AsyncIterator[bytes]:
        """Yields the session as a file, in chunks: `async for piece in client.export_session(name)`. Without its blobs
        it can be imported only on a server that has them.

        Raises NotecaseError SESSION_NOT_FOUND, and RUN_ACTIVE while a run is active or queued."""
        request = made(v1.ExportSessionRequest, name=name_of(session, "sessions"), with_blobs=with_blobs)
        async for response in self.sessions.ExportSession(request):
            yield response.chunk

    async def import_session(self, pieces: Iterable[bytes], *, session_id: str = "") -> v1.Session:
        """Creates a session from an exported file, given in chunks of at most 1 MiB.

        Raises NotecaseError ALREADY_EXISTS when the id is taken, IMPORT_INVALID when the file is incomplete or
        damaged."""
        header = made(v1.ImportHeader, session_id=session_id, request_id=uuid.uuid4().hex)

        async def frames() -> AsyncIterator[v1.ImportSessionRequest]:
            yield v1.ImportSessionRequest(header=header)
            for piece in pieces:
                yield v1.ImportSessionRequest(chunk=piece)

        if isinstance(pieces, bytes | str) or not isinstance(pieces, Iterable):
            raise TypeError(f"pieces must be a list or an iterator of bytes, not {shown(pieces)}")

        return await self.sessions.ImportSession(frames())

    async def get_state(self, owner: str | Named, *keys: str, at_sequence: int = 0) -> dict[str, Any]:
        """Returns state as Python values by key: of the given keys, without those that do not exist, or of all keys.

        `owner` is a session, by its id, its name or itself, or "users/{user}", or "app". With `at_sequence` a session's
        state is returned as it was then. A large state is read in pages, and may change between them. Raises
        NotecaseError SESSION_NOT_FOUND, SEQUENCE_AHEAD."""
        entries = await self.get_state_entries(owner, *keys, at_sequence=at_sequence)
        return {key: entry.value for key, entry in entries.items()}

    async def get_state_entries(self, owner: str | Named, *keys: str, at_sequence: int = 0) -> dict[str, Entry]:
        """Returns the entries of a state by key, each with its value and its version, as `get_state` does the values.

            entry = (await client.get_state_entries(session, "visits"))["visits"]
            await client.put_state(session, "visits", entry.value + 1, if_version=entry.version)

        Raises as `get_state` does."""
        request = made(v1.GetStateRequest, name=_state_of(owner), keys=keys, page_size=1000, at_sequence=at_sequence)
        entries: dict[str, Entry] = {}
        while True:
            page = await repeat(self._retry, lambda: self.state.GetState(request))
            entries.update((key, Entry(from_value(held.value), held.version)) for key, held in page.entries.items())
            request.page_token = page.next_page_token
            if not request.page_token:
                return entries

    async def put_state(
        self, owner: str | Named, key: str, value: Plain, *, if_version: int | None = None
    ) -> v1.StateEntry:
        """Sets one key of a session's state, of "users/{user}" or of "app".

        With `if_version` only if the key has that version, where 0 means that it does not exist; otherwise raises
        NotecaseError STATE_VERSION_MISMATCH with the current version in `metadata["version"]`."""
        request = made(
            v1.PutStateRequest,
            name=_state_of(owner),
            key=key,
            value=to_value(value),
            if_version=if_version,
            request_id=uuid.uuid4().hex,
        )
        return await repeat(self._retry, lambda: self.state.PutState(request))

    def list_sessions(
        self,
        filter: str = "",  # noqa: A002 - the API's word
        *,
        agent: str | v1.Agent | None = None,
        user: str | None = None,
    ) -> Listing[v1.Session]:
        """Iterates over sessions, newest first; `filter` as in `v1.ListSessionsRequest`.

        Raises NotecaseError INVALID_FIELD for a filter that cannot be read."""
        if not isinstance(filter, str):
            raise TypeError(f"filter must be a string, not {shown(filter)}")
        conditions = [f"({filter})"] if filter else []
        conditions += [f"agent = {quoted(name_of(agent, 'agents'))}"] if agent else []
        conditions += [f"user = {quoted(name_of(user, 'users'))}"] if user else []
        request = v1.ListSessionsRequest(filter=" AND ".join(conditions))
        return each(self._retry, self.sessions.ListSessions, request)

    def list_messages(self, session: str | Named, *, newest_first: bool = False) -> Listing[v1.Message]:
        """Iterates over the messages of a session, in their order. Raises NotecaseError SESSION_NOT_FOUND."""
        order = "sequence desc" if newest_first else ""
        request = v1.ListMessagesRequest(parent=name_of(session, "sessions"), order_by=order)
        return each(self._retry, self.messages.ListMessages, request)

    def list_runs(self, session: str | Named = "-", filter: str = "") -> Listing[v1.Run]:  # noqa: A002 - the API's word
        """Iterates over the runs of a session, or of all sessions, newest first; `filter` as in `v1.ListRunsRequest`.

        Raises NotecaseError SESSION_NOT_FOUND, INVALID_FIELD for a filter that cannot be read."""
        request = made(v1.ListRunsRequest, parent=name_of(session, "sessions"), filter=filter)
        return each(self._retry, self.runs.ListRuns, request)

    def waiting(self, session: str | Named = "-") -> Listing[v1.Run]:
        """Iterates over the runs that wait for a person or a caller, of one session or of all, newest first.
        `pending_inputs` and `pending_calls` say what each waits for.

            async for run in client.waiting():
                for asked in run.pending_inputs:
                    await client.deny(run, asked.input_id, "It is late.")

        Raises NotecaseError SESSION_NOT_FOUND."""
        return self.list_runs(session, "state = WAITING")


def _state_of(owner: str | Named) -> str:
    """Returns the name of a state: "app/state", or by a name with a slash; anything else is the id of a session."""
    name = name_of(owner, "" if owner == "app" else "sessions", "owner")
    return f"{name}/state"

"""The tables of a SQLite store, as they are now.

Rows lie in the order of their keys, so that the rows of one session are neighbours and each is written once. `body` is
the serialized message; the columns next to it are what lists search by. `labels` is explained in `tables`. A
session is known by its uid everywhere; only `session_names` finds it by its name. Rows of a session that has no row in
`sessions` are what is left of a deleted one, or a fork or an import under way: nobody reads them.

A commit costs the disk a page of each tree in which it changes a row, so what most commits change shares few trees: the
events with the head of their session (`logs`), all that finds rows within a session (`lookups`), the runs, and one
index over all runs.
"""

VERSION = 7
"""Number of the schema, in the file's header as user_version. Older files are converted when they are opened."""

HEAD = (1 << 63) - 1
"""The sequence of a session's head: behind every event."""

IN_ORDER, BY_ID, OF_RUN = range(3)
"""The kinds of rows in `lookups`."""

SCHEMA = (
    "CREATE TABLE store (secret BLOB NOT NULL, keyed INTEGER NOT NULL DEFAULT 0)",
    # What lists of sessions are sorted by, and what seldom changes. The session itself is its head, in `logs`.
    """CREATE TABLE sessions (
        tenant TEXT NOT NULL,
        uid TEXT NOT NULL,
        session TEXT NOT NULL,
        user TEXT NOT NULL,
        agent TEXT NOT NULL,
        display_name TEXT NOT NULL,
        create_time INTEGER NOT NULL,
        expire_time INTEGER,
        labels TEXT,
        PRIMARY KEY (tenant, uid)
    ) WITHOUT ROWID""",
    """CREATE TABLE session_names (
        tenant TEXT NOT NULL,
        session TEXT NOT NULL,
        uid TEXT NOT NULL,
        PRIMARY KEY (tenant, session)
    ) WITHOUT ROWID""",
    # A deletion takes a session's row and name away, and leaves this one until every other row is gone. A fork or an
    # import begins with it, and takes it away when it adds the session's row and name.
    """CREATE TABLE deleted_sessions (
        tenant TEXT NOT NULL,
        uid TEXT NOT NULL,
        user TEXT NOT NULL,
        PRIMARY KEY (tenant, uid)
    ) WITHOUT ROWID""",
    "CREATE INDEX sessions_by_time ON sessions (tenant, create_time, uid)",
    "CREATE INDEX sessions_by_user ON sessions (tenant, user, create_time, uid)",
    "CREATE INDEX sessions_by_expiry ON sessions (expire_time, tenant, uid) WHERE expire_time IS NOT NULL",
    # A session's events and, behind the last of them and so on its page, its head: the session, which every commit
    # changes. `message`, `run` and `step` are of events that added a message, the last four columns of the head.
    """CREATE TABLE logs (
        tenant TEXT NOT NULL,
        uid TEXT NOT NULL,
        sequence INTEGER NOT NULL,
        tells_past INTEGER NOT NULL,
        message TEXT,
        run TEXT,
        step TEXT,
        body BLOB NOT NULL,
        activity INTEGER,
        update_time INTEGER,
        epoch INTEGER,
        commits TEXT,
        PRIMARY KEY (tenant, uid, sequence)
    ) WITHOUT ROWID""",
    f"""CREATE VIEW events AS
        SELECT tenant, uid, sequence, tells_past, message, run, step, body FROM logs WHERE sequence < {HEAD}""",
    f"""CREATE VIEW heads AS
        SELECT tenant, uid, activity, update_time, epoch, commits, body FROM logs WHERE sequence = {HEAD}""",
    # Earlier states follow from the few events that changed the state or rewound.
    "CREATE INDEX events_of_past ON logs (tenant, uid, sequence) WHERE tells_past = 1",
    # Finds rows within a session as three indexes would, each a separate tree; here a small session has one page of
    # them. A message has two rows, whose keys are its sequence (IN_ORDER) and its id, which no other has (BY_ID), a run
    # one, whose key is its create_time (OF_RUN): `sequence` and `run` say where each is. Triggers add and remove these
    # rows, as SQLite does the entries of an index.
    """CREATE TABLE lookups (
        tenant TEXT NOT NULL,
        uid TEXT NOT NULL,
        kind INTEGER NOT NULL,
        key NOT NULL,
        run TEXT NOT NULL,
        sequence INTEGER,
        PRIMARY KEY (tenant, uid, kind, key, run)
    ) WITHOUT ROWID""",
    f"""CREATE TRIGGER lookups_of_messages AFTER INSERT ON logs WHEN new.message IS NOT NULL BEGIN
        INSERT INTO lookups VALUES (new.tenant, new.uid, {IN_ORDER}, new.sequence, '', new.sequence);
        INSERT INTO lookups VALUES (new.tenant, new.uid, {BY_ID}, new.message, '', new.sequence);
    END""",
    f"""CREATE TRIGGER lookups_of_deleted_messages AFTER DELETE ON logs WHEN old.message IS NOT NULL BEGIN
        DELETE FROM lookups WHERE tenant = old.tenant AND uid = old.uid
            AND kind = {IN_ORDER} AND key = old.sequence AND run = '';
        DELETE FROM lookups WHERE tenant = old.tenant AND uid = old.uid
            AND kind = {BY_ID} AND key = old.message AND run = '';
    END""",
    # A message is the event that added it, until a change gives it a separate body.
    """CREATE TABLE changed_messages (
        tenant TEXT NOT NULL,
        uid TEXT NOT NULL,
        sequence INTEGER NOT NULL,
        update_sequence INTEGER NOT NULL,
        body BLOB NOT NULL,
        PRIMARY KEY (tenant, uid, sequence)
    ) WITHOUT ROWID""",
    # What a rewind left behind: the messages between two sequences, which it superseded at its own. None overlap.
    """CREATE TABLE stretches (
        tenant TEXT NOT NULL,
        uid TEXT NOT NULL,
        after INTEGER NOT NULL,
        until INTEGER NOT NULL,
        sequence INTEGER NOT NULL,
        back INTEGER NOT NULL,
        PRIMARY KEY (tenant, uid, after)
    ) WITHOUT ROWID""",
    """CREATE TABLE calls (
        tenant TEXT NOT NULL,
        uid TEXT NOT NULL,
        call_id TEXT NOT NULL,
        message TEXT NOT NULL,
        PRIMARY KEY (tenant, uid, call_id)
    ) WITHOUT ROWID""",
    # `revision` is that of the agent of a run that has not ended, the negative of it where `retired_revisions` has the
    # agent, 0 where `run_agents` has it, and NULL once the run has ended. `deaths` and `released` are of runs that have
    # not ended.
    """CREATE TABLE runs (
        tenant TEXT NOT NULL,
        uid TEXT NOT NULL,
        run TEXT NOT NULL,
        state INTEGER NOT NULL,
        agent TEXT NOT NULL,
        create_time INTEGER NOT NULL,
        labels TEXT,
        first_sequence INTEGER NOT NULL,
        last_sequence INTEGER NOT NULL,
        digest BLOB NOT NULL,
        revision INTEGER,
        deaths INTEGER NOT NULL,
        released INTEGER NOT NULL,
        body BLOB NOT NULL,
        unended INTEGER AS (revision IS NOT NULL),
        PRIMARY KEY (tenant, uid, run)
    ) WITHOUT ROWID""",
    f"""CREATE TRIGGER lookups_of_runs AFTER INSERT ON runs BEGIN
        INSERT INTO lookups VALUES (new.tenant, new.uid, {OF_RUN}, new.create_time, new.run, NULL);
    END""",
    f"""CREATE TRIGGER lookups_of_deleted_runs AFTER DELETE ON runs BEGIN
        DELETE FROM lookups WHERE tenant = old.tenant AND uid = old.uid
            AND kind = {OF_RUN} AND key = old.create_time AND run = old.run;
    END""",
    # The order in which runs are listed over all sessions, twice: of those that have ended, and behind them of the few
    # that have not, which are asked for often.
    "CREATE INDEX runs_by_time ON runs (unended, tenant, create_time, uid, run)",
    # The agents of runs whose agent equals no stored revision, such as one that the start has changed.
    """CREATE TABLE run_agents (
        tenant TEXT NOT NULL,
        uid TEXT NOT NULL,
        run TEXT NOT NULL,
        body BLOB NOT NULL,
        PRIMARY KEY (tenant, uid, run)
    ) WITHOUT ROWID""",
    # Revisions of deleted agents, each until the last of the runs that use it has ended.
    """CREATE TABLE retired_revisions (
        tenant TEXT NOT NULL,
        agent TEXT NOT NULL,
        revision INTEGER NOT NULL,
        uses INTEGER NOT NULL,
        body BLOB NOT NULL,
        PRIMARY KEY (tenant, agent, revision)
    ) WITHOUT ROWID""",
    """CREATE TABLE states (
        tenant TEXT NOT NULL,
        kind TEXT NOT NULL,
        id TEXT NOT NULL,
        version INTEGER NOT NULL,
        PRIMARY KEY (tenant, kind, id)
    ) WITHOUT ROWID""",
    """CREATE TABLE entries (
        tenant TEXT NOT NULL,
        kind TEXT NOT NULL,
        id TEXT NOT NULL,
        key TEXT NOT NULL,
        body BLOB NOT NULL,
        PRIMARY KEY (tenant, kind, id, key)
    ) WITHOUT ROWID""",
    """CREATE TABLE commands (
        tenant TEXT NOT NULL,
        uid TEXT NOT NULL,
        command_id TEXT NOT NULL,
        digest BLOB NOT NULL,
        sequence INTEGER NOT NULL,
        run TEXT NOT NULL,
        PRIMARY KEY (tenant, uid, command_id)
    ) WITHOUT ROWID""",
    """CREATE TABLE requests (
        tenant TEXT NOT NULL,
        subject TEXT NOT NULL,
        rpc TEXT NOT NULL,
        request_id TEXT NOT NULL,
        digest BLOB NOT NULL,
        response BLOB,
        about TEXT NOT NULL,
        owner TEXT NOT NULL,
        create_time INTEGER NOT NULL,
        PRIMARY KEY (tenant, subject, rpc, request_id)
    ) WITHOUT ROWID""",
    "CREATE INDEX requests_by_time ON requests (create_time)",
    # Content lies in pieces under a number, so that an upload becomes a blob without being written again. The
    # pieces are in rows and not in files next to the database: writing them costs twice the time, and everything
    # is in one place for a backup, for a commit, and for deletion.
    "CREATE TABLE contents (content INTEGER PRIMARY KEY, discarded INTEGER NOT NULL)",
    "CREATE INDEX contents_discarded ON contents (content) WHERE discarded",
    """CREATE TABLE chunks (
        content INTEGER NOT NULL,
        start INTEGER NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (content, start)
    )""",
    """CREATE TABLE blobs (
        tenant TEXT NOT NULL,
        sha256 TEXT NOT NULL,
        content INTEGER NOT NULL,
        size INTEGER NOT NULL,
        upload_time INTEGER NOT NULL,
        PRIMARY KEY (tenant, sha256)
    ) WITHOUT ROWID""",
    # Who uploaded a blob may name it; so may a session that refers to it.
    """CREATE TABLE uploaders (
        tenant TEXT NOT NULL,
        sha256 TEXT NOT NULL,
        subject TEXT NOT NULL,
        PRIMARY KEY (tenant, sha256, subject)
    ) WITHOUT ROWID""",
    # A session's log refers under the empty key, from its first event that does; other states by their entries.
    """CREATE TABLE blob_references (
        tenant TEXT NOT NULL,
        kind TEXT NOT NULL,
        id TEXT NOT NULL,
        key TEXT NOT NULL,
        sha256 TEXT NOT NULL,
        sequence INTEGER NOT NULL,
        PRIMARY KEY (tenant, kind, id, key, sha256)
    ) WITHOUT ROWID""",
    "CREATE INDEX references_by_blob ON blob_references (tenant, sha256)",
    """CREATE TABLE uploads (
        tenant TEXT NOT NULL,
        upload_id TEXT NOT NULL,
        content INTEGER NOT NULL,
        size INTEGER NOT NULL,
        expire_time INTEGER NOT NULL,
        sha256 TEXT NOT NULL,
        PRIMARY KEY (tenant, upload_id)
    ) WITHOUT ROWID""",
    "CREATE INDEX uploads_by_time ON uploads (expire_time)",
    "CREATE INDEX requests_by_owner ON requests (tenant, owner) WHERE owner != ''",
    # Of a caller's key there are digests only. `keyed` says for good that there was one: such a store is never served
    # to callers without credentials.
    """CREATE TABLE keys (
        key TEXT NOT NULL,
        tenant TEXT NOT NULL,
        create_time INTEGER NOT NULL,
        digest BLOB NOT NULL,
        former BLOB NOT NULL,
        body BLOB NOT NULL,
        PRIMARY KEY (key)
    ) WITHOUT ROWID""",
    "CREATE INDEX keys_by_time ON keys (tenant, create_time, key)",
    # Who they are that events name. No row is ever changed.
    """CREATE TABLE principals (
        tenant TEXT NOT NULL,
        principal TEXT NOT NULL,
        user TEXT NOT NULL,
        subject TEXT NOT NULL,
        role INTEGER NOT NULL,
        body BLOB NOT NULL,
        PRIMARY KEY (tenant, principal)
    ) WITHOUT ROWID""",
    "CREATE UNIQUE INDEX principals_by_user ON principals (tenant, user, subject, role)",
    # Who did what, in the order it was done.
    """CREATE TABLE audit (
        number INTEGER PRIMARY KEY,
        tenant TEXT NOT NULL,
        principal TEXT NOT NULL,
        method TEXT NOT NULL,
        resource TEXT NOT NULL,
        outcome TEXT NOT NULL,
        create_time INTEGER NOT NULL,
        body BLOB NOT NULL
    )""",
    "CREATE INDEX audit_by_tenant ON audit (tenant, number)",
    "CREATE INDEX audit_by_time ON audit (create_time)",
    # Those that an operator has managed: a tenant does not need a row.
    "CREATE TABLE tenants (tenant TEXT NOT NULL, body BLOB NOT NULL, PRIMARY KEY (tenant)) WITHOUT ROWID",
    # The row of a deleted agent stays, without revisions, for its last number.
    """CREATE TABLE agents (
        tenant TEXT NOT NULL,
        agent TEXT NOT NULL,
        revision INTEGER NOT NULL,
        display_name TEXT NOT NULL,
        create_time INTEGER NOT NULL,
        update_time INTEGER NOT NULL,
        labels TEXT,
        PRIMARY KEY (tenant, agent)
    ) WITHOUT ROWID""",
    """CREATE TABLE revisions (
        tenant TEXT NOT NULL,
        agent TEXT NOT NULL,
        revision INTEGER NOT NULL,
        body BLOB NOT NULL,
        PRIMARY KEY (tenant, agent, revision)
    ) WITHOUT ROWID""",
    # A deletion leaves this row until the revisions up to that number are gone. Nobody reads them any more.
    """CREATE TABLE deleted_agents (
        tenant TEXT NOT NULL,
        agent TEXT NOT NULL,
        revision INTEGER NOT NULL,
        PRIMARY KEY (tenant, agent)
    ) WITHOUT ROWID""",
    """CREATE VIEW known_revisions AS SELECT tenant, agent, revision, body FROM revisions r
        WHERE NOT EXISTS (SELECT 1 FROM deleted_agents d
            WHERE d.tenant = r.tenant AND d.agent = r.agent AND d.revision >= r.revision)""",
)
"""What makes all of it in an empty file."""

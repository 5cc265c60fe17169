"""The tables of a PostgreSQL store, as numbered migrations.

They have the names and columns of the SQLite store's tables. Every text is `COLLATE "C"`, the order of its UTF-8 bytes,
whatever collation the database has, and is written as `wire.escaped` says. The columns that every commit
changes are in no index, and the tables that hold them leave room in their pages, so that PostgreSQL can write the new
version of a row next to the old one and no index changes.
"""

TEXT = 'text COLLATE "C" NOT NULL'

FIRST = f"""
CREATE TABLE notecase_store (
    schema bigint NOT NULL,
    secret bytea NOT NULL,
    keyed smallint NOT NULL DEFAULT 0
);
-- One row: the server that may write. Every write compares `fence` with the number that its server got when it became
-- the owner, and locks the row FOR KEY SHARE: so the fence, being the key, is raised only once the writes under way
-- have ended, while the other columns change without waiting for them.
CREATE TABLE owner (fence bigint PRIMARY KEY, name {TEXT}, counter bigint NOT NULL) WITH (fillfactor = 20);
INSERT INTO owner (fence, name, counter) VALUES (0, '', 0);
CREATE TABLE sessions (
    tenant {TEXT},
    uid {TEXT},
    session {TEXT},
    "user" {TEXT},
    agent {TEXT},
    activity bigint NOT NULL,
    display_name {TEXT},
    create_time bigint NOT NULL,
    update_time bigint NOT NULL,
    expire_time bigint,
    labels jsonb,
    epoch bigint NOT NULL,
    commits text,
    body bytea NOT NULL,
    PRIMARY KEY (tenant, uid)
) WITH (fillfactor = 60);
CREATE INDEX sessions_by_time ON sessions (tenant, create_time, uid);
CREATE INDEX sessions_by_user ON sessions (tenant, "user", create_time, uid);
CREATE INDEX sessions_by_expiry ON sessions (expire_time, tenant, uid) WHERE expire_time IS NOT NULL;
CREATE TABLE session_names (tenant {TEXT}, session {TEXT}, uid {TEXT}, PRIMARY KEY (tenant, session));
-- What a deletion leaves until every other row of the session is gone; a fork or an import begins with it.
CREATE TABLE deleted_sessions (tenant {TEXT}, uid {TEXT}, "user" {TEXT}, PRIMARY KEY (tenant, uid));
-- `message`, `run` and `step` are of events that added a message, and NULL in others.
CREATE TABLE events (
    tenant {TEXT},
    uid {TEXT},
    sequence bigint NOT NULL,
    tells_past smallint NOT NULL,
    message text COLLATE "C",
    run text COLLATE "C",
    step text COLLATE "C",
    body bytea NOT NULL,
    PRIMARY KEY (tenant, uid, sequence)
);
CREATE INDEX events_of_past ON events (tenant, uid, sequence) WHERE tells_past = 1;
CREATE UNIQUE INDEX messages_by_id ON events (tenant, uid, message) WHERE message IS NOT NULL;
-- A message is the event that added it, until something changes it and it gets a body of its own.
CREATE TABLE changed_messages (
    tenant {TEXT},
    uid {TEXT},
    sequence bigint NOT NULL,
    update_sequence bigint NOT NULL,
    body bytea NOT NULL,
    PRIMARY KEY (tenant, uid, sequence)
) WITH (fillfactor = 80);
CREATE TABLE stretches (
    tenant {TEXT},
    uid {TEXT},
    after bigint NOT NULL,
    until bigint NOT NULL,
    sequence bigint NOT NULL,
    back bigint NOT NULL,
    PRIMARY KEY (tenant, uid, after)
);
CREATE TABLE calls (tenant {TEXT}, uid {TEXT}, call_id {TEXT}, message {TEXT}, PRIMARY KEY (tenant, uid, call_id));
CREATE TABLE runs (
    tenant {TEXT},
    uid {TEXT},
    run {TEXT},
    state bigint NOT NULL,
    agent {TEXT},
    create_time bigint NOT NULL,
    labels jsonb,
    first_sequence bigint NOT NULL,
    last_sequence bigint NOT NULL,
    digest bytea NOT NULL,
    body bytea NOT NULL,
    PRIMARY KEY (tenant, uid, run)
) WITH (fillfactor = 60);
CREATE INDEX runs_by_time ON runs (tenant, create_time, uid, run);
CREATE INDEX runs_by_session ON runs (tenant, uid, create_time, run);
-- Runs that have not ended.
CREATE TABLE active_runs (
    tenant {TEXT},
    create_time bigint NOT NULL,
    uid {TEXT},
    run {TEXT},
    step {TEXT},
    deaths bigint NOT NULL,
    released smallint NOT NULL,
    revision bytea NOT NULL,
    PRIMARY KEY (tenant, create_time, uid, run, step)
) WITH (fillfactor = 60);
CREATE TABLE states (
    tenant {TEXT}, kind {TEXT}, id {TEXT}, version bigint NOT NULL, PRIMARY KEY (tenant, kind, id)
) WITH (fillfactor = 60);
CREATE TABLE entries (
    tenant {TEXT}, kind {TEXT}, id {TEXT}, key {TEXT}, body bytea NOT NULL, PRIMARY KEY (tenant, kind, id, key)
) WITH (fillfactor = 80);
CREATE TABLE commands (
    tenant {TEXT},
    uid {TEXT},
    command_id {TEXT},
    digest bytea NOT NULL,
    sequence bigint NOT NULL,
    run {TEXT},
    PRIMARY KEY (tenant, uid, command_id)
);
CREATE TABLE requests (
    tenant {TEXT},
    subject {TEXT},
    rpc {TEXT},
    request_id {TEXT},
    digest bytea NOT NULL,
    response bytea,
    about {TEXT},
    owner {TEXT},
    create_time bigint NOT NULL,
    PRIMARY KEY (tenant, subject, rpc, request_id)
);
CREATE INDEX requests_by_time ON requests (create_time);
CREATE INDEX requests_by_owner ON requests (tenant, owner) WHERE owner != '';
-- Content lies in pieces under a number, so that an upload becomes a blob without being written again.
CREATE TABLE contents (content bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, discarded smallint NOT NULL);
CREATE INDEX contents_discarded ON contents (content) WHERE discarded = 1;
CREATE TABLE chunks (
    content bigint NOT NULL, start bigint NOT NULL, data bytea NOT NULL, PRIMARY KEY (content, start)
);
-- Most content is compressed already, and a read begins in the middle of a piece.
ALTER TABLE chunks ALTER COLUMN data SET STORAGE EXTERNAL;
CREATE TABLE blobs (
    tenant {TEXT},
    sha256 {TEXT},
    content bigint NOT NULL,
    size bigint NOT NULL,
    upload_time bigint NOT NULL,
    PRIMARY KEY (tenant, sha256)
);
CREATE TABLE uploaders (tenant {TEXT}, sha256 {TEXT}, subject {TEXT}, PRIMARY KEY (tenant, sha256, subject));
CREATE TABLE blob_references (
    tenant {TEXT},
    kind {TEXT},
    id {TEXT},
    key {TEXT},
    sha256 {TEXT},
    sequence bigint NOT NULL,
    PRIMARY KEY (tenant, kind, id, key, sha256)
);
CREATE INDEX references_by_blob ON blob_references (tenant, sha256);
CREATE TABLE uploads (
    tenant {TEXT},
    upload_id {TEXT},
    content bigint NOT NULL,
    size bigint NOT NULL,
    expire_time bigint NOT NULL,
    sha256 {TEXT},
    PRIMARY KEY (tenant, upload_id)
) WITH (fillfactor = 80);
CREATE INDEX uploads_by_time ON uploads (expire_time);
CREATE TABLE keys (
    key {TEXT},
    tenant {TEXT},
    create_time bigint NOT NULL,
    digest bytea NOT NULL,
    former bytea NOT NULL,
    body bytea NOT NULL,
    PRIMARY KEY (key)
);
CREATE INDEX keys_by_time ON keys (tenant, create_time, key);
CREATE TABLE principals (
    tenant {TEXT},
    principal {TEXT},
    "user" {TEXT},
    subject {TEXT},
    role bigint NOT NULL,
    body bytea NOT NULL,
    PRIMARY KEY (tenant, principal)
);
CREATE UNIQUE INDEX principals_by_user ON principals (tenant, "user", subject, role);
CREATE TABLE audit (
    number bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
    tenant {TEXT},
    principal {TEXT},
    method {TEXT},
    resource {TEXT},
    outcome {TEXT},
    create_time bigint NOT NULL,
    body bytea NOT NULL
);
CREATE INDEX audit_by_tenant ON audit (tenant, number);
CREATE INDEX audit_by_time ON audit (create_time);
CREATE TABLE tenants (tenant {TEXT}, body bytea NOT NULL, PRIMARY KEY (tenant));
-- The row of a deleted agent stays, without revisions, for its last number.
CREATE TABLE agents (
    tenant {TEXT},
    agent {TEXT},
    revision bigint NOT NULL,
    display_name {TEXT},
    create_time bigint NOT NULL,
    update_time bigint NOT NULL,
    labels jsonb,
    PRIMARY KEY (tenant, agent)
);
CREATE TABLE revisions (
    tenant {TEXT}, agent {TEXT}, revision bigint NOT NULL, body bytea NOT NULL, PRIMARY KEY (tenant, agent, revision)
);
"""

SECOND = f"""
-- A deletion leaves this row until the revisions up to that number are gone. Nobody reads them any more.
CREATE TABLE deleted_agents (tenant {TEXT}, agent {TEXT}, revision bigint NOT NULL, PRIMARY KEY (tenant, agent));
CREATE VIEW known_revisions AS SELECT tenant, agent, revision, body FROM revisions r
    WHERE NOT EXISTS (SELECT 1 FROM deleted_agents d
        WHERE d.tenant = r.tenant AND d.agent = r.agent AND d.revision >= r.revision);
-- Their order, so that a piece of an erasure need not sort all of them.
DROP INDEX requests_by_owner;
CREATE INDEX requests_by_owner ON requests (tenant, owner, subject, rpc, request_id) WHERE owner != '';
"""

MIGRATIONS = (FIRST, SECOND)
"""What leads from each schema to the next, the first from an empty database. A migration that was released is never
changed."""

VERSION = len(MIGRATIONS)
"""Number of the schema that this version writes."""

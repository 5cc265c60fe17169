"""The `notecase` command. Each group of commands is a module here, imported when one of its commands is named. Most
know a server only by its address; `serve`, `config`, `providers`, `backup`, `copy`, `migrate`, `store` and `keys
bootstrap` do not."""

import click

import notecase_server.cli.grpc_log  # noqa: F401  # before a command imports gRPC
from notecase_server import __version__
from notecase_server.cli.lazy import Lazy, LazyGroup

COMMANDS = {
    "agents": Lazy("agents:agents", "List, show, create, apply, edit, compare and delete agents."),
    "answer": Lazy(
        "inbox:answer", "Answer a question, or give the result of a caller's tool or of an interrupted call."
    ),
    "approve": Lazy("inbox:approve", "Let a call run that waits for approval; of an interrupted call: run it again."),
    "audit": Lazy("audit:audit", "List who did what: keys, tenants, deletions, exports, approvals, refusals."),
    "backup": Lazy("backup:backup", "Copy a store to the file DEST, while a server goes on with it."),
    "blobs": Lazy("blobs:blobs", "Upload, show and download content."),
    "chat": Lazy("chat:chat", "Talk with an agent."),
    "completion": Lazy(
        "completion:completion", "Complete commands, options and ids with the Tab key, in bash, zsh and fish."
    ),
    "config": Lazy("config:config", "Check a configuration file."),
    "copy": Lazy("copy:copy", "Copy a whole store into an empty one."),
    "deny": Lazy("inbox:deny", "Do not let a call run."),
    "health": Lazy("health:health", "Ask a server how it is."),
    "inbox": Lazy("inbox:inbox", "List what runs wait for: approvals, questions and the results of callers' tools."),
    "keys": Lazy("keys:keys", "Make, list, rotate and revoke the keys by which programs call a server."),
    "logs": Lazy("logs:logs", "Print a session's log: its events with their sequences, in order."),
    "messages": Lazy("messages:messages", "List, show and add the messages of a session."),
    "migrate": Lazy("migrate:migrate", "Bring the tables of a PostgreSQL store up to date."),
    "profiles": Lazy(
        "profiles:profiles",
        "List, set, choose and delete profiles: servers by name, each with its token and authorities.",
    ),
    "providers": Lazy("providers:providers", "Try the providers of models out."),
    "run": Lazy("run:run", "Say TEXT to an agent, print its reply as it comes, and end."),
    "runs": Lazy("runs:runs", "List, show and cancel runs."),
    "serve": Lazy("serve:serve", "Serve until SIGTERM or SIGINT."),
    "sessions": Lazy(
        "sessions:sessions", "List, show, make, fork, rewind, compact, delete, export and import sessions."
    ),
    "state": Lazy("state:state", "Read, put, delete and watch the notes of a session, a user or the app."),
    "store": Lazy("store:store", "Change a store that no server has open."),
    "tenants": Lazy("tenants:tenants", "Make, list, suspend, resume, export and delete tenants."),
}

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


@click.group(cls=LazyGroup, table=COMMANDS, context_settings=HELP)
@click.version_option(__version__, prog_name="notecase")
def main() -> None:
    """A self-hosted gRPC agent service: agents, their sessions, state, messages and runs.

    Every option that shows a NOTECASE_ variable can also be set by it. Commands exit with 0 when they are done, 1 when
    the service refuses or a run fails, 2 when the command line or a file is wrong, 3 when a run waits for somebody, 4
    when no server answers, 5 when what was compared differs, and 130 at Ctrl-C.
    """

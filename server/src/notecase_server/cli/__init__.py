"""The `notecase` command. Each group of commands is a module here, imported when one of its commands is named. Most
know a server only by its address; `serve`, `config`, `providers`, `backup`, `copy`, `migrate`, `store` and `keys
bootstrap` do not."""

import click

import notecase_server.cli.closed_streams  # first
import notecase_server.cli.grpc_log  # noqa: F401  # before a command imports gRPC
from notecase_server import __version__
from notecase_server.cli.lazy import Lazy, LazyGroup

COMMANDS = {
    "agents": Lazy("agents:agents", "List, show, create, apply, edit, compare and delete agents."),
    "answer": Lazy(
        "inbox:answer", "Answer a question, or give the result of a caller's tool or of an interrupted call."
    ),
    "approve": Lazy("inbox:approve", "Approve a call that waits for approval, or run an interrupted call again."),
    "audit": Lazy("audit:audit", "List who did what: keys, tenants, deletions, exports, approvals, refusals."),
    "backup": Lazy("backup:backup", "Copy a store to the file DEST while its server keeps running."),
    "blobs": Lazy("blobs:blobs", "Upload, show and download files."),
    "chat": Lazy("chat:chat", "Talk with an agent."),
    "completion": Lazy(
        "completion:completion", "Complete commands, options and ids with the Tab key, in bash, zsh and fish."
    ),
    "config": Lazy("config:config", "Check a configuration file."),
    "copy": Lazy("copy:copy", "Copy a whole store into an empty store."),
    "deny": Lazy("inbox:deny", "Deny a call that waits for approval."),
    "health": Lazy("health:health", "Show whether a server is healthy."),
    "inbox": Lazy("inbox:inbox", "List what runs wait for: approvals, answers and results of callers' tools."),
    "keys": Lazy("keys:keys", "Create, list, rotate and revoke API keys."),
    "logs": Lazy("logs:logs", "Print the events of a session's log, in order of their sequence."),
    "messages": Lazy("messages:messages", "List, show and append messages of a session."),
    "migrate": Lazy("migrate:migrate", "Upgrade the tables of a PostgreSQL store."),
    "profiles": Lazy(
        "profiles:profiles",
        "List, set, choose and delete profiles: named servers with their tokens and CA certificates.",
    ),
    "providers": Lazy("providers:providers", "Test model providers."),
    "run": Lazy("run:run", "Send TEXT to an agent, stream its reply, and exit."),
    "runs": Lazy("runs:runs", "List, show and cancel runs."),
    "serve": Lazy("serve:serve", "Run a server until SIGTERM, SIGINT or SIGHUP."),
    "sessions": Lazy(
        "sessions:sessions", "List, show, create, fork, rewind, compact, delete, export and import sessions."
    ),
    "state": Lazy("state:state", "Read, set, delete and watch the state of a session, a user or the app."),
    "store": Lazy("store:store", "Change a store while no server uses it."),
    "tenants": Lazy("tenants:tenants", "Create, list, suspend, resume, export and delete tenants."),
}

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


@click.group(cls=LazyGroup, table=COMMANDS, context_settings=HELP)
@click.version_option(__version__, prog_name="notecase")
def main() -> None:
    """A self-hosted gRPC agent service: agents, their sessions, state, messages and runs.

    Where the help of an option shows a NOTECASE_ variable, the variable sets the option, too. Exit codes: 0 success, 1
    the service refused or a run failed, 2 the command line or a file is wrong, 3 a run waits for a person or a caller's
    tool, 4 no server answers, 5 the compared agents differ, 130 Ctrl-C.
    """

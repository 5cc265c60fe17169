"""The `notecase` command. Each group of commands is a module here, imported when one of its commands is named. Most
know a server only by its address; `serve`, `config`, `providers`, `backup`, `copy`, `migrate`, `store` and `keys
bootstrap` do not."""

import click

import notecase_server.cli.grpc_log  # noqa: F401  # before a command imports gRPC
from notecase_server import __version__
from notecase_server.cli.lazy import Lazy, LazyGroup

COMMANDS = {
    "agents": Lazy("look:agents", "List agents by name."),
    "audit": Lazy("audit:audit", "List who did what: keys, tenants, deletions, exports, approvals, refusals."),
    "backup": Lazy("backup:backup", "Copy a store to the file DEST, while a server goes on with it."),
    "chat": Lazy("chat:chat", "Talk with an agent."),
    "config": Lazy("config:config", "Check a configuration file."),
    "copy": Lazy("copy:copy", "Copy a whole store into an empty one."),
    "export": Lazy("transfer:export_session", "Write a session to a file, to be imported here or elsewhere."),
    "health": Lazy("health:health", "Ask a server how it is."),
    "import": Lazy("transfer:import_session", "Make a new session of an exported one."),
    "keys": Lazy("keys:keys", "Make, list, rotate and revoke the keys by which programs call a server."),
    "migrate": Lazy("migrate:migrate", "Bring the tables of a PostgreSQL store up to date."),
    "providers": Lazy("providers:providers", "Try the providers of models out."),
    "serve": Lazy("serve:serve", "Serve until SIGTERM or SIGINT."),
    "sessions": Lazy("look:sessions", "List sessions, the last created first."),
    "state": Lazy("state:state", "Read, put and watch the notes of a session, a user or the app."),
    "store": Lazy("store:store", "Change a store that no server has open."),
    "tenants": Lazy("tenants:tenants", "Make, list, suspend, resume and delete tenants."),
}

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


@click.group(cls=LazyGroup, table=COMMANDS, context_settings=HELP)
@click.version_option(__version__, prog_name="notecase")
def main() -> None:
    """A self-hosted gRPC agent service: agents, their sessions, state, messages and runs.

    Every option that shows a NOTECASE_ variable can also be set by it.
    """

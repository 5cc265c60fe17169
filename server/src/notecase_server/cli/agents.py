"""`notecase agents`: commands for agents, one by one or as files."""

from collections.abc import Sequence
from typing import Any

import click
from google.protobuf import text_format
from notecase import Client, v1

from notecase_server.cli import ids, output, screen
from notecase_server.cli.ask import ask, confirm, name_of, read_text
from notecase_server.cli.options import LIMIT, OUTPUT, SERVER, YES

AGENT = click.argument("agent", metavar="AGENT", shell_complete=ids.of("agents"))
FILES = click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    metavar="FILE",
    help="A YAML or JSON file with any number of agents; - is standard input. May be repeated.",
)

_COLUMNS = {
    "AGENT": lambda one: screen.id_of(one.name),
    "REVISION": lambda one: str(one.revision),
    "MODEL": screen.model_of,
    "DISPLAY NAME": lambda one: screen.one_line(one.display_name),
}


@click.group()
def agents() -> None:
    """List, show, create, apply, edit, compare and delete agents.

    AGENT is an agent's id or full name, agents/ID. ID@REVISION names one revision.
    """


@agents.command("list")
@click.option(
    "--filter",
    "where",
    default="",
    show_default=False,
    metavar="EXPRESSION",
    help='List only matching agents, for example: labels.team = "night". Fields: display_name, create_time, '
    "update_time and "
    "labels.KEY.",
)
@LIMIT
@OUTPUT
@SERVER
def list_agents(where: str, limit: int, form: str) -> None:
    """List agents by name."""

    async def look(client: Client) -> None:
        request = v1.ListAgentsRequest(filter=where)
        found = await output.listed(client.agents.ListAgents, request, "agents", limit)
        if form == "table":
            output.print_list(found, form, _COLUMNS)
        else:
            output.print_data(_data(found), form)

    ask(look)


@agents.command("show")
@AGENT
@OUTPUT
@SERVER
def show_agent(agent: str, form: str) -> None:
    """Print an agent's settings and instruction.

    The output of -o yaml is a file for `agents apply`.
    """

    async def look(client: Client) -> None:
        found = await client.agents.GetAgent(v1.GetAgentRequest(name=name_of("agents", agent)))
        if form == "table":
            _show(found)
        else:
            output.print_data(_data([found])[0], form)

    ask(look)


@agents.command("create")
@AGENT
@click.option(
    "--instruction",
    default="",
    show_default=False,
    metavar="TEXT",
    help="The instruction, a template; - reads standard input.",
)
@click.option("--model", default="", show_default=False, metavar="NAME", help="The model; by default the provider's.")
@click.option(
    "--provider", default="", show_default=False, metavar="NAME", help="The provider; by default the server's."
)
@click.option("--name", default="", show_default=False, metavar="TEXT", help="The agent's display name.")
@SERVER
def create_agent(agent: str, instruction: str, model: str, provider: str, name: str) -> None:
    """Create an agent and print its name. Use `agents edit` or `agents apply` for all other settings."""
    llm = v1.LlmAgent(instruction=read_text(instruction), model=model, provider=provider)

    async def make(client: Client) -> None:
        request = v1.CreateAgentRequest(
            agent_id=agent.removeprefix("agents/"), agent=v1.Agent(display_name=name, llm=llm)
        )
        click.echo((await client.agents.CreateAgent(request)).name)

    ask(make)


@agents.command("apply")
@FILES
@click.option("--dry-run", is_flag=True, help="Print the changes without making them.")
@SERVER
def apply_agents(files: Sequence[str], dry_run: bool) -> None:
    """Create or update agents to match files; agents that match already are left unchanged.

    Each document of a file is an agent, with the fields of the API's Agent, or a list of agents. A field that is left
    out gets its default. The command prints one line for each agent. Mistakes in the files are all reported before
    anything is changed. If the server refuses an agent, the others are still applied.
    """
    from notecase_server.cli import applying  # noqa: PLC0415  # YAML is imported where it is read

    if not files:
        raise click.UsageError("Give a file with -f.")
    declared = applying.read_files(files)
    ask(lambda client: applying.apply(client, declared, dry_run))


@agents.command("diff")
@click.argument("agents", metavar="[OLD NEW]", nargs=-1, shell_complete=ids.of("agents"))
@FILES
@SERVER
def diff_agents(agents: Sequence[str], files: Sequence[str]) -> None:
    """Compare two agents or revisions, OLD and NEW, or with -f the server's agents with files.

    The exit code is 5 if they differ.
    """
    from notecase_server.cli import applying  # noqa: PLC0415

    if bool(files) == bool(agents) or len(agents) not in {0, 2}:
        raise click.UsageError("Name two agents or revisions, for example tutor@1 tutor, or files with -f.")
    declared = applying.read_files(files)
    names = [name_of("agents", one) for one in agents]
    ask(lambda client: applying.compare(client, names, declared))


@agents.command("edit")
@AGENT
@SERVER
def edit_agent(agent: str) -> None:
    """Edit an agent as YAML, in the editor that VISUAL or EDITOR names.

    If the result cannot be applied, the mistakes are shown and you can edit again. The exit code is 1 if you give up.
    """
    from notecase_server.cli import applying  # noqa: PLC0415

    ask(lambda client: applying.edit(client, name_of("agents", agent)))


@agents.command("delete")
@click.argument("agents", metavar="AGENT...", nargs=-1, required=True, shell_complete=ids.of("agents"))
@YES
@SERVER
def delete_agents(agents: Sequence[str], yes: bool) -> None:
    """Delete agents with all their revisions. Active runs continue.

    Asks for confirmation; without a terminal, --yes is required. Stops at the first agent that cannot be deleted.
    """
    names = [name_of("agents", one) for one in agents]
    confirm(f"Delete {', '.join(names)}?", yes)

    async def remove(client: Client) -> None:
        for name in names:
            await client.agents.DeleteAgent(v1.DeleteAgentRequest(name=name))

    ask(remove)


def _data(found: Sequence[v1.Agent]) -> list[Any]:
    from notecase_server.cli import manifest  # noqa: PLC0415

    return [manifest.data_of(agent) for agent in found]


def _show(found: v1.Agent) -> None:
    settings = {
        "description": screen.one_line(found.description, 200),
        "revision": f"{found.revision} of {screen.moment(found.update_time)}",
        "model": screen.model_of(found),
        "tools": screen.one_line(", ".join(_tool(tool) for tool in found.llm.tools), 200),
        "generation": text_format.MessageToString(found.llm.generation, as_one_line=True),
        "context": text_format.MessageToString(found.llm.context, as_one_line=True),
        "output key": screen.one_line(found.output_key),
        "labels": screen.one_line(", ".join(f"{key}={label}" for key, label in sorted(found.labels.items())), 200),
    }
    output.print_settings(" ".join([found.name, screen.one_line(found.display_name)]), settings)
    click.echo(f"\n{screen.harmless(found.llm.instruction) or 'It has no instruction.'}")


def _tool(tool: v1.Tool) -> str:
    """Returns a tool's name, or whose tools they are."""
    return tool.name or f"all of {tool.mcp.server}"

"""What deploy/ and docs/deploy.md say holds: a server starts with the settings of each, is given more time than it
takes to stop, and a backup is restored by the commands of the page."""

import asyncio
import configparser
import re
import shlex
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import notecase_server
import pytest
import yaml
from cryptography import x509
from notecase import Client, Tool, to_message, v1
from notecase_server.cli.serve import serve
from notecase_server.rpc.ops import LIVENESS

from tests.cli.command import notecase
from tests.support.authority import Authority
from tests.support.server import Spawned

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"

STOP_SECONDS = 3
"""What a stop may take besides its grace: calls are cut, tools and providers are closed."""


class Deployment(NamedTuple):
    """How one file starts a server: the words after `notecase`, its variables, and the seconds until it is killed."""

    command: list[str]
    environment: dict[str, str]
    killed_after: float


def from_image() -> Deployment:
    text = (ROOT / "Dockerfile").read_text()
    (command,) = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    environment = dict(re.findall(r"(NOTECASE_\w+)=(\S+)", text.partition("\nENV ")[2]))
    return Deployment(yaml.safe_load(command), environment, 10)  # docker stop's own time


def from_compose() -> Deployment:
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["notecase"]
    return Deployment(service["command"], service["environment"], _seconds(service["stop_grace_period"]))


def from_kubernetes() -> Deployment:
    pod = _stateful_set()["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {variable["name"]: variable.get("value", "") for variable in container["env"]}
    return Deployment(container["args"], environment, pod["terminationGracePeriodSeconds"])


def from_systemd() -> Deployment:
    service = _unit()["Service"]
    _, *command = shlex.split(service["ExecStart"])
    environment = dict(word.split("=", 1) for word in shlex.split(service["Environment"]))
    return Deployment(command, environment, float(service["TimeoutStopSec"]))


DEPLOYMENTS = [from_image, from_compose, from_kubernetes, from_systemd]

each = pytest.mark.parametrize("read", DEPLOYMENTS, ids=lambda read: read.__name__)


def _seconds(duration: str) -> float:
    return timedelta(seconds=int(duration.removesuffix("s"))).total_seconds()


def _stateful_set() -> dict[str, Any]:
    documents = {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
    found: dict[str, Any] = documents["StatefulSet"]
    return found


def _unit() -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]  # as configparser's own documentation does it
    unit.read(DEPLOY / "notecase.service")
    return unit


@each
def test_a_stop_has_more_time_than_it_takes(read: Callable[[], Deployment]) -> None:
    found = read()
    assert found.killed_after >= float(found.environment["NOTECASE_GRACE"]) + STOP_SECONDS


@each
async def test_a_server_starts_with_the_settings(read: Callable[[], Deployment], tmp_path: Path) -> None:
    """But for where it listens and what is secret. Every variable is one that the server reads."""
    found = read()
    known = {str(parameter.envvar) for parameter in serve.params} | {"NOTECASE_ADMIN_KEY"}
    mine = {name: value for name, value in found.environment.items() if name.startswith("NOTECASE_")}
    assert set() == set(mine) - known
    assert "serve" == found.command[0]
    elsewhere = {"NOTECASE_ADMIN_KEY": "k" * 64, "NOTECASE_STORE": "memory:"}
    environment = mine | {name: value for name, value in elsewhere.items() if name in mine}
    server = await Spawned.start("memory:", tmp_path / "log", *found.command[1:], env=environment, forked=True)
    assert 0 == await server.stop(), server.log.read_text()


def test_the_page_has_the_times_of_the_files() -> None:
    rows = re.findall(r"^\| .+ \| (\d+) s \| (\d+) s \(", (ROOT / "docs" / "deploy.md").read_text(), re.MULTILINE)
    found = [read() for read in DEPLOYMENTS]
    assert rows == [(one.environment["NOTECASE_GRACE"], f"{one.killed_after:g}") for one in found]


def test_the_image_says_what_it_is() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert f'org.opencontainers.image.version="{notecase_server.__version__}"' in text
    assert "\nSTOPSIGNAL SIGTERM\n" in text
    assert "\nUSER 10001:10001\n" in text
    assert 'CMD ["notecase", "health"]' in text
    assert "/wheels/*.whl 'notecase-server[postgres]'" in text, "a store in PostgreSQL needs its driver"


def test_the_pod_runs_as_the_images_user_and_is_probed_where_it_listens() -> None:
    assert 1 == _stateful_set()["spec"]["replicas"], "a SQLite store has one owner"
    pod = _stateful_set()["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (True, 10001, 10001) == tuple(
        pod["securityContext"][key] for key in ("runAsNonRoot", "runAsUser", "fsGroup")
    )
    assert f"notecase:{notecase_server.__version__}" == container["image"]
    assert {"/data", "/tmp"} == {mount["mountPath"] for mount in container["volumeMounts"]}
    port = int(from_image().environment["NOTECASE_LISTEN"].rpartition(":")[2])
    assert [port] == [one["containerPort"] for one in container["ports"]]
    probes = [container[f"{kind}Probe"]["grpc"] for kind in ("startup", "readiness", "liveness")]
    alive = {"port": port, "service": LIVENESS}
    assert [alive, {"port": port}, alive] == probes


def test_the_page_names_the_variables_that_are_set() -> None:
    """They override a configuration file."""
    page = (ROOT / "docs" / "deploy.md").read_text()
    told = page.partition("Variables override the file: the unit")[2].partition("For\nanother value")[0]
    unit, image = (set(re.findall(r"NOTECASE_\w+", part)) for part in told.split("the image sets"))
    assert set(from_systemd().environment) == unit
    assert set(from_image().environment) == image


async def test_the_probes_of_the_page_reach_a_server_with_tls(tmp_path: Path) -> None:
    """Also one that waits is alive, which is what decides about restarts."""
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
    probes = yaml.safe_load(block)
    environment = {variable["name"]: variable["value"] for variable in probes["env"]}
    authority = Authority()
    cert, key = authority.issue([x509.DNSName("localhost")]).write(tmp_path)
    ca = tmp_path / "ca.crt"
    ca.write_bytes(authority.cert)
    files = {"/tls/tls.crt": str(cert), "/tls/tls.key": str(key), "/tls/ca.crt": str(ca)}
    environment = {name: files.get(value, value) for name, value in environment.items()}
    server = await Spawned.start("memory:", tmp_path / "log", env=environment, forked=True)
    environment["NOTECASE_ADDRESS"] = server.address.replace("127.0.0.1", "localhost")
    for kind, more in (("startup", ["--liveness"]), ("readiness", []), ("liveness", ["--liveness"])):
        program, *arguments = probes[f"{kind}Probe"]["exec"]["command"]
        assert ("notecase", ["health", *more]) == (program, arguments)
        assert (0, "SERVING\n", "") == await notecase(*arguments, env=environment)
    assert 0 == await server.stop()


def test_systemd_takes_the_unit(tool: Callable[[str], str], tmp_path: Path) -> None:
    """Judged by systemd itself, with a command that exists here."""
    text = (DEPLOY / "notecase.service").read_text()
    assert "/opt/notecase/bin/notecase serve" in text
    (tmp_path / "notecase.service").write_text(text.replace("/opt/notecase/bin/notecase", tool("notecase")))
    done = subprocess.run(
        [tool("systemd-analyze"), "verify", str(tmp_path / "notecase.service")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (0, "") == (done.returncode, done.stderr)


def pay(amount: int, to: str) -> str:
    """Pays an amount in cents."""
    return f"paid {amount} to {to}"


TOOL = Tool(pay, requires_approval=True, declare=False)


async def test_a_backup_is_restored_and_a_run_that_waited_is_answered(tmp_path: Path) -> None:
    """By the commands of the page, in the folders of this test; systemctl is played by the test itself."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    backup, restore = (
        text.partition(f"\n## {heading}\n")[2].partition("```sh\n")[2].partition("```")[0].splitlines()
        for heading in ("Back up", "Restore")
    )
    places = {name: tmp_path / name for name in ("var/lib/notecase", "var/backups")}
    for place in places.values():
        place.mkdir(parents=True)
    store = f"sqlite:{places['var/lib/notecase'] / 'notecase.db'}"
    server = await Spawned.start(store, tmp_path / "log", forked=True)

    async def do(line: str) -> None:
        """One command of the page, with this test's user and folders."""
        nonlocal server
        command = re.sub(r" -o notecase -g notecase|^sudo -u notecase ", "", line)
        command = re.sub(r"(?<=[ :])/var/", f"{tmp_path}/var/", command)
        match command.split():
            case ["systemctl", "stop", "notecase"]:
                await server.stop()
            case ["systemctl", "start", "notecase"]:
                server = await Spawned.start(store, tmp_path / "log", forked=True)
            case ["/opt/notecase/bin/notecase", *arguments]:
                done = await notecase(*arguments, env={"NOTECASE_ADDRESS": server.address})
                assert 0 == done.code, done.err
            case _:
                shell = await asyncio.create_subprocess_shell(command)
                assert 0 == await shell.wait(), command

    async with Client(server.address) as client:
        llm = v1.LlmAgent(provider="offline", tools=[TOOL.definition])
        await client.agents.CreateAgent(v1.CreateAgentRequest(agent_id="clerk", agent=v1.Agent(llm=llm)))
        said = to_message('/call pay {"amount": 900, "to": "the landlord"}')
        start = v1.StartRun(new_session=v1.Session(name="sessions/books", agent="agents/clerk"), messages=[said])
        run = await client.runs.CreateRun(v1.CreateRunRequest(start=start))
        waiting = await client.runs.WaitRun(v1.WaitRunRequest(name=run.name))
        assert v1.Run.STATE_WAITING == waiting.state
        for line in backup:
            await do(line)
        await client.create_session("agents/clerk", session_id="later")
    for line in restore:
        await do(line)
    async with Client(server.address) as client:
        sessions = await client.sessions.ListSessions(v1.ListSessionsRequest())
        assert ["sessions/books"] == [session.name for session in sessions.sessions]
        await client.approve(run.name, waiting.pending_inputs[0].input_id)
        async with client.attach(run.name, tools=[TOOL]) as following:
            finished = [event.tool_finished async for event in following if event.HasField("tool_finished")]
        assert ["paid 900 to the landlord"] == [call.result[0].text for call in finished]
        assert v1.Run.STATE_SUCCEEDED == following.result.state
    await server.stop()

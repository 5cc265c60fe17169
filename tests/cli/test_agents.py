"""Agents as files: applied completely or not at all; a repeat changes nothing; every mistake is reported with its
line."""

import json
import re
import tempfile
import textwrap
from pathlib import Path

import click
import grpc
import pytest
from notecase import Client, NotecaseError, v1
from notecase_server.cli import applying, manifest

from tests.cli.command import missing, notecase, terminal
from tests.support.server import Running

TEAM = """\
# Two agents, one a document, one in a list.
name: detective
display_name: 2024-01-01
labels: {team: no}
llm:
  model: clever-1
  instruction: |
    Look for {{ object }}.
    Be brief.
  tools:
    - name: search
      client: {}
      timeout: 30s
      requires_approval: true
      approver: APPROVER_ADMIN
      parameters:
        type: object
        properties:
          query: {type: string}
  generation: {temperature: 0.5, stop: [no, "1.0"], seed: 9007199254740993}
  context: {summary: {keep_recent: 4}}
---
- name: agents/clerk
  llm: {}
"""


def apply(served: Running, *arguments: str) -> tuple[str, ...]:
    return ("agents", "apply", "--server", served.address, *arguments)


async def get(served: Running, name: str) -> v1.Agent:
    return await served.agents.GetAgent(v1.GetAgentRequest(name=name))


async def test_a_file_is_applied_and_again_without_an_effect(served: Running, tmp_path: Path) -> None:
    """Texts are taken as they are written, JSON Schemas may be YAML, and what the file leaves out is cleared."""
    file = tmp_path / "team.yaml"
    file.write_text(TEAM)
    done = await notecase(*apply(served, "-f", str(file)))
    assert (0, "agents/detective created\nagents/clerk created\n", "") == tuple(done)
    made = await get(served, "agents/detective")
    tool = made.llm.tools[0]
    schema = {"type": "object", "properties": {"query": {"type": "string"}}}
    assert (schema, 30, v1.Tool.APPROVER_ADMIN) == (json.loads(tool.parameters), tool.timeout.seconds, tool.approver)
    assert ("2024-01-01", "no", ["no", "1.0"], 9007199254740993) == (
        made.display_name,
        made.labels["team"],
        list(made.llm.generation.stop),
        made.llm.generation.seed,
    )
    done = await notecase(*apply(served, "-f", str(file)))
    assert (0, "agents/detective unchanged at revision 1\nagents/clerk unchanged at revision 1\n") == done[:2]
    file.write_text(TEAM.replace("display_name: 2024-01-01\n", "").replace("clever-1", "clever-2"))
    done = await notecase(*apply(served, "-f", str(file), "--dry-run"))
    assert 0 == done.code
    assert {"-display_name: '2024-01-01'", "-  model: clever-1", "+  model: clever-2"} == {
        line for line in done.out.splitlines() if line[:1] in "+-" and line[:3] not in {"+++", "---"}
    }
    assert 1 == (await get(served, "agents/detective")).revision
    differs = await notecase("agents", "diff", "-f", str(file), "--server", served.address)
    assert (5, done.out.partition("agents/clerk")[0]) == (differs.code, differs.out)
    done = await notecase(*apply(served, "-f", "-"), said=file.read_text())
    assert (0, "agents/detective changed to revision 2\nagents/clerk unchanged at revision 1\n") == done[:2]
    made = await get(served, "agents/detective")
    assert ("", "clever-2") == (made.display_name, made.llm.model)
    differs = await notecase("agents", "diff", "detective@1", "detective", "--server", served.address)
    assert (5, True) == (differs.code, "+  model: clever-2" in differs.out)


@pytest.mark.parametrize("form", ["yaml", "json"])
async def test_what_is_printed_is_what_is_applied(served: Running, tmp_path: Path, form: str) -> None:
    """On another server, too; and where nothing was changed it changes nothing."""
    await notecase(*apply(served, "-f", "-"), said=TEAM)
    printed = await notecase("agents", "list", "-o", form, "--server", served.address)
    done = await notecase(*apply(served, "-f", "-"), said=printed.out)
    assert (0, "agents/clerk unchanged at revision 1\nagents/detective unchanged at revision 1\n") == done[:2]


MISTAKES = """\
- name: a
  dispaly_name: A
  llm:
    tools:
      - name: t
        approver: ADMIN
        timeout: soon
        client: {}
        mcp: {server: s}
    generation: {temperature: hot}
    max_model_calls: 3000000000
- name: agents/a
  llm: []
  labels: [x]
- 7
- llm: {instruction: x, instruction: y}
"""


def test_all_mistakes_of_a_file_are_reported_at_once() -> None:
    """Each with its line and its path."""
    with pytest.raises(manifest.Mistakes) as raised:
        manifest.read("team.yaml", MISTAKES)
    assert [
        "team.yaml:1: agents/a: this agent is declared more than once.",
        "team.yaml:2: dispaly_name: there is no such field; 'display_name' may be meant.",
        "team.yaml:6: llm.tools[0].approver: one of these is needed: APPROVER_UNSPECIFIED, APPROVER_USER, "
        "APPROVER_DEVELOPER, APPROVER_ADMIN.",
        "team.yaml:7: llm.tools[0].timeout: a time in seconds is needed, such as 30s.",
        "team.yaml:9: llm.tools[0].mcp: client is set already; only one of them can be.",
        "team.yaml:10: llm.generation.temperature: a number is needed.",
        "team.yaml:11: llm.max_model_calls: a whole number of at most 32 bits is needed.",
        "team.yaml:12: agents/a: this agent is declared more than once.",
        "team.yaml:13: llm: a mapping is needed, with some of: model, instruction, tools, generation, context, "
        "output_schema, max_model_calls, provider, fallbacks.",
        "team.yaml:14: labels: a mapping of names to texts is needed.",
        "team.yaml:15: An agent is a mapping with a name.",
        "team.yaml:16: llm.instruction: it is given more than once.",
        "team.yaml:16: name: every agent needs one.",
    ] == str(raised.value).splitlines()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "team.yaml: The file holds no agent."),
        ("name: [", "team.yaml:1: This is not YAML: "),
        ("name: a\nllm: !!python/object:os.system {}", "team.yaml:2: llm: the tag "),
        ("- &a [*a]", "team.yaml:1: An agent is a mapping with a name."),
        ("name: a\nllm: &l {tools: [*l]}", "llm.tools[0].tools: there is no such field"),
        ("name: a\nllm: {<<: 3}", "team.yaml:2: llm: "),
        ("name: \ud800", "This is not YAML"),
        ("name: a\nllm: {output_schema: {a: .nan}}", "llm.output_schema: this is not JSON"),
        ("name: a\nllm: {output_schema: &s {a: *s}}", "recursive"),
        ("[" * 5000, "This is not YAML"),
    ],
)
def test_a_file_that_does_not_contain_agents_is_reported(text: str, expected: str) -> None:
    with pytest.raises(manifest.Mistakes) as raised:
        manifest.read("team.yaml", text)
    assert expected in str(raised.value)


def test_json_with_tabs_and_escapes_is_read_as_json() -> None:
    text = '{\n\t"name": "a",\n\t"llm": {"instruction": "\\ud83c\\udfbb\\/\\t"}\n}'
    (declared,) = manifest.read("a.json", text)
    assert "🎻/\t" == declared.agent.llm.instruction


def test_yaml_shares_what_is_written_once() -> None:
    text = textwrap.dedent("""\
        - name: a
          llm: &common {model: m, instruction: Be brief.}
        - name: b
          llm: {<<: *common, model: n}
        - name: c
          llm: *common
        """)
    assert [("m", "Be brief."), ("n", "Be brief."), ("m", "Be brief.")] == [
        (one.agent.llm.model, one.agent.llm.instruction) for one in manifest.read("team.yaml", text)
    ]


async def test_a_refusal_of_the_server_names_the_line_and_the_others_are_applied(
    served: Running, tmp_path: Path
) -> None:
    file = tmp_path / "team.yaml"
    file.write_text(TEAM + "---\nname: broken\nllm:\n  instruction: '{% if %}'\n  tools:\n    - name: t\n")
    done = await notecase(*apply(served, "-f", str(file)))
    assert (1, "agents/detective created\nagents/clerk created\n") == done[:2]
    assert f"{file}:30: agents/broken.llm.tools[0]: " in done.err
    assert f"{file}:28: agents/broken.llm.instruction: " in done.err
    file.write_text("name: a\nnmae: b\n")
    done = await notecase(*apply(served, "-f", str(file), "-f", str(tmp_path / "none")))
    assert (2, "") == done[:2]
    assert f"{file}:2: nmae: " in done.err
    assert f"{tmp_path}/none: No such file or directory." in done.err


async def test_an_edit_that_comes_too_late_is_kept(
    served: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another change came first, or the server is away."""

    late = NotecaseError(grpc.StatusCode.ABORTED, "ETAG_MISMATCH", "It was changed.")
    errors = [late, NotecaseError(grpc.StatusCode.UNAVAILABLE, "", "It is away.")]

    async def refuse(client: Client, agent: v1.Agent) -> v1.Agent:
        raise errors.pop()

    monkeypatch.setenv("EDITOR", "ed")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(click, "edit", lambda text, extension: text.replace("Teach.", "Teach well."))
    monkeypatch.setattr(applying, "_put", refuse)
    async with served.client() as client:
        await client.put_agent("tutor", "Teach.")
        while errors:
            with pytest.raises(NotecaseError, match=r"It (was changed|is away)\."):
                await applying.edit(client, "agents/tutor")
            (kept,) = tmp_path.glob("tutor-*.yaml")
            assert "Teach well." in kept.read_text()
            assert f"`notecase agents apply {kept}` applies it." in capsys.readouterr().err
            kept.unlink()


async def test_an_agent_is_created_edited_and_deleted(served: Running, tmp_path: Path) -> None:
    """The editor may be any program; mistakes are shown, and the text can be edited again."""
    env = {"NOTECASE_ADDRESS": served.address}
    done = await notecase("agents", "create", "tutor", "--instruction", "-", "--model", "m", said="Teach.", env=env)
    assert (0, "agents/tutor\n", "") == tuple(done)
    editor = tmp_path / "editor"
    wrong, right = 'sed -i "s/model: m/modle: m2/" "$1"', 'sed -i "s/modle/model/" "$1"'
    editor.write_text(f'#!/bin/sh\nif grep -q modle "$1"; then {right}; else {wrong}; fi\n')
    editor.chmod(0o700)
    async with terminal("agents", "edit", "tutor", env={**env, "EDITOR": str(editor)}) as screen:
        await screen.until("llm.modle: there is no such field; 'model' may be meant.")
        await screen.until("Edit it again? [Y/n]:")
        await screen.type("\r")
        await screen.until("agents/tutor changed to revision 2")
        assert 0 == await screen.ended()
    assert "m2" == (await get(served, "agents/tutor")).llm.model
    assert (2, True) == ((done := await notecase("agents", "edit", "tutor", env=env)).code, "or an EDITOR" in done.err)
    done = await notecase("agents", "edit", "tutor", env={**env, "EDITOR": 'sed -i "s/model: m2/modle: m3/"'})
    assert (1, True) == (done.code, "there is no such field" in done.err)
    kept = re.search(r"The edited text is in (\S+/tutor-\S+\.yaml);", done.err)
    assert kept is not None
    assert "modle: m3" in Path(kept[1]).read_text()
    done = await notecase("agents", "edit", "tutor", env={**env, "EDITOR": 'sed -i "s/model: m2/model: m3/"'})
    assert (0, "agents/tutor changed to revision 3\n", "") == tuple(done)
    done = await notecase("agents", "delete", "tutor", env=env)
    assert (2, True) == (done.code, "add --yes" in done.err)
    assert (0, "", "") == await notecase("agents", "delete", "tutor", "--yes", env=env)
    done = await notecase("agents", "show", "tutor", env=env)
    assert (1, f"Error: {missing('agents/tutor')}\n") == (done.code, done.err)

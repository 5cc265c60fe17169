"""One conversation with notecase over the generated stubs, without asyncio: an agent, a session, a streamed reply, the
log, and an error told by its reason.

    python examples/python_sync.py 127.0.0.1:7420
"""

import sys
from collections.abc import Iterable, Iterator

import grpc
from notecase import NotecaseError, v1


def events(stream: Iterable[v1.RunResponse]) -> Iterator[v1.Event]:
    """The events of a stream, until the server ends it."""
    for frame in stream:
        yield from frame.batch.events


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def converse(channel: grpc.Channel) -> None:
    agents, sessions = v1.AgentServiceStub(channel), v1.SessionServiceStub(channel)
    runs = v1.RunServiceStub(channel)

    llm = v1.LlmAgent(provider="offline", instruction="You are a detective.")
    # The first time it is created, and this program can be run again.
    agent = agents.UpdateAgent(
        v1.UpdateAgentRequest(agent=v1.Agent(name="agents/detective", llm=llm), allow_missing=True)
    )
    session = sessions.CreateSession(v1.CreateSessionRequest(session=v1.Session(agent=agent.name)))
    say(f"Opened {session.name}.\n")

    question = v1.Message(parts=[v1.Part(text="Where do we begin?")])
    start = v1.StartRun(session=session.name, messages=[question])
    # The commands end after the start; the reply comes nonetheless.
    for event in events(runs.Run(iter([v1.RunRequest(start=start)]))):
        say(event.block_delta.text)
        if event.HasField("message_discarded"):  # The reply begins anew.
            say("\n")

    # A stream that broke is taken up after the last sequence seen; after 0 comes the whole log.
    log = runs.WatchEvents(v1.WatchEventsRequest(name=session.name, after_sequence=0))
    say(f"\nThe log has {sum(1 for _ in events(log))} events.\n")

    try:
        sessions.GetSession(v1.GetSessionRequest(name="sessions/nobody"))
    except grpc.RpcError as error:
        refusal = NotecaseError.from_rpc_error(error)
        say(f"{refusal.reason}: {refusal.message}\n")


if __name__ == "__main__":
    with grpc.insecure_channel(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:7420") as connected:
        converse(connected)

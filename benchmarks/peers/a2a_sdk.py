"""The A2A SDK over gRPC, with its tasks in memory: `python -m benchmarks.peers.a2a_sdk FILE`, whose FILE is not used.

A turn is a SendStreamingMessage that names the model in its metadata. Each token is a piece of the task's artifact. The
SDK keeps tasks; what was said in a context before is the executor's to keep, here in a list.
"""

import asyncio
import sys
from collections import defaultdict
from typing import Any

import grpc
import openai
from a2a.helpers.proto_helpers import new_task_from_user_message
from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.events import EventQueue
from a2a.server.request_handlers import DefaultRequestHandler, GrpcHandler
from a2a.server.tasks import InMemoryTaskStore, TaskUpdater
from a2a.types import AgentCard, Part, a2a_pb2, a2a_pb2_grpc
from grpc_reflection.v1alpha import reflection

SERVICE = a2a_pb2.DESCRIPTOR.services_by_name["A2AService"].full_name


class Detective(AgentExecutor):
    def __init__(self) -> None:
        self._model = openai.AsyncOpenAI()
        self._said: dict[str, list[Any]] = defaultdict(lambda: [{"role": "system", "content": "You are a detective."}])

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        if context.current_task is None:
            await event_queue.enqueue_event(new_task_from_user_message(context.message))
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        await updater.start_work()
        said = self._said[context.context_id]
        said.append({"role": "user", "content": context.get_user_input()})
        stream = await self._model.chat.completions.create(model=context.metadata["model"], messages=said, stream=True)
        reply = ""
        async for chunk in stream:
            if chunk.choices and (token := chunk.choices[0].delta.content):
                await updater.add_artifact([Part(text=token)], artifact_id="reply", append=bool(reply))
                reply += token
        said.append({"role": "assistant", "content": reply})
        await updater.complete()

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        await TaskUpdater(event_queue, context.task_id, context.context_id).cancel()


async def serve() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    card = AgentCard(name="Detective", description="Answers questions about a case.", version="1.0.0")
    card.capabilities.streaming = True
    card.default_input_modes.append("text")
    card.default_output_modes.append("text")
    card.skills.add(id="detective", name="Detective", description="Answers questions.", tags=["case"])
    card.supported_interfaces.add(protocol_binding="GRPC", protocol_version="1.0", url=f"127.0.0.1:{port}")
    handler = DefaultRequestHandler(agent_executor=Detective(), task_store=InMemoryTaskStore(), agent_card=card)
    a2a_pb2_grpc.add_A2AServiceServicer_to_server(GrpcHandler(handler), server)
    # The caller has none of the SDK's stubs, and learns its messages from here.
    reflection.enable_server_reflection((SERVICE, reflection.SERVICE_NAME), server)
    await server.start()
    sys.stdout.write(f"listening on port {port}\n")
    sys.stdout.flush()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve())

// One conversation with notecase from TypeScript: an agent, a session, a streamed reply, the log, and an error told by its
// reason.
//
//     npm install && npm run build && npm start -- 127.0.0.1:7420
import type { MessageInitShape } from "@bufbuild/protobuf";
import { ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { ErrorInfoSchema } from "./gen/google/rpc/error_info_pb.js";
import { AgentService } from "./gen/notecase/v1/agent_pb.js";
import type { MessageSchema } from "./gen/notecase/v1/message_pb.js";
import { type Event, type RunRequestSchema, type RunResponse, RunService } from "./gen/notecase/v1/run_pb.js";
import { SessionService } from "./gen/notecase/v1/session_pb.js";

const address = process.argv[2] ?? "127.0.0.1:7420";
const transport = createGrpcTransport({ baseUrl: `http://${address}` });
const agents = createClient(AgentService, transport);
const sessions = createClient(SessionService, transport);
const runs = createClient(RunService, transport);

const agent = await agents.updateAgent({
  agent: {
    name: "agents/detective",
    kind: { case: "llm", value: { provider: "offline", instruction: "You are a detective." } },
  },
  allowMissing: true, // The first time it is created, and this program can be run again.
});
const session = await sessions.createSession({ session: { agent: agent.name } });
console.log(`Opened ${session.name}.`);

async function* commands(): AsyncGenerator<MessageInitShape<typeof RunRequestSchema>> {
  const question: MessageInitShape<typeof MessageSchema> = {
    parts: [{ kind: { case: "text", value: "Where do we begin?" } }],
  };
  yield { command: { case: "start", value: { session: session.name, messages: [question] } } };
  // No command follows; the reply comes nonetheless.
}

async function* events(stream: AsyncIterable<RunResponse>): AsyncGenerator<Event> {
  for await (const { frame } of stream) {
    if (frame.case === "batch") yield* frame.value.events;
  }
}

for await (const { payload } of events(runs.run(commands()))) {
  if (payload.case === "blockDelta" && payload.value.delta.case === "text") {
    process.stdout.write(payload.value.delta.value);
  } else if (payload.case === "messageDiscarded") {
    process.stdout.write("\n"); // The reply begins anew.
  }
}

// A stream that broke is taken up after the last sequence seen; after 0 comes the whole log.
let count = 0;
for await (const _ of events(runs.watchEvents({ name: session.name, afterSequence: 0n }))) count += 1;
console.log(`\nThe log has ${count} events.`);

try {
  await sessions.getSession({ name: "sessions/nobody" });
} catch (error) {
  const refusal = ConnectError.from(error);
  for (const info of refusal.findDetails(ErrorInfoSchema)) console.log(`${info.reason}: ${refusal.rawMessage}`);
}

// One conversation with notecase from TypeScript: an agent, a session, a streamed reply, the log, and an error read by its
// reason.
//
//     (cd ../../client/typescript && npm install && npm run build)
//     npm install && npm run build && npm start -- 127.0.0.1:7420
import { connect, createClient, fromEnvironment, NotecaseError, start, watch } from "notecase";
import { AgentService, SessionService } from "notecase/v1";

const [address, options] = fromEnvironment();
const transport = connect(process.argv[2] ?? address, options);
const agents = createClient(AgentService, transport);
const sessions = createClient(SessionService, transport);

const agent = await agents.updateAgent({
  agent: {
    name: "agents/detective",
    kind: { case: "llm", value: { provider: "offline", instruction: "You are a detective." } },
  },
  allowMissing: true, // The first time it is created, and this program can be run again.
});
const session = await sessions.createSession({ session: { agent: agent.name } });
console.log(`Opened ${session.name}.`);

const run = await start(transport, {
  session: session.name,
  messages: [{ parts: [{ kind: { case: "text", value: "Where do we begin?" } }] }],
});
// A connection that breaks is made again, and the stream goes on where it was.
for await (const text of run.text()) process.stdout.write(text);

// After sequence 0 comes the whole log.
let count = 0;
for await (const _ of watch(transport, { name: session.name, afterSequence: 0n }).events()) count += 1;
console.log(`\nThe log has ${count} events.`);

try {
  await sessions.getSession({ name: "sessions/nobody" });
} catch (error) {
  console.log(`${NotecaseError.from(error)}`);
}

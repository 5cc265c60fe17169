// A tool in this process: starts a run whose agent may search, and answers its calls. With the name of a run it comes back to that
// run, which may have been waiting for a search since an earlier process ended.
//
//     node build/tool.js 127.0.0.1:7420 [sessions/SESSION/runs/RUN]
import { connect, createClient, fromEnvironment, NotecaseError, repeat, type Stream, start, watch } from "notecase";
import { AgentService, Message_Role, RunService, type ToolCall } from "notecase/v1";
import type * as v1 from "notecase/v1";

const search = (what: string) => `A ${what} was seen at the harbour.`;

const declared = {
  name: "search",
  description: "Searches yesterday's papers.",
  parameters: '{"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]}',
  implementation: { case: "client" as const, value: {} },
};

const [address, options] = fromEnvironment();
const transport = connect(process.argv[2] ?? address, options);
const runs = createClient(RunService, transport);

// A call may come twice: as pending when the stream attaches, and as an event.
const begun = new Set<string>();

async function answer({ session, run }: v1.Attached, { callId, tool, arguments: json }: ToolCall): Promise<void> {
  if (tool !== "search" || begun.has(callId)) return;
  begun.add(callId);
  let outcome: { result: { kind: { case: "text"; value: string } }[] } | { error: string };
  try {
    outcome = { result: [{ kind: { case: "text", value: search(JSON.parse(json).what) } }] };
  } catch (error) {
    outcome = { error: `The arguments do not fit: ${error}` };
  }
  // Sent twice, it takes effect once.
  const command = { commandId: `result-${callId}`, command: { case: "toolResult" as const, value: { callId, ...outcome } } };
  try {
    await repeat(() => runs.sendCommand({ session, run: run?.name, command }));
  } catch (error) {
    if (NotecaseError.from(error).reason !== "CALL_NOT_PENDING") throw error; // Another process answered first.
  }
}

async function onAttached(attached: v1.Attached): Promise<void> {
  for (const call of attached.run?.pendingCalls ?? []) await answer(attached, call);
}

async function begin(): Promise<Stream> {
  const agent = await createClient(AgentService, transport).updateAgent({
    agent: { name: "agents/reader", kind: { case: "llm", value: { provider: "offline" } } }, // It calls what it is told to call.
    allowMissing: true,
  });
  const ask = { kind: { case: "text" as const, value: '/call search {"what": "violin"}' } };
  const asked = { newSession: { agent: agent.name }, messages: [{ parts: [ask] }], clientTools: [declared] };
  return start(transport, asked, { onAttached });
}

const run = process.argv[3] ? watch(transport, { name: process.argv[3] }, { onAttached }) : await begin();
for await (const { payload } of run.events()) {
  if (payload.case === "toolStarted" && payload.value.clientExecuted && run.attached) await answer(run.attached, payload.value);
  if (payload.case !== "messageAdded" || payload.value.role !== Message_Role.ASSISTANT) continue;
  for (const { kind } of payload.value.parts) if (kind.case === "text") console.log(kind.value);
}

import assert from "node:assert/strict";
import { createServer } from "node:http2";
import type { AddressInfo } from "node:net";
import { test } from "node:test";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { connectNodeAdapter } from "@connectrpc/connect-node";
import { type ConnectOptions, connect } from "../connection.js";
import { NotecaseError, repeat } from "../errors.js";
import { BadRequestSchema, ErrorInfoSchema, ResourceInfoSchema, RetryInfoSchema } from "../gen/google/rpc/error_details_pb.js";
import { ErrorReason } from "../gen/notecase/v1/content_pb.js";
import { Message_Role } from "../gen/notecase/v1/message_pb.js";
import { type Attached, type EventSchema, type RunResponseSchema, Run_State, RunService } from "../gen/notecase/v1/run_pb.js";
import { type Stream, start, watch } from "../stream.js";

type Event = MessageInitShape<typeof EventSchema>;
/**
 * The events of one call of watchEvents, in one batch, how it ends, and the run when it attaches: the id of a call that waits, and
 * its state. One that lasts ends with its caller.
 */
type Script = { events: Event[]; end?: ConnectError; waiting?: string; state?: Run_State; lasts?: boolean };

const RUN = "sessions/s/runs/r";
const backoff = { firstMs: 1 };

/** A server that plays one script for each call of watchEvents, and what its calls asked for. */
async function serve(scripts: Script[], play: (address: string, told: Told) => Promise<void>): Promise<void> {
  const told: Told = { after: [], tokens: [], requestIds: [], uids: [], left: 0 };
  const handler = connectNodeAdapter({
    routes(router) {
      router.service(RunService, {
        createRun({ requestId }) {
          told.requestIds.push(requestId);
          if (told.requestIds.length === 1) throw new ConnectError("away", Code.Unavailable);
          return { name: RUN, firstSequence: 1n };
        },
        async *watchEvents({ afterSequence = 0n, ifSessionUid }, { requestHeader, signal }): AsyncGenerator<MessageInitShape<typeof RunResponseSchema>> {
          const script = scripts[told.after.length];
          told.after.push(afterSequence);
          told.uids.push(ifSessionUid);
          told.tokens.push(requestHeader.get("authorization"));
          if (!script) throw new ConnectError("one call too many", Code.FailedPrecondition);
          const pendingCalls = script.waiting ? [{ callId: script.waiting }] : [];
          yield { frame: { case: "attached", value: { session: "sessions/s", sessionUid: "uid", run: { name: RUN, pendingCalls, state: script.state }, lastSequence: 2n } } };
          yield { frame: { case: "batch", value: { events: script.events } } };
          if (script.lasts) {
            await new Promise<void>((aborted) => (signal.aborted ? aborted() : signal.addEventListener("abort", () => aborted())));
            told.left += 1;
          }
          if (script.end) throw script.end;
        },
      });
    },
  });
  const server = createServer(handler);
  const sessions = new Set<{ destroy(): void }>();
  server.on("session", (session) => sessions.add(session));
  await new Promise<void>((listening) => server.listen(0, "127.0.0.1", listening));
  try {
    await play(`127.0.0.1:${(server.address() as AddressInfo).port}`, told);
  } finally {
    for (const session of sessions) session.destroy();
    server.close();
  }
}

interface Told {
  after: bigint[];
  tokens: (string | null)[];
  requestIds: string[];
  uids: string[];
  /** How many calls their caller has ended. */
  left: number;
}

/** Returns once this holds. */
async function until(holds: () => boolean): Promise<void> {
  while (!holds()) await new Promise((turn) => setImmediate(turn));
}

const event = (sequence: bigint): Event => ({ sequence, payload: { case: "usage", value: {} } });
const delta = (start: bigint, text: string): Event => {
  const end = start + BigInt(Buffer.byteLength(text));
  return { run: RUN, payload: { case: "blockDelta", value: { message: "sessions/s/messages/a", start, end, delta: { case: "text", value: text } } } };
};

async function sequences(stream: Stream): Promise<bigint[]> {
  const found: bigint[] = [];
  for await (const { sequence } of stream.events()) found.push(sequence);
  return found;
}

const follow = (address: string, options?: ConnectOptions) => watch(connect(address, options), { name: RUN }, { backoff });

test("a text goes on after the last event", async () => {
  const cut = new ConnectError("cut", Code.Unavailable);
  const scripts = [
    { events: [event(1n), event(2n), delta(0n, "Grü")], end: cut },
    { events: [delta(0n, "Grüße"), delta(7n, "!"), event(3n)] },
  ];
  await serve(scripts, async (address, told) => {
    const run = await start(connect(address), {}, { backoff });
    let said = "";
    for await (const text of run.text()) said += text;
    assert.equal(said, "Grüße!");
    assert.deepEqual(told.after, [0n, 2n]);
    assert.equal(run.view.lastSequence, 3n);
    // A start that is repeated has the request id of the first.
    assert.equal(told.requestIds.length, 2);
    assert.equal(new Set(told.requestIds).size, 1);
  });
});

test("a text has only the words of its run", async () => {
  const message = "sessions/s/messages/before";
  const text = { case: "text", value: "Not mine." } as const;
  const other: Event = { run: "sessions/s/runs/before", payload: { case: "blockDelta", value: { message, end: 9n, delta: text } } };
  const events = [other, delta(0n, "Mine.")];
  for (const [name, expected] of [[RUN, "Mine."], ["sessions/s", "Not mine.\n\nMine."]]) {
    await serve([{ events }], async (address) => {
      let said = "";
      for await (const piece of watch(connect(address), { name }, { backoff }).text()) said += piece;
      assert.equal(said, expected);
    });
  }
});

test("leaving the loop ends the stream, however it is left", async () => {
  const broken = new Error("broken");
  const ways: ((stream: Stream) => Promise<void>)[] = [
    async (stream) => {
      for await (const _ of stream.events()) break;
    },
    async (stream) => {
      for await (const _ of stream.text()) break;
    },
    async (stream) => {
      for await (const _ of stream.events()) throw broken;
    },
  ];
  for (const leave of ways) {
    await serve([{ events: [event(1n), delta(0n, "Grüße")], lasts: true }], async (address, told) => {
      await leave(follow(address)).catch((error) => assert.equal(error, broken));
      await until(() => told.left === 1);
    });
  }
  const onAttached = () => {
    throw broken;
  };
  await serve([{ events: [], lasts: true }], async (address, told) => {
    await assert.rejects(sequences(watch(connect(address), { name: RUN }, { backoff, onAttached })));
    await until(() => told.left === 1);
  });
  await serve([{ events: [event(2n)], lasts: true }, { events: [event(1n)] }], async (address, told) => {
    assert.deepEqual(await sequences(follow(address)), [1n]);
    await until(() => told.left === 1);
  });
});

test("a stream attaches again to the same session", async () => {
  const end = new ConnectError("cut", Code.Unavailable);
  await serve([{ events: [event(1n)], end }, { events: [event(2n)] }], async (address, told) => {
    assert.deepEqual(await sequences(follow(address)), [1n, 2n]);
    assert.deepEqual(told.uids, ["", "uid"]);
  });
});

test("a reader that was too slow attaches again", async () => {
  const slow = new ConnectError("too slow", Code.ResourceExhausted, undefined, [
    { desc: ErrorInfoSchema, value: { domain: "notecase.dev", reason: "WATCHER_TOO_SLOW" } },
    { desc: RetryInfoSchema, value: { retryDelay: { nanos: 1_000_000 } } },
  ]);
  const full = new ConnectError("too many pending requests", Code.ResourceExhausted);
  const quota = new ConnectError("full", Code.ResourceExhausted, undefined, [
    { desc: ErrorInfoSchema, value: { domain: "notecase.dev", reason: "QUOTA_EXCEEDED" } },
  ]);
  const scripts = [{ events: [event(1n)], end: slow }, { events: [event(2n)], end: full }, { events: [event(3n)], end: quota }];
  await serve(scripts, async (address, told) => {
    await assert.rejects(sequences(follow(address)), { reason: "QUOTA_EXCEEDED" });
    assert.deepEqual(told.after, [0n, 1n, 2n]);
  });
});

test("a text without deltas has the messages", async () => {
  const message = { name: "sessions/s/messages/a", role: Message_Role.ASSISTANT, parts: [{ kind: { case: "text", value: "Hello there." } }] } as const;
  const added: Event = { sequence: 3n, run: RUN, payload: { case: "messageAdded", value: { ...message, parts: [...message.parts] } } };
  for (const deltas of [[], [delta(0n, "Hello")], [delta(0n, "Hello"), delta(5n, " there.")]]) {
    await serve([{ events: [event(1n), event(2n), ...deltas, added] }], async (address) => {
      let said = "";
      for await (const piece of follow(address).text()) said += piece;
      assert.equal(said, "Hello there.");
    });
  }
});

test("a message that cannot be sent is not repeated", async () => {
  await serve([], async (address) => {
    let calls = 0;
    const call = () => {
      calls += 1;
      return createClient(RunService, connect(address)).createRun({ start: { onBusy: "QUEUE" as never } });
    };
    await assert.rejects(repeat(call, { firstMs: 0 }), NotecaseError);
    assert.equal(calls, 1);
  });
});

test("a gap is asked for again", async () => {
  await serve([{ events: [event(1n), event(3n)] }, { events: [event(2n), event(3n)] }], async (address, told) => {
    assert.deepEqual(await sequences(follow(address)), [1n, 2n, 3n]);
    assert.deepEqual(told.after, [0n, 1n]);
  });
});

test("a token that expired is asked for once more", async () => {
  const end = new ConnectError("The token has expired.", Code.Unauthenticated);
  const scripts = [{ events: [event(1n)], end }, { events: [event(2n)], end }, { events: [], end }];
  await serve(scripts, async (address, told) => {
    let asked = 0;
    const token = async () => `token-${(asked += 1)}`;
    await assert.rejects(sequences(follow(address, { token })), { code: Code.Unauthenticated });
    assert.deepEqual(told.tokens, ["Bearer token-1", "Bearer token-2", "Bearer token-3"]);
  });
});

test("a refusal ends the stream at once, and has what its details say", async () => {
  const end = new ConnectError("gone", Code.NotFound, undefined, [
    { desc: ErrorInfoSchema, value: { domain: "notecase.dev", reason: "SESSION_NOT_FOUND", metadata: { a: "b" } } },
    { desc: BadRequestSchema, value: { fieldViolations: [{ field: "name", description: "wrong" }] } },
    { desc: RetryInfoSchema, value: { retryDelay: { seconds: 2n, nanos: 500_000_000 } } },
  ]);
  await serve([{ events: [], end }], async (address, told) => {
    const error = await sequences(follow(address)).then(() => assert.fail(), NotecaseError.from);
    assert.equal(`${error}`, "SESSION_NOT_FOUND: gone");
    assert.deepEqual(error.metadata, { a: "b" });
    assert.equal(error.violations[0]?.field, "name");
    assert.equal(error.retryAfterMs, 2500);
    assert.equal(told.after.length, 1);
  });
});

test("a failed run ends its text", async () => {
  const error = { code: 13, reason: ErrorReason.MODEL_ERROR, message: "No such model." };
  const failed: Event = { sequence: 1n, run: RUN, payload: { case: "runStateChanged", value: { state: Run_State.FAILED, error } } };
  await serve([{ events: [failed] }], async (address) => {
    await assert.rejects(async () => {
      for await (const _ of follow(address).text());
    }, { reason: "MODEL_ERROR", code: Code.Internal });
  });
});

test("a signal ends the stream", async () => {
  await serve([{ events: [event(1n)], end: new ConnectError("away", Code.Unavailable) }], async (address) => {
    const control = new AbortController();
    const stream = watch(connect(address), { name: RUN }, { signal: control.signal });
    await assert.rejects(async () => {
      for await (const _ of stream.events()) control.abort();
    }, { name: "AbortError" });
  });
});

test("a stream tells of each attachment before its events", async () => {
  const cut = new ConnectError("cut", Code.Unavailable);
  await serve([{ events: [event(1n)], end: cut, waiting: "call-1" }, { events: [], waiting: "call-1" }], async (address) => {
    const order: string[] = [];
    const onAttached = (attached: Attached) => {
      order.push(attached.run?.pendingCalls[0]?.callId ?? "");
    };
    for await (const { sequence } of watch(connect(address), { name: RUN }, { backoff, onAttached }).events()) order.push(`${sequence}`);
    assert.deepEqual(order, ["call-1", "1", "call-1"]);
  });
});

test("what onAttached throws ends the stream", async () => {
  await serve([{ events: [event(1n)] }], async (address, told) => {
    const onAttached = () => Promise.reject(new Error("mine"));
    await assert.rejects(sequences(watch(connect(address), { name: RUN }, { backoff, onAttached })), { message: "mine" });
    assert.equal(told.after.length, 1);
  });
});

test("a cancelled run ends its text with an error", async () => {
  const cancelled: Event = { sequence: 1n, run: RUN, payload: { case: "runStateChanged", value: { state: Run_State.CANCELLED } } };
  for (const script of [{ events: [delta(0n, "Half"), cancelled] }, { events: [], state: Run_State.CANCELLED }]) {
    await serve([script], async (address) => {
      await assert.rejects(async () => {
        for await (const _ of follow(address).text());
      }, { name: "NotecaseError", code: Code.Canceled, message: `${RUN} was cancelled.`, mayPass: false });
    });
  }
});

test("the text of a session goes on after a cancelled run", async () => {
  const value = { state: Run_State.CANCELLED };
  const cancelled: Event = { sequence: 1n, run: RUN, payload: { case: "runStateChanged", value } };
  await serve([{ events: [cancelled, delta(0n, "Next.")], state: Run_State.CANCELLED }], async (address) => {
    let said = "";
    for await (const piece of watch(connect(address), { name: "sessions/s" }, { backoff }).text()) said += piece;
    assert.equal(said, "Next.");
  });
});

test("a stream has its run before it is followed", async () => {
  await serve([{ events: [event(1n)] }], async (address) => {
    const run = await start(connect(address), {}, { backoff });
    assert.equal(run.attached?.session, "sessions/s");
    assert.equal(run.attached?.run?.name, RUN);
    assert.deepEqual(await sequences(run), [1n]);
  });
});

test("a text goes on after a delta", async () => {
  const name = "sessions/s/messages/a";
  const text = (value: string) => ({ kind: { case: "text", value } }) as const;
  const parts = [text("Shown. "), text("Grüße")];
  const whole: Event = { sequence: 1n, run: RUN, payload: { case: "messageAdded", value: { name, role: Message_Role.ASSISTANT, parts } } };
  const value = { message: name, block: 1, end: 7n, delta: { case: "text", value: "Grüße" } } as const;
  const second: Event = { run: RUN, payload: { case: "blockDelta", value } };
  for (const events of [[delta(0n, "Shown. "), second], [whole]]) {
    await serve([{ events }], async (address) => {
      let said = "";
      for await (const piece of follow(address).text({ message: name, block: 1, end: 4n })) said += piece;
      assert.equal(said, "ße");
    });
  }
});

test("a text after a delta leaves out the messages before", async () => {
  const added = (sequence: bigint, name: string, value: string): Event => {
    const parts = [{ kind: { case: "text", value } }] as const;
    const message = { name: `sessions/s/messages/${name}`, role: Message_Role.ASSISTANT, parts: [...parts] };
    return { sequence, run: RUN, payload: { case: "messageAdded", value: message } };
  };
  const cases: [Event[], string][] = [
    [[added(1n, "one", "One."), event(2n), delta(0n, "Grüße")], "ße"],
    [[added(1n, "one", "One."), added(2n, "a", "Grüße")], "ße"],
    [[added(1n, "one", "One."), event(2n), added(3n, "two", "")], "\n\nOne."],
    [[added(1n, "one", "One.")], "\n\nOne."],
  ];
  for (const [events, expected] of cases) {
    await serve([{ events, state: Run_State.RUNNING }], async (address) => {
      let said = "";
      const after = { message: "sessions/s/messages/a", block: 0, end: 4n };
      for await (const piece of follow(address).text(after)) said += piece;
      assert.equal(said, expected);
    });
  }
});

test("a call throws an error with its details", async () => {
  const end = new ConnectError("gone", Code.NotFound, undefined, [
    { desc: ErrorInfoSchema, value: { domain: "notecase.dev", reason: "SESSION_NOT_FOUND" } },
    { desc: ResourceInfoSchema, value: { resourceType: "notecase.dev/Session", resourceName: "sessions/s" } },
  ]);
  await serve([{ events: [event(1n)], end }], async (address) => {
    const runs = createClient(RunService, connect(address));
    const found: bigint[] = [];
    const read = async () => {
      for await (const { frame } of runs.watchEvents({})) if (frame.case === "batch") found.push(...frame.value.events.map((it) => it.sequence));
    };
    const gone = { name: "NotecaseError", reason: "SESSION_NOT_FOUND", message: "gone" };
    await assert.rejects(read(), { ...gone, resource: { type: "notecase.dev/Session", name: "sessions/s" } });
    assert.deepEqual(found, [1n]);
    await assert.rejects(runs.createRun({}), { name: "NotecaseError", code: Code.Unavailable, message: "away" });
  });
});

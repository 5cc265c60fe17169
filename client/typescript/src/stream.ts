import { randomUUID } from "node:crypto";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { type Client, Code, createClient, type Transport } from "@connectrpc/connect";
import { type Backoff, NotecaseError, pause, repeat } from "./errors.js";
import type { Part } from "./gen/notecase/v1/content_pb.js";
import { Message_Role } from "./gen/notecase/v1/message_pb.js";
import {
  type Attached,
  type BlockDelta,
  type Event,
  Run_State,
  RunService,
  type StartRunSchema,
  type WatchEventsRequestSchema,
} from "./gen/notecase/v1/run_pb.js";
import { Gap, View } from "./view.js";

export interface StreamOptions {
  /** Ends the start and the stream, and nothing else: the run goes on. */
  signal?: AbortSignal;
  /** How patiently the stream attaches again, counted from the last event of the log that came. */
  backoff?: Backoff;
  /**
   * Called, and awaited, each time the stream has attached, before the events that follow. `attached.run` then has the calls and
   * questions that wait: a run that is WAITING may send no event until one of them is answered. What it throws ends the stream.
   */
  onAttached?: (attached: Attached) => void | Promise<void>;
}

/**
 * Starts a run and returns the stream of its events. The start is repeated, and takes effect once, while the server is away.
 * Throws a NotecaseError when the server refuses it.
 */
export async function start(
  transport: Transport,
  start: MessageInitShape<typeof StartRunSchema>,
  options: StreamOptions = {},
): Promise<Stream> {
  const { signal, backoff } = options;
  const runs = createClient(RunService, transport);
  const requestId = randomUUID();
  const run = await repeat(() => runs.createRun({ start, requestId }, { signal }), backoff, signal);
  const afterSequence = run.firstSequence > 0n ? run.firstSequence - 1n : 0n;
  return watch(transport, { name: run.name, afterSequence, options: start.options }, options);
}

/**
 * Returns the stream of a run or of a session, as WatchEvents describes it. After a stream of another process that is
 * `afterSequence`: its `view.lastSequence`. `text` then gives a message that is unfinished from its beginning.
 */
export function watch(
  transport: Transport,
  request: MessageInitShape<typeof WatchEventsRequestSchema>,
  options: StreamOptions = {},
): Stream {
  return new Stream(createClient(RunService, transport), request, options);
}

/**
 * Follows a run or a session: `events` and `text` attach, and attach again after the last event that they gave out when the
 * connection breaks, the server restarts, or the token expires and its function has another one. Leaving the loop ends the
 * stream and nothing else: the run goes on. `start` and `watch` make it; it is followed once.
 */
export class Stream {
  /** What the events given out so far tell. */
  readonly view: View;
  /** The first frame of the newest stream. */
  attached?: Attached;

  constructor(
    private readonly runs: Client<typeof RunService>,
    private readonly request: MessageInitShape<typeof WatchEventsRequestSchema>,
    private readonly options: StreamOptions = {},
  ) {
    this.view = new View(request.afterSequence);
  }

  /**
   * Gives the events of the log in the order of their sequence, each once, and passing events (sequence 0) between them. Open
   * blocks come again whole after the stream has attached again; `view` knows. Ends as WatchEvents does: with the run, unless
   * `keepOpen` says otherwise. Throws a NotecaseError.
   */
  async *events(): AsyncGenerator<Event, void, void> {
    for await (const frame of this.#follow()) {
      if (frame.$typeName === "notecase.v1.Event") yield frame;
      else await this.options.onAttached?.(frame);
    }
  }

  async *#follow(): AsyncGenerator<Attached | Event, void, void> {
    const { signal, backoff = {} } = this.options;
    let failures = 0;
    let refused = false;
    for (;;) {
      try {
        const request = { ...this.request, afterSequence: this.view.lastSequence };
        for await (const { frame } of this.runs.watchEvents(request, { signal })) {
          if (frame.case === "attached") {
            this.#attach(frame.value);
            yield frame.value;
          } else if (frame.case === "heartbeat") failures = 0;
          else if (frame.case === "batch") {
            for (const event of frame.value.events) {
              if (!this.view.apply(event)) continue;
              if (event.sequence !== 0n) [failures, refused] = [0, false];
              yield event;
            }
          }
        }
        return;
      } catch (thrown) {
        const error = NotecaseError.from(thrown);
        // The next call may have another token.
        const renewed: boolean = error.code === Code.Unauthenticated && !refused && this.attached !== undefined;
        refused ||= renewed;
        const reached = error.tls === "suspected" && this.attached !== undefined;
        await pause(failures, error, backoff, signal, renewed || reached || thrown instanceof Gap);
        failures += 1;
      }
    }
  }

  /**
   * Gives what the agent says in the run, in pieces as they come; in a stream of a session, what is said in any of its runs.
   * Joined, the pieces of one message are its text exactly. When a model call is repeated the reply begins anew as another
   * message: as between any two messages, "\n\n" comes first. Throws a NotecaseError, also when the run fails.
   */
  async *text(): AsyncGenerator<string, void, void> {
    const given = new Map<string, number>(); // how many bytes of each block
    let speaking = "";
    for await (const { sequence, run, payload } of this.events()) {
      // The events of a queued run include those of the runs before it.
      if (this.request.name !== this.attached?.session && run !== this.attached?.run?.name) continue;
      const pieces: [message: string, block: number, start: number, text: string][] = [];
      if (payload.case === "blockDelta") {
        const { message, block, start, delta } = payload.value;
        pieces.push([message, block, Number(start), said(delta)]);
      } else if (payload.case === "messageAdded" && sequence <= (this.attached?.lastSequence ?? 0n)) {
        // A reply that was whole before the stream came has no deltas.
        const { name, role, parts } = payload.value;
        if (role === Message_Role.ASSISTANT) parts.forEach(({ kind }, block) => pieces.push([name, block, 0, said(kind)]));
      }
      for (const [message, block, start, text] of pieces) {
        const key = `${block} ${message}`;
        const bytes = Buffer.from(text);
        const have = Math.max(given.get(key) ?? 0, start);
        given.set(key, Math.max(have, start + bytes.length));
        const piece = bytes.subarray(have - start).toString();
        if (!piece) continue;
        if (speaking && speaking !== message) yield "\n\n";
        speaking = message;
        yield piece;
      }
      const failed = payload.case === "runStateChanged" && payload.value.state === Run_State.FAILED;
      if (failed && payload.value.error && run === this.attached?.run?.name) throw NotecaseError.fromProto(payload.value.error);
    }
  }

  #attach(attached: Attached): void {
    // Such a stream begins at the head of the session.
    if (this.view.lastSequence === undefined && this.request.name === attached.session) {
      this.view.lastSequence = attached.lastSequence;
    }
    this.attached = attached;
    this.view.attach(attached);
  }
}

/** The words in a delta or a part. */
function said(from: BlockDelta["delta"] | Part["kind"]): string {
  return from.case === "text" || from.case === "json" ? from.value : "";
}

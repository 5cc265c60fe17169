import { randomUUID } from "node:crypto";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { type Client, Code, createClient, type Transport } from "@connectrpc/connect";
import { type Backoff, isDraining, NotecaseError, pause, repeat } from "./errors.js";
import type { Part } from "./gen/notecase/v1/content_pb.js";
import { Message_Role } from "./gen/notecase/v1/message_pb.js";
import {
  type Attached,
  AttachedSchema,
  type BlockDelta,
  type Event,
  type Run,
  Run_State,
  RunService,
  type StartRunSchema,
  type WatchEventsRequestSchema,
} from "./gen/notecase/v1/run_pb.js";
import { type Piece, Text } from "./text.js";
import { Gap, View } from "./view.js";

export interface StreamOptions {
  /** Ends the start and the stream; the run continues. */
  signal?: AbortSignal;
  /** How the stream attaches again, counted from the last received event of the log. */
  backoff?: Backoff;
  /**
   * Called, and awaited, each time the stream has attached, before the events that follow. `attached.run` then has the
   * pending calls and inputs: a run that is WAITING may send no event until one of them is answered. An error that it
   * throws ends the stream.
   */
  onAttached?: (attached: Attached) => void | Promise<void>;
}

/**
 * Starts a run and returns the stream of its events. The start is repeated, and takes effect once, while the server is
 * unavailable. Throws a NotecaseError when the server refuses it.
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
  const stream = watch(transport, { name: run.name, afterSequence, options: start.options }, options);
  const session = run.name.slice(0, run.name.indexOf("/runs/"));
  stream.attached = create(AttachedSchema, { session, run, lastSequence: run.lastSequence });
  return stream;
}

/**
 * Returns the stream of a run or of a session, as WatchEvents describes it. To continue a stream of another process,
 * set `afterSequence` to its `view.lastSequence`, and `ifSessionUid` to its `attached.sessionUid`, so that a session that
 * was created again under the name is not taken for it. `text` then yields an unfinished message from its beginning, unless it
 * is called with the last delta.
 */
export function watch(
  transport: Transport,
  request: MessageInitShape<typeof WatchEventsRequestSchema>,
  options: StreamOptions = {},
): Stream {
  return new Stream(createClient(RunService, transport), request, options);
}

/**
 * Follows a run or a session. `events` and `text` attach, and attach again after the last event that they yielded when
 * the connection breaks, the server restarts, or the token expires and its function has a new one. Leaving the loop
 * ends only the stream: the run continues. `start` and `watch` return it; it can be followed once.
 */
export class Stream {
  /** The session's progress according to the events yielded so far. */
  readonly view: View;
  /**
   * The first frame of the newest stream. Before the stream has attached, it has the session and the run that `start` has
   * started, and is undefined after `watch`.
   */
  attached?: Attached;

  constructor(
    private readonly runs: Client<typeof RunService>,
    private readonly request: MessageInitShape<typeof WatchEventsRequestSchema>,
    private readonly options: StreamOptions = {},
  ) {
    this.view = new View(request.afterSequence);
  }

  /**
   * Yields the events of the log in the order of their sequence, each once, and transient events (sequence 0) between
   * them. After the stream has attached again, open blocks are sent again from their start; `view` handles that. Ends
   * as WatchEvents does: with the run, unless `keepOpen` is set. Throws a NotecaseError.
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
    for (let begun = Date.now(); ; ) {
      // Connect's streams do not end with the loop that reads them.
      const left = new AbortController();
      try {
        const request = { ...this.request, afterSequence: this.view.lastSequence };
        // A session that was made again under the name is another one.
        if (this.attached?.sessionUid) request.ifSessionUid = this.attached.sessionUid;
        const either = signal ? AbortSignal.any([signal, left.signal]) : left.signal;
        for await (const { frame } of this.runs.watchEvents(request, { signal: either })) {
          begun = Date.now();
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
        const behind = error.code === Code.ResourceExhausted && (error.retryAfterMs > 0 || !error.reason);
        await pause(failures, error, backoff, signal, renewed || reached || behind || thrown instanceof Gap);
        if (!isDraining(error, begun)) failures += 1;
      } finally {
        left.abort();
      }
    }
  }

  /**
   * Yields the agent's text in the run in pieces as they arrive; for a stream of a session, the text of all its runs. Joined,
   * the pieces of one message are exactly its text. When a model call is repeated, the reply starts again as a new message;
   * "\n\n" comes between two messages. Throws a NotecaseError, also when the run fails, and with the code Canceled when it is
   * cancelled; the text of a session continues with the next run.
   *
   * @param after The last delta of an earlier stream that the program has shown: the text begins after its `end`, and
   *   the messages before that one are left out.
   */
  async *text(after?: Pick<BlockDelta, "message" | "block" | "end">): AsyncGenerator<string, void, void> {
    const words = new Text(after);
    for await (const event of this.events()) {
      const { sequence, run, payload } = event;
      // The events of a queued run include those of the runs before it.
      if (this.request.name !== this.attached?.session && run !== this.attached?.run?.name) continue;
      const pieces: Piece[] = [];
      if (payload.case === "blockDelta") {
        const { message, block, start, delta } = payload.value;
        pieces.push({ message, block, start: Number(start), text: said(delta) });
      } else if (payload.case === "messageAdded") {
        // A reply that was whole before the stream came has no deltas, nor has any with `durableOnly`.
        const { name, role, parts } = payload.value;
        if (role === Message_Role.ASSISTANT) {
          parts.forEach(({ kind }, block) => pieces.push({ message: name, block, start: 0, text: said(kind) }));
        }
      }
      yield* words.add(event, pieces, this.#isOld(event));
      if (payload.case === "runStateChanged" && run === this.request.name) {
        if ([Run_State.FAILED, Run_State.CANCELLED].includes(payload.value.state)) yield* words.end();
        throwUnsuccessful(run, payload.value);
      }
    }
    yield* words.end();
    // A stream that attached after the run's end has no event of it.
    const run = this.attached?.run;
    if (run && run.name === this.request.name) throwUnsuccessful(run.name, run);
  }

  /** Whether an event precedes the deltas of the message that was unfinished when the stream attached. */
  #isOld({ sequence, payload }: Event): boolean {
    if (payload.case === "blockDelta" || !this.attached) return false;
    const { lastSequence, run } = this.attached;
    return sequence < lastSequence || (sequence === lastSequence && run?.state === Run_State.RUNNING);
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

/** Throws the error of a run that failed or was cancelled. */
function throwUnsuccessful(run: string, { state, error }: Pick<Run, "state" | "error">): void {
  if (state === Run_State.FAILED && error) throw NotecaseError.fromProto(error);
  if (state === Run_State.CANCELLED) throw NotecaseError.cancelled(run);
}

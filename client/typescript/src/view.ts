import type { Attached, BlockDelta, Event } from "./gen/notecase/v1/run_pb.js";

/** One part of a message that is being made. */
export interface Block {
  kind: NonNullable<BlockDelta["delta"]["case"]>;
  text: string;
  /** The length of `text` in bytes of UTF-8. */
  end: number;
  /** Whose the arguments are. */
  callId: string;
  tool: string;
}

/** Something is missing before an event: attach again after View.lastSequence. */
export class Gap extends Error {
  override readonly name = "Gap";
}

/** Where a program is in a session's log, and what is being written there. */
export class View {
  /** The blocks of messages that are being made, by message name and by the index of the part. */
  readonly open = new Map<string, Map<number, Block>>();
  /** The run that makes each open message. */
  readonly #writers = new Map<string, string>();

  /**
   * @param lastSequence That of the newest event of the log that was applied: where to attach again. 0: before the first event
   * of a log; undefined: the first event may have any sequence.
   */
  constructor(public lastSequence: bigint | undefined = 0n) {}

  /** Takes the first frame of a stream: forgets the open blocks, which the stream sends again whole. */
  attach(_attached?: Attached): void {
    this.open.clear();
    this.#writers.clear();
  }

  /**
   * Takes the next event and says whether it was new: an event of the log that was applied before is ignored. Throws a Gap, and
   * the view stays as it was, when an event or a piece of a block is missing before it.
   */
  apply(event: Event): boolean {
    if (event.sequence !== 0n) {
      const last = this.lastSequence ?? event.sequence - 1n;
      if (event.sequence <= last) return false;
      if (event.sequence !== last + 1n) throw new Gap(`event ${event.sequence} came after ${last}`);
      this.lastSequence = event.sequence;
    }
    const { payload } = event;
    if (payload.case === "blockDelta") {
      this.#grow(payload.value);
      this.#writers.set(payload.value.message, event.run);
    } else if (payload.case === "messageDiscarded") {
      this.#close(payload.value.message);
    } else if (payload.case === "messageAdded") {
      this.#close(payload.value.name);
    } else if (payload.case === "runStateChanged") {
      for (const [message, writer] of this.#writers) {
        if (writer === event.run || !writer || !event.run) this.#close(message);
      }
    }
    return true;
  }

  #close(message: string): void {
    this.open.delete(message);
    this.#writers.delete(message);
  }

  #grow({ message, block: index, start, end, delta, callId, tool }: BlockDelta): void {
    if (delta.case === undefined) return; // of a kind that this version does not know
    const blocks = this.open.get(message) ?? new Map<number, Block>();
    const known: Block | undefined = start === 0n ? { kind: delta.case, text: "", end: 0, callId, tool } : blocks.get(index);
    const grown = Number(start) + Buffer.byteLength(delta.value);
    if (known?.end !== Number(start) || grown !== Number(end)) {
      throw new Gap(`bytes ${start} to ${end} of block ${index} do not fit what came before`);
    }
    blocks.set(index, { ...known, text: known.text + delta.value, end: grown });
    this.open.set(message, blocks);
  }
}

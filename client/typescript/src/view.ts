import type { Attached, BlockDelta, Event } from "./gen/notecase/v1/run_pb.js";

/** One part of an unfinished message. */
export interface Block {
  kind: NonNullable<BlockDelta["delta"]["case"]>;
  text: string;
  /** The length of `text` in bytes of UTF-8. */
  end: number;
  /** The call of the arguments. */
  callId: string;
  tool: string;
}

/** Something is missing before an event: attach again after View.lastSequence. */
export class Gap extends Error {
  override readonly name = "Gap";
}

/** A program's position in a session's log, with the unfinished messages. */
export class View {
  /** The blocks of unfinished messages, by message name and index of the part. */
  readonly open = new Map<string, Map<number, Block>>();
  /** The run that writes each unfinished message. */
  readonly #writers = new Map<string, string>();

  /**
   * @param lastSequence The sequence of the newest applied event of the log, after which to attach again. 0: before the
   * first event of a log; undefined: the first event may have any sequence.
   */
  constructor(public lastSequence: bigint | undefined = 0n) {}

  /** Takes the first frame of a stream: forgets the open blocks, which the stream sends again from their start. */
  attach(_attached?: Attached): void {
    this.open.clear();
    this.#writers.clear();
  }

  /**
   * Takes the next event and reports whether it was new: an event of the log that was applied before is ignored. When
   * an event or a piece of a block is missing before it, throws a Gap and does not change the view.
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

import type { BlockDelta, Event } from "./gen/notecase/v1/run_pb.js";

/** A piece of the text of a message's part. The same bytes may arrive again, after a broken connection. */
export interface Piece {
  message: string;
  block: number;
  /** The first byte within the part. */
  start: number;
  text: string;
}

/** Joins the pieces in a stream's events to what `Stream.text` yields. */
export class Text {
  /** How many bytes of each part were yielded. */
  readonly #ends = new Map<string, number>();
  /** The message of the last piece that was yielded. */
  #message: string;
  /** What precedes the message of `after`, if that message is still to come. */
  #held?: Piece[];

  /** The text after a delta that was read before; without one, the whole text. */
  constructor(private readonly after?: Pick<BlockDelta, "message" | "block" | "end">) {
    if (after) this.#ends.set(`${after.block} ${after.message}`, Number(after.end));
    this.#message = after?.message ?? "";
    this.#held = after && [];
  }

  /**
   * Yields the new text of an event. `old` says that the message of `after` may still follow; the text before it is held
   * back, and left out when it follows.
   */
  *add({ payload }: Event, pieces: Piece[], old: boolean): Generator<string, void, void> {
    if (this.#held) {
      if (aboutOf(payload) === this.after?.message) this.#held = undefined;
      else if (old) {
        this.#held.push(...pieces);
        return;
      } else yield* this.end();
    }
    yield* this.#say(pieces);
  }

  /** Yields the text that was held back for a message that has not come. */
  *end(): Generator<string, void, void> {
    const held = this.#held ?? [];
    this.#held = undefined;
    yield* this.#say(held);
  }

  *#say(pieces: Piece[]): Generator<string, void, void> {
    for (const { message, block, start, text } of pieces) {
      if (message === this.after?.message && block < this.after.block) continue;
      const key = `${block} ${message}`;
      const bytes = Buffer.from(text);
      const have = Math.max(this.#ends.get(key) ?? 0, start);
      this.#ends.set(key, Math.max(have, start + bytes.length));
      const fresh = bytes.subarray(have - start).toString();
      if (!fresh) continue;
      if (this.#message && this.#message !== message) yield "\n\n";
      this.#message = message;
      yield fresh;
    }
  }
}

/** The message that an event is about. */
function aboutOf(payload: Event["payload"]): string | undefined {
  if (payload.case === "blockDelta" || payload.case === "messageDiscarded") return payload.value.message;
  return payload.case === "messageAdded" ? payload.value.name : undefined;
}

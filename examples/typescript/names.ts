// The messages whose names others have too, each with its namesake. Imported by namespace they do not meet; this file is
// compiled with the example and not run.
import type { AnyMessage } from "notecase";
import type * as v1 from "notecase/v1";

export function raise(failure: v1.Error): never {
  throw new Error(failure.message);
}

export function announce(target: EventTarget, event: v1.Event): Event {
  const announced = new Event(event.payload.case ?? "event");
  target.dispatchEvent(announced);
  return announced;
}

export function download(blob: v1.Blob, bytes: BlobPart[]): Blob {
  return new Blob(bytes, { type: blob.mediaType });
}

export const any = (message: v1.Message): AnyMessage => message;
export const values = (context: v1.Context, value: v1.Value) => ({ context, value });

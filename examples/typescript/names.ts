// The messages whose names others have too, each with its namesake. Imported by namespace they do not meet; this file is
// compiled with the example and not run.
import type { Message } from "@bufbuild/protobuf";
import type * as agents from "./gen/notecase/v1/agent_pb.js";
import type * as content from "./gen/notecase/v1/content_pb.js";
import type * as messages from "./gen/notecase/v1/message_pb.js";
import type * as runs from "./gen/notecase/v1/run_pb.js";

export function raise(failure: content.Error): never {
  throw new Error(failure.message);
}

export function announce(target: EventTarget, event: runs.Event): Event {
  const announced = new Event(event.payload.case ?? "event");
  target.dispatchEvent(announced);
  return announced;
}

export function download(blob: content.Blob, bytes: BlobPart[]): Blob {
  return new Blob(bytes, { type: blob.mediaType });
}

export const any = (message: messages.Message): Message => message;
export const values = (context: agents.Context, value: content.Value) => ({ context, value });

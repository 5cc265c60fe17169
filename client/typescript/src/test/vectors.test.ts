// The vectors are those of every client; their README is beside them.
import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";
import { fromJson } from "@bufbuild/protobuf";
import { AttachedSchema, type Event, EventSchema } from "../gen/notecase/v1/run_pb.js";
import { type Block, Gap, View } from "../view.js";

const folder = new URL("../../../../tests/vectors/", import.meta.url);

function apply(view: View, event: Event): "new" | "known" | "gap" {
  try {
    return view.apply(event) ? "new" : "known";
  } catch (error) {
    if (error instanceof Gap) return "gap";
    throw error;
  }
}

/** Blocks as a vector has them: what is absent is empty. */
const blocks = (open: Map<string, Map<number, Block>>) =>
  Object.fromEntries([...open].map(([message, blocks]) => [message, Object.fromEntries(blocks)]));
const expected = (open: Record<string, Record<string, Partial<Block>>> = {}) =>
  Object.fromEntries(
    Object.entries(open).map(([message, blocks]) => [
      message,
      Object.fromEntries(Object.entries(blocks).map(([index, block]) => [index, { callId: "", tool: "", ...block }])),
    ]),
  );

const files = readdirSync(folder).filter((name) => name.endsWith(".json"));
assert(files.length > 0);
for (const file of files) {
  test(file, () => {
    const vector = JSON.parse(readFileSync(new URL(file, folder), "utf8"));
    const view = new View(BigInt(vector.after));
    const printed = new Map<string, Map<number, Block>>(); // of whole messages, what their deltas were
    for (const [number, step] of vector.steps.entries()) {
      if (step.attached) view.attach(fromJson(AttachedSchema, step.attached));
      else {
        const event = fromJson(EventSchema, step.event);
        const added = event.payload.case === "messageAdded" ? event.payload.value.name : "";
        const open = view.open.get(added);
        if (open) printed.set(added, open);
        assert.equal(apply(view, event), step.gives, `step ${number}`);
      }
      if (!step.view) continue;
      assert.equal(view.lastSequence, BigInt(step.view.lastSequence), `step ${number}`);
      assert.deepEqual(blocks(view.open), expected(step.view.open), `step ${number}`);
    }
    if (!vector.printed) return;
    const shown = [...printed, ...view.open].map(([message, blocks]) => [
      message,
      Object.fromEntries([...blocks].map(([index, block]) => [index, block.text])),
    ]);
    assert.deepEqual(Object.fromEntries(shown), vector.printed);
  });
}

/**
 * Connects programs to a notecase server: opens the connection, follows a run or a session across lost connections,
 * joins the deltas of replies, and reads errors. The messages and services are in `notecase/v1`; they work without this
 * module.
 */
export { type Message as AnyMessage, create, type MessageInitShape } from "@bufbuild/protobuf";
export { Code, createClient, type Transport } from "@connectrpc/connect";
export { type ConnectOptions, connect, fromEnvironment, type Token } from "./connection.js";
export { type Backoff, NotecaseError, repeat } from "./errors.js";
export { Stream, type StreamOptions, start, watch } from "./stream.js";
export { type Block, Gap, View } from "./view.js";

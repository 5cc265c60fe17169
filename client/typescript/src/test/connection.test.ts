import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { type AddressInfo, createServer, type Server } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { connect } from "../connection.js";
import { NotecaseError, repeat } from "../errors.js";
import { ErrorInfoSchema } from "../gen/google/rpc/error_details_pb.js";
import { RunService } from "../gen/notecase/v1/run_pb.js";

test("an address is a host and a port", () => {
  for (const address of ["", "localhost", "https://localhost:7420", "localhost:", ":7420", "localhost:http", "localhost:70000"]) {
    assert.throws(() => connect(address), /must be HOST:PORT/, address);
  }
  for (const address of ["localhost:7420", "[::1]:7420", "notecase.example:443"]) connect(address);
});

test("a file of authorities that is missing is named with its variable", () => {
  assert.throws(() => connect("localhost:7420", { ca: "missing.pem" }), /NOTECASE_CA.*missing\.pem/);
});

/** How often a call is made on that server before it fails, and its error. */
async function attempts(server: Server, tls: boolean): Promise<[number, NotecaseError]> {
  const folder = mkdtempSync(join(tmpdir(), "notecase-"));
  await new Promise<void>((listening) => server.listen(0, "127.0.0.1", listening));
  try {
    const ca = join(folder, "ca.pem");
    writeFileSync(ca, "");
    const transport = connect(`127.0.0.1:${(server.address() as AddressInfo).port}`, tls ? { ca } : {});
    let calls = 0;
    const call = () => {
      calls += 1;
      return createClient(RunService, transport).getRun({});
    };
    const error = await repeat(call, { firstMs: 0 }).then(() => assert.fail(), NotecaseError.from);
    return [calls, error];
  } finally {
    server.close();
    rmSync(folder, { recursive: true });
  }
}

test("TLS to a server without it fails at once", async () => {
  const [calls, error] = await attempts(createServer((socket) => socket.end("HTTP/1.1 400 Bad Request\r\n\r\n")), true);
  assert.equal(calls, 1);
  assert.equal(error.code, Code.Unavailable);
  assert.match(error.message, /does the server use TLS\? see NOTECASE_CA/);
});

test("a server that closes the connection at once is not tried for long", async () => {
  const [calls, error] = await attempts(createServer((socket) => void socket.resume().end()), false);
  assert.equal(calls, 7);
  assert.equal(error.code, Code.Unavailable);
  assert.match(error.message, /does the server use TLS\? see NOTECASE_CA/);
});

test("a certificate that is not trusted fails at once", () => {
  for (const code of ["SELF_SIGNED_CERT_IN_CHAIN", "UNABLE_TO_VERIFY_LEAF_SIGNATURE", "ERR_TLS_CERT_ALTNAME_INVALID"]) {
    const cause = Object.assign(new Error("refused"), { code });
    const error = NotecaseError.from(new ConnectError("refused", Code.Internal, undefined, undefined, cause));
    assert.equal(error.code, Code.Unavailable);
    assert.equal(error.mayPass, false);
    assert.match(error.message, /does NOTECASE_CA name the CA of the server's certificate\?/);
  }
});

/** How often that is done before it fails, and its error. */
async function tries(call: () => Promise<unknown>, signal?: AbortSignal): Promise<[number, unknown]> {
  let calls = 0;
  const counted = () => {
    calls += 1;
    return call();
  };
  const error = await repeat(counted, { firstMs: 0, tries: 3 }, signal).then(() => assert.fail(), (thrown) => thrown);
  return [calls, error];
}

test("a mistake of the program is not repeated", async () => {
  const runs = createClient(RunService, connect("127.0.0.1:1", { token: async () => "two\nlines" }));
  for (const call of [async () => JSON.parse("{"), () => runs.getRun({})]) {
    const [calls, error] = await tries(call);
    assert.equal(calls, 1, `${error}`);
    assert.doesNotMatch(`${error}`, /lines/);
  }
});

test("a token that has two lines is refused, and not quoted", () => {
  assert.throws(() => connect("127.0.0.1:1", { token: "two\nlines" }), (error: Error) => /printable/.test(error.message) && !/lines/.test(error.message));
});

test("a function without a token is asked again", async () => {
  const token = async () => {
    throw new TypeError("the identity provider is away");
  };
  const [calls, error] = await tries(() => createClient(RunService, connect("127.0.0.1:1", { token })).getRun({}));
  assert.equal(calls, 4);
  assert.match(`${error}`, /no token/);
});

test("a server that stops is waited for longer than a failure", async () => {
  let left = 5;
  const draining = new ConnectError("stops", Code.Unavailable, undefined, [
    { desc: ErrorInfoSchema, value: { domain: "notecase.dev", reason: "SERVER_DRAINING" } },
  ]);
  const call = async () => {
    if (left-- > 0) throw draining;
    return "there";
  };
  assert.equal(await repeat(call, { firstMs: 0, tries: 1 }), "there");
});

test("a wait that is aborted throws the reason of the signal", async () => {
  const away = async () => Promise.reject(new ConnectError("away", Code.Unavailable));
  const aborting = new AbortController();
  const reason = new Error("enough");
  const waiting = repeat(away, { firstMs: 60_000, maxMs: 60_000 }, aborting.signal);
  setImmediate(() => aborting.abort(reason));
  await assert.rejects(waiting, reason);
});

test("an error that is not of a call has no code in its text", () => {
  assert.equal(`${NotecaseError.from(new Error("no file"))}`, "no file");
});

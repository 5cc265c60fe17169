import { readFileSync } from "node:fs";
import { Code, ConnectError, type Interceptor, type Transport } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { NotecaseError } from "./errors.js";

/** A token, or a function that returns a valid one. The function is called before each call. */
export type Token = string | (() => string | Promise<string>);

export interface ConnectOptions {
  token?: Token;
  /**
   * A PEM file of CA certificates for the server's certificate. It turns TLS on. Default: those of Node.js.
   */
  ca?: string;
  /** Connects to another machine without TLS. The token is then sent unencrypted, too. */
  plaintext?: boolean;
}

/** The address in NOTECASE_ADDRESS, or 127.0.0.1:7420, and the options in NOTECASE_TOKEN and NOTECASE_CA. */
export function fromEnvironment(): [address: string, options: ConnectOptions] {
  const { NOTECASE_ADDRESS: address, NOTECASE_TOKEN: token, NOTECASE_CA: ca } = process.env;
  return [address || "127.0.0.1:7420", { ...(token && { token }), ...(ca && { ca }) }];
}

/**
 * Returns the transport for clients. The address is HOST:PORT. It uses TLS, except to a loopback address without `ca`,
 * and with `plaintext`. Throws an Error for an invalid address or token and for a file that cannot be read; the first call
 * connects to the server. Calls throw a NotecaseError.
 */
export function connect(address: string, options: ConnectOptions = {}): Transport {
  const { token, ca, plaintext = false } = options;
  const port = Number(/^(?:\[[^\]/]+\]|[^:/?#@\s[\]]+):(\d{1,5})$/.exec(address)?.[1]);
  if (!(port > 0 && port < 65536)) throw new Error(`the address "${address}" (see NOTECASE_ADDRESS) must be HOST:PORT`);
  if (plaintext && ca) throw new Error("plaintext and ca exclude each other");
  const secure = ca !== undefined || !(plaintext || isLoopback(address));
  const transport = createGrpcTransport({
    baseUrl: `${secure ? "https" : "http"}://${address}`,
    interceptors: token === undefined ? [] : [bearer(token)],
    nodeOptions: ca === undefined ? {} : { ca: authorities(ca) },
    // Notices a server that vanished. The server allows a ping every 10 s.
    pingIntervalMs: 20_000,
    pingTimeoutMs: 10_000,
  });
  return converting(transport);
}

/** A transport whose calls throw a NotecaseError. Connect would wrap what an interceptor throws in an error of its own. */
function converting(transport: Transport): Transport {
  const fail = (thrown: unknown): never => {
    throw NotecaseError.from(thrown);
  };
  async function* messages<T>(received: AsyncIterable<T>): AsyncGenerator<T> {
    try {
      yield* received;
    } catch (thrown) {
      fail(thrown);
    }
  }
  return {
    unary: (...call) => transport.unary(...call).catch(fail),
    async stream(...call) {
      const response = await transport.stream(...call).catch(fail);
      return { ...response, message: messages(response.message) };
    },
  };
}

function authorities(path: string): Buffer {
  try {
    return readFileSync(path);
  } catch (cause) {
    throw new Error(`the CA file (see NOTECASE_CA) cannot be read: ${(cause as Error).message}`, { cause });
  }
}

function bearer(token: Token): Interceptor {
  const fixed = typeof token === "string" ? header(token) : undefined;
  return (next) => async (request) => {
    request.header.set("authorization", fixed ?? header(await fresh(token)));
    return next(request);
  };
}

/** Returns what the function of a token returns. It may ask somebody who is away for a moment. */
async function fresh(token: Token): Promise<string> {
  try {
    return typeof token === "string" ? token : await token();
  } catch (cause) {
    throw new ConnectError("no token: its function failed", Code.Unavailable, undefined, undefined, cause);
  }
}

/** Returns the header of a token. Throws an Error without the token, which would end up in a log. */
function header(token: string): string {
  const value = token.trim();
  if (!/^[\x21-\x7e]+$/.test(value)) throw new Error("the token (see NOTECASE_TOKEN) must be printable ASCII without spaces");
  return `Bearer ${value}`;
}

function isLoopback(address: string): boolean {
  const host = address.slice(0, address.lastIndexOf(":"));
  return host === "localhost" || host === "[::1]" || /^127(\.\d{1,3}){3}$/.test(host);
}

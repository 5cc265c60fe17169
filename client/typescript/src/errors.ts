import { setTimeout as sleep } from "node:timers/promises";
import { Code, ConnectError } from "@connectrpc/connect";
import { BadRequestSchema, ErrorInfoSchema, ResourceInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";
import { type Error as ErrorMessage, ErrorReason } from "./gen/notecase/v1/content_pb.js";

/** A refusal or failure of the service, or a failure to reach it. */
export class NotecaseError extends Error {
  override readonly name = "NotecaseError";
  readonly code: Code;
  /**
   * For programs to check: an ErrorReason, such as "RUN_ACTIVE". Empty if the error does not come from the service: the
   * connection broke, the deadline passed, or something else answered.
   */
  readonly reason: string = "";
  /** Data for programs, such as the current version. */
  readonly metadata: Record<string, string> = {};
  /** All invalid fields of the request. */
  readonly violations: { field: string; description: string }[] = [];
  /** The resource that the error is about. */
  readonly resource?: { type: string; name: string };
  /** How long to wait before the next try; 0 if the service names no time. */
  readonly retryAfterMs: number = 0;
  /**
   * Whether only one of the two sides may use TLS. "suspected": the server closed the connection at once, as one with TLS does to
   * a client without, and a proxy whose server is away. "failed": the handshake failed, or the certificate is not trusted.
   * @internal
   */
  readonly tls?: "suspected" | "failed";
  /**
   * Whether a run ended with it, or a command was refused with it: then no connection broke.
   * @internal
   */
  readonly ofRun: boolean = false;

  private constructor(code: Code, message: string, details: Partial<NotecaseError>, cause?: unknown) {
    super(message, { cause });
    this.code = code;
    Object.assign(this, details);
  }

  /** Returns a NotecaseError as it is, and converts what a transport of another origin threw. Other errors have the code Unknown. */
  static from(thrown: unknown): NotecaseError {
    if (thrown instanceof NotecaseError) return thrown;
    const error = ConnectError.from(thrown);
    const info = error.findDetails(ErrorInfoSchema).find((info) => info.domain === "notecase.dev");
    const [resource] = error.findDetails(ResourceInfoSchema);
    const delay = error.findDetails(RetryInfoSchema)[0]?.retryDelay;
    const tls = info ? undefined : tlsFault(error);
    return new NotecaseError(
      tls ? Code.Unavailable : error.code,
      tls ? `${error.rawMessage.trim()} (${isOfCertificate(error) ? CERTIFICATE_HINT : TLS_HINT})` : error.rawMessage,
      {
        ...(tls && { tls }),
        ...(info && { reason: info.reason, metadata: info.metadata }),
        violations: error.findDetails(BadRequestSchema).flatMap((bad) => bad.fieldViolations),
        ...(resource && { resource: { type: resource.resourceType, name: resource.resourceName } }),
        ...(delay && { retryAfterMs: Number(delay.seconds) * 1000 + delay.nanos / 1e6 }),
      },
      thrown,
    );
  }

  /** The error of a failed run or of a refused command. */
  static fromProto(error: ErrorMessage): NotecaseError {
    const reason = error.reason === ErrorReason.UNSPECIFIED ? "" : (ErrorReason[error.reason] ?? "");
    return new NotecaseError(error.code as Code, error.message, { reason, metadata: error.metadata, ofRun: true });
  }

  /**
   * The error of a cancelled run.
   * @internal
   */
  static cancelled(run: string): NotecaseError {
    return new NotecaseError(Code.Canceled, `${run} was cancelled.`, { ofRun: true });
  }

  /**
   * Whether a retry may succeed: the service was unavailable, or the connection broke. False after a failed TLS handshake, for a
   * cancelled run, and for what failed before it was sent.
   */
  get mayPass(): boolean {
    if (this.tls === "failed") return false;
    if (this.code === Code.Unavailable) return true;
    if (isMistake(this.cause)) return false;
    // What a connection that was reset looks like.
    return !this.reason && !this.ofRun && [Code.Canceled, Code.Internal, Code.Unknown, Code.Aborted].includes(this.code);
  }

  /** The message with the reason, or else the code. The code Unknown says nothing and is left out. */
  override toString(): string {
    const label = this.reason || (this.code === Code.Unknown ? "" : Code[this.code]);
    return label ? `${label}: ${this.message}` : this.message;
  }
}

/** Whether an error is one of the program, such as a message that cannot be serialized. Those of a connection have a code. */
function isMistake(cause: unknown): boolean {
  if (cause instanceof ConnectError && cause.rawMessage.startsWith("serialize ")) return true;
  const origin = cause instanceof ConnectError ? cause.cause : cause;
  return origin instanceof Error && !("code" in origin);
}

const TLS_HINT = "does the server use TLS? see NOTECASE_CA";
const CERTIFICATE_HINT = "does NOTECASE_CA name the CA of the server's certificate?";

function codeOf(error: ConnectError): string {
  return error.cause instanceof Error && "code" in error.cause ? `${error.cause.code}` : "";
}

function isOfCertificate(error: ConnectError): boolean {
  return /CERT|^UNABLE_TO_|^INVALID_CA$/.test(codeOf(error));
}

/** What a transport's error tells of TLS. A connection that closes before it answers is CANCEL to Node.js. */
function tlsFault(error: ConnectError): NotecaseError["tls"] {
  if (isOfCertificate(error) || /^ERR_(SSL|TLS)_|^EPROTO$/.test(codeOf(error))) return "failed";
  return error.code === Code.Canceled && error.rawMessage.startsWith("http/2 stream closed") ? "suspected" : undefined;
}

/**
 * Configures retries of a failed call. The defaults outlast a restart of the server: about 20 seconds in all. A server
 * that closes new connections at once is tried for only about 5 seconds, since it may require TLS.
 */
export interface Backoff {
  /** The number of retries in a row: 10. */
  tries?: number;
  /** The first delay: 100. Each further one is twice as long. */
  firstMs?: number;
  /** The longest delay: 5000. */
  maxMs?: number;
}

/**
 * Retries a call after transient errors. The call must be safe to repeat: a read, or a write with a requestId or
 * commandId that stays the same. Throws a NotecaseError, or the reason of the signal when it is aborted.
 */
export async function repeat<T>(call: () => Promise<T>, backoff: Backoff = {}, signal?: AbortSignal): Promise<T> {
  const begun = Date.now();
  for (let failures = 0; ; ) {
    try {
      return await call();
    } catch (thrown) {
      const error = NotecaseError.from(thrown);
      await pause(failures, error, backoff, signal);
      if (!isDraining(error, begun)) failures += 1;
    }
  }
}

/** Whether the server is about to stop and be replaced. That takes as long as its runs may go on, and is no failure for a minute. */
export function isDraining(error: NotecaseError, begun: number): boolean {
  return error.reason === "SERVER_DRAINING" && Date.now() - begun < DRAIN_MS;
}

const DRAIN_MS = 60_000;

/** Returns when it is time for the next try. Throws the error when there should be none. */
export async function pause(
  failures: number,
  error: NotecaseError,
  { tries = 10, firstMs = 100, maxMs = 5000 }: Backoff,
  signal?: AbortSignal,
  worth = false,
): Promise<void> {
  signal?.throwIfAborted();
  const most = error.tls === "suspected" && !worth ? Math.min(tries, 6) : tries;
  if (failures >= most || !(worth || error.mayPass)) throw error;
  // Spread out, so that the clients of a server that restarts do not come back all at once.
  const delay = Math.min(firstMs * 2 ** failures, maxMs) * (0.5 + Math.random() / 2);
  await sleep(Math.max(delay, error.retryAfterMs), undefined, signal && { signal }).catch((aborted) => {
    signal?.throwIfAborted();
    throw aborted;
  });
}

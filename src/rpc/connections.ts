import {
  constants,
  type IncomingHttpHeaders,
  type SecureServerOptions,
  type ServerHttp2Session,
  type ServerHttp2Stream,
} from 'node:http2';
import { status as Code, type Server, type ServerCredentials } from '@grpc/grpc-js';
import type { Config } from '../config.ts';
import type { Logger } from '../log.ts';
import { REFUSED_VALUE } from './caller.ts';

type StreamListener = (
  stream: ServerHttp2Stream,
  headers: IncomingHttpHeaders,
  flags: number,
  rawHeaders: string[],
) => void;

/** What grpc-js keeps to itself, for want of any other way to its HTTP/2 server. */
interface Inside {
  readonly commonServerOptions: SecureServerOptions;
  createHttp2Server(credentials: ServerCredentials): {
    listeners(event: 'stream'): StreamListener[];
    removeAllListeners(event: 'stream'): void;
    on(event: 'stream', listener: StreamListener): void;
    on(event: 'session', listener: (session: ServerHttp2Session) => void): void;
  };
}

const PATH = /^\/[\x21-\x7e]{1,255}$/;
const METADATA_KEY = /^[0-9a-z_.-]+$/;
const METADATA_VALUE = /^[\x20-\x7e]*$/;
const TIMEOUT = /^(\d{1,8})([HMSmun])$/;
const UNIT_MS: Readonly<Record<string, number>> = {
  H: 3_600_000,
  M: 60_000,
  S: 1000,
  m: 1,
  u: 1e-3,
  n: 1e-6,
};
/** The longest timer there is. */
const TIMER_MAX_MS = 2 ** 31 - 1;
/** What HTTP/2 counts for each field beside its name and value (RFC 9113, 6.5.2). */
const FIELD_OVERHEAD_BYTES = 32;
/** What a peer has for the end of what it left half said. */
const CLOSE_MS = 1000;

/**
 * Refuses what grpc-js lets through, before it gets there; to be called before the server is bound. No stream
 * outlives a call's limits but those of the `longLived` methods, be its peer as slow as it likes.
 */
export function guardConnections(
  server: Server,
  { limits }: Pick<Config, 'limits'>,
  log: Logger,
  longLived: ReadonlySet<string>,
): void {
  const inside = server as unknown as Inside;
  const { commonServerOptions: options } = inside;
  options.settings = { ...options.settings, maxHeaderListSize: limits.metadata_bytes };
  // Otherwise a field with a space around its value is taken no notice of: an idempotency-key, of all things.
  options.strictFieldWhitespaceValidation = false;
  options.handshakeTimeout = limits.idle_seconds * 1000;
  // Waiting for the message and working on it may each take as long as a call may.
  const streamMs = 2 * limits.call_timeout_ms;

  const createHttp2Server = inside.createHttp2Server.bind(server);
  inside.createHttp2Server = (credentials) => {
    const http2Server = createHttp2Server(credentials);
    const [serve] = http2Server.listeners('stream');
    if (!serve) throw new Error('grpc-js serves its streams in another way than this was written for');
    http2Server.on('session', (session) => letGo(session, limits.idle_seconds * 1000));
    http2Server.removeAllListeners('stream');
    http2Server.on('stream', (stream, headers, flags, rawHeaders) => {
      stream.on('error', () => {});
      try {
        if (!longLived.has(String(headers[':path']))) {
          const timer = setTimeout(() => stream.close(constants.NGHTTP2_CANCEL), streamMs);
          stream.once('close', () => clearTimeout(timer));
        }
        if (refuse(stream, headers, rawHeaders, limits.metadata_bytes)) return;
        serve.call(http2Server, stream, mend(headers), flags, rawHeaders);
      } catch (error) {
        log.error({ err: error }, 'a stream was refused for want of a better answer');
        stream.destroy();
      }
    });
    return http2Server;
  };
}

/**
 * Closes a connection once it has been idle for too long (grpc-js takes up to twice as long), and any connection for
 * good that is closed and has no streams left: closing in good order waits for a header block that never ends.
 */
function letGo(session: ServerHttp2Session, idleMs: number): void {
  const close = session.close.bind(session);
  let streams = 0;
  let waiting: NodeJS.Timeout | undefined;
  const idle = setTimeout(() => {
    if (streams === 0) session.close();
  }, idleMs);
  session.on('stream', (stream) => {
    streams++;
    stream.once('close', () => {
      if (--streams === 0) idle.refresh();
    });
  });
  session.once('close', () => {
    clearTimeout(idle);
    clearInterval(waiting);
  });
  session.close = (done) => {
    // A session that was destroyed a moment ago forgets whom to tell of its close.
    if (session.destroyed) return void (done && queueMicrotask(done));
    if (done) session.once('close', done);
    if (waiting) return;
    waiting = setInterval(() => {
      if (streams === 0) session.destroy();
    }, CLOSE_MS);
    close();
  };
}

/** Whether the stream has had its answer already. */
function refuse(
  stream: ServerHttp2Stream,
  headers: IncomingHttpHeaders,
  rawHeaders: readonly string[],
  limitBytes: number,
): boolean {
  const { ':method': method, ':path': path, 'grpc-timeout': timeout } = headers;
  // Until the peer has acknowledged our settings, HTTP/2 does not enforce them.
  if (sizeOf(rawHeaders) > limitBytes) stream.close(constants.NGHTTP2_ENHANCE_YOUR_CALM);
  else if (method !== 'POST') stream.respond({ ':status': 405, allow: 'POST' }, { endStream: true });
  else if (!PATH.test(String(path))) answer(stream, Code.UNIMPLEMENTED, 'there is no such method');
  else if (timeout !== undefined && !TIMEOUT.test(String(timeout)))
    answer(stream, Code.INTERNAL, 'the grpc-timeout is malformed');
  else return false;
  return true;
}

const sizeOf = (rawHeaders: readonly string[]) =>
  rawHeaders.reduce((bytes, text) => bytes + text.length, (rawHeaders.length / 2) * FIELD_OVERHEAD_BYTES);

function answer(stream: ServerHttp2Stream, code: Code, message: string): void {
  const headers = {
    ':status': 200,
    'content-type': 'application/grpc',
    'grpc-status': code,
    'grpc-message': message,
  };
  stream.respond(headers, { endStream: true });
}

/**
 * grpc-js drops metadata that is not ASCII and prints it on standard error, tokens and all; it makes a number of
 * another sign of a time-out of weeks. Illegal values become ones that `checkMetadata` refuses.
 */
function mend(headers: IncomingHttpHeaders): IncomingHttpHeaders {
  for (const [name, value] of Object.entries(headers)) {
    if (name.startsWith(':')) continue;
    if (!METADATA_KEY.test(name)) delete headers[name];
    else if (!name.endsWith('-bin') && !METADATA_VALUE.test(String(value))) headers[name] = REFUSED_VALUE;
  }
  const [, amount, unit = ''] = TIMEOUT.exec(String(headers['grpc-timeout'])) ?? [];
  if (Number(amount) * (UNIT_MS[unit] ?? 0) > TIMER_MAX_MS) delete headers['grpc-timeout'];
  return headers;
}

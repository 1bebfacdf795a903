/** gRPC calls as bare HTTP/2 requests, for what no client library would send. */
import { once } from 'node:events';
import {
  type ClientHttp2Session,
  connect,
  type IncomingHttpHeaders,
  type OutgoingHttpHeaders,
} from 'node:http2';
import { fromBinary } from '@bufbuild/protobuf';
import { anyUnpack } from '@bufbuild/protobuf/wkt';
import {
  type BadRequest,
  BadRequestSchema,
  type ErrorInfo,
  ErrorInfoSchema,
} from '../../gen/google/rpc/error_details_pb.ts';
import { StatusSchema } from '../../gen/google/rpc/status_pb.ts';

export const CHANGE_PASSWORD = '/rekey.v1.UserService/ChangePassword';

/** What came back. */
export interface RawAnswer {
  /** Initial metadata; absent if there was no answer at all. */
  readonly headers: IncomingHttpHeaders | undefined;
  /** Trailers, or the headers where they are all there is. */
  readonly trailers: IncomingHttpHeaders;
  readonly body: Buffer;
  /** `grpc-status`; undefined if the stream ended without one. */
  readonly status: number | undefined;
  readonly errorInfo: ErrorInfo | undefined;
  readonly violations: readonly string[];
  /** The code of RST_STREAM. */
  readonly resetCode: number;
}

/** A gRPC message in its frame. `length` is what the frame claims; absent: the truth. */
export function framed(message: Uint8Array, { compressed = 0, length = message.length } = {}): Buffer {
  const prefix = Buffer.alloc(5);
  prefix.writeUInt8(compressed, 0);
  prefix.writeUInt32BE(length, 1);
  return Buffer.concat([prefix, message]);
}

/** A connection; to be destroyed. */
export async function rawConnect(address: string): Promise<ClientHttp2Session> {
  const session = connect(`http://${address}`);
  session.on('error', () => {});
  await once(session, 'connect');
  return session;
}

/** Sends `body` as it is, and ends the stream unless told otherwise. */
export async function rawCall(
  session: ClientHttp2Session,
  headers: OutgoingHttpHeaders,
  body: Uint8Array,
  { path = CHANGE_PASSWORD, end = true } = {},
): Promise<RawAnswer> {
  const stream = session.request({
    ':method': 'POST',
    ':path': path,
    'content-type': 'application/grpc',
    te: 'trailers',
    ...headers,
  });
  let initial: IncomingHttpHeaders | undefined;
  let trailers: IncomingHttpHeaders = {};
  const chunks: Buffer[] = [];
  stream.on('response', (received) => {
    initial = received;
    if (received['grpc-status'] !== undefined) trailers = received;
  });
  stream.on('trailers', (received) => {
    trailers = received;
  });
  stream.on('data', (chunk: Buffer) => chunks.push(chunk));
  stream.on('error', () => {});
  const closed = once(stream, 'close').catch(() => {});
  if (end) stream.end(body);
  else stream.write(body);
  await closed;

  const details = trailers['grpc-status-details-bin'];
  const status =
    typeof details === 'string' ? fromBinary(StatusSchema, Buffer.from(details, 'base64')) : undefined;
  const find = <T>(unpack: (any: NonNullable<typeof status>['details'][number]) => T | undefined) =>
    status?.details.map(unpack).find((message) => message !== undefined);
  const badRequest = find<BadRequest>((any) => anyUnpack(any, BadRequestSchema));
  return {
    headers: initial,
    trailers,
    body: Buffer.concat(chunks),
    status: trailers['grpc-status'] === undefined ? undefined : Number(trailers['grpc-status']),
    errorInfo: find<ErrorInfo>((any) => anyUnpack(any, ErrorInfoSchema)),
    violations: (badRequest?.fieldViolations ?? []).map(({ field, reason }) => `${field} ${reason}`).sort(),
    resetCode: stream.rstCode,
  };
}

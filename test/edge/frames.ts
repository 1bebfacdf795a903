/** HTTP/2 by hand, below `node:http2`: frames that no well-behaved client would send. */
import { once } from 'node:events';
import { connect, type Socket } from 'node:net';

export const FRAME = {
  DATA: 0,
  HEADERS: 1,
  PRIORITY: 2,
  RST_STREAM: 3,
  SETTINGS: 4,
  PUSH_PROMISE: 5,
  PING: 6,
  GOAWAY: 7,
  WINDOW_UPDATE: 8,
  CONTINUATION: 9,
} as const;

export const FLAG = { ACK: 1, END_STREAM: 1, END_HEADERS: 4, PADDED: 8, PRIORITY: 0x20 } as const;

export const SETTING = { HEADER_TABLE_SIZE: 1, ENABLE_PUSH: 2, INITIAL_WINDOW_SIZE: 4 } as const;

export const PREFACE = Buffer.from('PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n');

const FRAME_HEADER_BYTES = 9;
/** A connection's memory here, however much a server says. */
const FRAMES_KEPT = 10_000;

export const NOTHING: Buffer = Buffer.alloc(0);

/** @param length what the header claims; absent: the truth. */
export function frame(
  type: number,
  flags: number,
  streamId: number,
  payload: Buffer = NOTHING,
  length = payload.length,
): Buffer {
  const header = Buffer.alloc(FRAME_HEADER_BYTES);
  header.writeUIntBE(length, 0, 3);
  header.writeUInt8(type, 3);
  header.writeUInt8(flags, 4);
  header.writeUInt32BE(streamId >>> 0, 5);
  return Buffer.concat([header, payload]);
}

export type Field = readonly [name: string | Buffer, value: string | Buffer];

/** Literal fields without indexing and without Huffman code (RFC 7541, 6.2.2); strings as Latin-1. */
export function headerBlock(fields: readonly Field[]): Buffer {
  const parts: Buffer[] = [];
  for (const [name, value] of fields) {
    parts.push(Buffer.of(0), ...stringLiteral(name), ...stringLiteral(value));
  }
  return Buffer.concat(parts);
}

function stringLiteral(text: string | Buffer): [Buffer, Buffer] {
  const bytes = typeof text === 'string' ? Buffer.from(text, 'latin1') : text;
  return [hpackInteger(bytes.length), bytes];
}

/** With a prefix of seven bits (RFC 7541, 5.1). */
function hpackInteger(value: number): Buffer {
  if (value < 127) return Buffer.of(value);
  const bytes = [127];
  let rest = value - 127;
  while (rest >= 128) {
    bytes.push((rest % 128) | 128);
    rest = Math.floor(rest / 128);
  }
  return Buffer.from([...bytes, rest]);
}

export const settings = (...pairs: readonly (readonly [id: number, value: number])[]): Buffer =>
  frame(
    FRAME.SETTINGS,
    0,
    0,
    Buffer.concat(pairs.map(([id, value]) => Buffer.concat([uint16(id), uint32(value)]))),
  );

export const uint16 = (value: number): Buffer => {
  const bytes = Buffer.alloc(2);
  bytes.writeUInt16BE(value);
  return bytes;
};

export const uint32 = (value: number): Buffer => {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value >>> 0);
  return bytes;
};

/** The five bytes before a gRPC message. */
export const grpcMessage = (message: Buffer, { flag = 0, length = message.length } = {}): Buffer =>
  Buffer.concat([Buffer.of(flag), uint32(length), message]);

/** The fields of a good gRPC call, then `more`. */
export const callFields = (path: string, more: readonly Field[] = []): Field[] => [
  [':method', 'POST'],
  [':scheme', 'http'],
  [':path', path],
  [':authority', 'localhost'],
  ['te', 'trailers'],
  ['content-type', 'application/grpc'],
  ...more,
];

export interface Received {
  readonly type: number;
  readonly flags: number;
  readonly streamId: number;
  readonly payload: Buffer;
}

/** One connection, what it received, and how it ended. */
export class RawConnection {
  readonly socket: Socket;
  readonly frames: Received[] = [];
  /** Also counts what is no longer in `frames`. */
  received = 0;
  isClosed = false;
  readonly #opened: number;
  readonly closed: Promise<void>;
  #rest: Buffer = NOTHING;
  #look: (() => void)[] = [];

  private constructor(socket: Socket) {
    this.socket = socket;
    this.#opened = performance.now();
    socket.on('data', (bytes: Buffer) => this.#take(bytes));
    socket.on('error', () => {});
    this.closed = new Promise((resolve) => {
      socket.on('close', () => {
        this.isClosed = true;
        this.#wake();
        resolve();
      });
    });
  }

  /** @param opening what is sent at once; absent: the preface and empty SETTINGS, as it should be. */
  static async open(
    address: string,
    opening: Buffer = Buffer.concat([PREFACE, settings()]),
  ): Promise<RawConnection> {
    const [host = '', port = ''] = address.split(':');
    const socket = connect({ host, port: Number(port), noDelay: true });
    const connection = new RawConnection(socket);
    await Promise.race([once(socket, 'connect'), connection.closed]);
    if (opening.length > 0) socket.write(opening);
    return connection;
  }

  get ageMs(): number {
    return performance.now() - this.#opened;
  }

  get goaway(): { code: number; text: string } | undefined {
    const found = this.frames.find(({ type }) => type === FRAME.GOAWAY);
    return (
      found && { code: found.payload.readUInt32BE(4), text: found.payload.subarray(8).toString('latin1') }
    );
  }

  /** Resolves when the bytes are out of this process or the connection is closed; never throws. */
  async send(...buffers: readonly Buffer[]): Promise<void> {
    if (this.isClosed || this.socket.destroyed) return;
    const isRoomLeft = this.socket.write(
      buffers.length === 1 ? (buffers[0] as Buffer) : Buffer.concat(buffers),
    );
    if (isRoomLeft) return;
    await Promise.race([new Promise((resolve) => this.socket.once('drain', resolve)), this.closed]);
  }

  /** The first frame for which `isIt` holds, past or future; undefined when the connection closes or time is up. */
  async waitFor(isIt: (received: Received) => boolean, timeoutMs = 10_000): Promise<Received | undefined> {
    const deadline = performance.now() + timeoutMs;
    for (;;) {
      const found = this.frames.find(isIt);
      const leftMs = deadline - performance.now();
      if (found || this.isClosed || leftMs <= 0) return found;
      await this.#next(leftMs);
    }
  }

  /** Whether the other side closes within that time. */
  async closesWithin(ms: number): Promise<boolean> {
    if (this.isClosed) return true;
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<void>((resolve) => {
      timer = setTimeout(resolve, ms);
    });
    await Promise.race([this.closed, late]);
    clearTimeout(timer);
    return this.isClosed;
  }

  destroy(): void {
    this.socket.destroy();
  }

  #next(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.#look.push(() => {
        clearTimeout(timer);
        resolve();
      });
    });
  }

  #wake(): void {
    const waiting = this.#look;
    this.#look = [];
    for (const wake of waiting) wake();
  }

  #take(bytes: Buffer): void {
    this.#rest = this.#rest.length === 0 ? bytes : Buffer.concat([this.#rest, bytes]);
    while (this.#rest.length >= FRAME_HEADER_BYTES) {
      const length = this.#rest.readUIntBE(0, 3);
      if (this.#rest.length < FRAME_HEADER_BYTES + length) break;
      this.received++;
      if (this.frames.length < FRAMES_KEPT) {
        this.frames.push({
          type: this.#rest.readUInt8(3),
          flags: this.#rest.readUInt8(4),
          streamId: this.#rest.readUInt32BE(5) & 0x7fffffff,
          payload: Buffer.from(this.#rest.subarray(FRAME_HEADER_BYTES, FRAME_HEADER_BYTES + length)),
        });
      }
      this.#rest = this.#rest.subarray(FRAME_HEADER_BYTES + length);
    }
    this.#wake();
  }
}

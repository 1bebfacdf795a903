/** Rows 24 and 28 of the security tests: whatever comes, the process stays up and the answer says what was wrong. */
import assert from 'node:assert/strict';
import type { OutgoingHttpHeaders } from 'node:http2';
import { after, before, test } from 'node:test';
import { deflateSync, gzipSync } from 'node:zlib';
import { create, toBinary } from '@bufbuild/protobuf';
import { ChangePasswordRequestSchema } from '../../gen/rekey/v1/user_service_pb.ts';
import { type Service, startService, strongPassword, type TestUser } from '../support/service.ts';
import {
  callFields,
  type Field,
  FLAG,
  FRAME,
  frame,
  grpcMessage,
  headerBlock,
  NOTHING,
  PREFACE,
  RawConnection,
  settings,
  uint32,
} from './frames.ts';
import {
  bystander,
  CHANGE,
  type Chance,
  chance,
  chooseSeed,
  connectHttp2,
  exchange,
  GET_SESSION,
  HEALTH_CHECK,
  LOGIN,
  REFLECTION,
  residentMiB,
} from './harness.ts';

const CALLS = 90_000;
const RAW_STREAMS = 10_000;
const RAW_CONNECTIONS = 400;
const CONNECTIONS = 4;
const IN_FLIGHT = 40;
const PROGRESS_EVERY = 10_000;
const MEMORY_GROWTH_MIB = 256;

let service: Service;
let user: TestUser;
const seed = chooseSeed();

before(async () => {
  service = await startService();
  user = await service.createUser();
});
after(async () => {
  await service.stop();
});

interface Malformed {
  readonly kind: string;
  readonly headers: OutgoingHttpHeaders;
  /** Absent: no DATA at all. */
  readonly body?: Buffer;
  readonly expected: readonly string[];
  /** Of ErrorInfo. */
  readonly reason?: string;
}

const EMPTY = grpcMessage(NOTHING);
const REFUSED = ['INVALID_ARGUMENT'];
const PROTOCOL_ERROR = 'RST 1';

/** What HTTP/2 lets pass as a field's value; of a field with any other it takes no notice at all. */
const latin1 = (by: Chance, length: number) =>
  Array.from({ length }, () => by.pick(FIELD_CHARACTERS)).join('');
const FIELD_CHARACTERS = Array.from({ length: 256 }, (_, code) => String.fromCharCode(code)).filter(
  (character) => /[\t\x20-\x7e\x80-\xff]/.test(character),
);
const notAscii = (by: Chance) => `${latin1(by, by.below(20))}\xe9${by.pick(['', 'abc', '\x80\xff'])}`;

/** Metadata of a call that would get as far as the session's look-up, and no further. */
const stranger: OutgoingHttpHeaders = { app: 'CRM', ust: 'nobody' };

/** A field of a protobuf message: its number and wire type, then bytes. */
const field = (number: number, wireType: number, ...bytes: readonly (number | Buffer)[]) =>
  Buffer.concat([
    Buffer.of((number << 3) | wireType),
    ...bytes.map((part) => (typeof part === 'number' ? Buffer.of(part) : part)),
  ]);

const BAD_UTF8 = [
  [0xff],
  [0xc3, 0x28],
  [0xed, 0xa0, 0x80],
  [0xf8, 0x88, 0x80, 0x80, 0x80],
  [0xc0, 0x80],
  [0xe2, 0x82],
];

/** No message of ours, whatever reads it. */
const undecodable: readonly ((by: Chance) => Buffer)[] = [
  (by) => field(by.pick([1, 2, 3]), 2, ...lengthAnd(Buffer.from(by.pick(BAD_UTF8)))),
  (by) => field(by.pick([1, 2, 3]), 2, 0x7f, by.bytes(by.below(100))),
  (by) => field(by.pick([1, 2, 3]), 2, ...Array<number>(10 + by.below(5)).fill(0xff)),
  () => field(4, 0, ...Array<number>(11).fill(0xff)),
  () => field(4, 0, 0x80),
  (by) => field(by.pick([1, 9]), 6, 0),
  (by) => field(by.pick([1, 9]), 7, 0),
  () => Buffer.of(0, 0),
  (by) => Buffer.alloc(1 + by.below(15_000), 0x4b),
  () => Buffer.of(0x4c),
  () => field(4, 5, 1, 2),
];

const lengthAnd = (bytes: Buffer): [number, Buffer] => [bytes.length, bytes];

const BOMBS = [gzipSync(Buffer.alloc(8_000_000)), gzipSync(Buffer.alloc(16_385))];
const DEFLATED_BOMB = deflateSync(Buffer.alloc(8_000_000));

const kinds: readonly ((by: Chance) => Malformed)[] = [
  (by) => ({
    kind: 'authority',
    headers: {
      ...stranger,
      ':authority': by.pick([
        'localhost:99999',
        'localhost:-1',
        '[::1',
        'a b',
        'http://x/y?z#',
        '..',
        '%00',
        '\xff\xfe',
        'user:password@host',
        'x'.repeat(1000),
        latin1(by, 1 + by.below(30)),
      ]),
    },
    body: EMPTY,
    expected: [...REFUSED, PROTOCOL_ERROR],
  }),
  (by) => ({
    kind: 'path',
    headers: {
      ...stranger,
      ':path': by.pick([
        '/',
        '*',
        '//',
        `${CHANGE}/`,
        CHANGE.toLowerCase(),
        `${CHANGE}?x=1`,
        '/rekey.v1.UserService/__proto__',
        '/constructor',
        '/%0d%0a%',
        '/../../x',
        `/${'a'.repeat(by.below(7000))}`,
        `/${notAscii(by)}`,
        `/${latin1(by, by.below(40))}`,
      ]),
    },
    body: EMPTY,
    expected: ['UNIMPLEMENTED', PROTOCOL_ERROR],
  }),
  (by) => ({
    kind: 'method',
    headers: {
      ...stranger,
      ust: user.ust,
      ':path': by.pick([CHANGE, GET_SESSION]),
      ':method': by.pick([
        'GET',
        'HEAD',
        'PUT',
        'DELETE',
        'OPTIONS',
        'PATCH',
        'TRACE',
        'post',
        'PRI',
        'X'.repeat(100),
      ]),
    },
    expected: ['HTTP 405', PROTOCOL_ERROR],
  }),
  (by) => ({
    kind: 'content-type',
    headers: {
      ...stranger,
      'content-type': by.pick([
        '',
        'application/json',
        'text/plain',
        'application/x-grpc',
        '*/*',
        latin1(by, 1 + by.below(20)),
      ]),
    },
    body: EMPTY,
    expected: ['HTTP 415', PROTOCOL_ERROR],
  }),
  (by) => ({
    kind: 'metadata that is not ASCII',
    headers: {
      app: 'CRM',
      ust: user.ust,
      [by.pick(['app', 'ust', 'cid', 'idempotency-key', 'remote-addr'])]: notAscii(by),
    },
    body: goodChange(),
    expected: [...REFUSED, PROTOCOL_ERROR],
    reason: 'INVALID_REQUEST',
  }),
  (by) => ({
    kind: 'metadata out of its form',
    headers: {
      app: 'CRM',
      ust: user.ust,
      ...by.pick([
        { cid: 'c'.repeat(129) },
        { cid: '' },
        { 'idempotency-key': 'k'.repeat(129) },
        { 'idempotency-key': '' },
        { 'remote-addr': by.pick(['1.2.3', '::1%lo', '1.2.3.4, 5.6.7.8', 'x', '[::1]', '1.2.3.4:5']) },
        { app: '' },
        { ust: 'u'.repeat(600) },
        { cid: ['a', 'b'] },
      ]),
    },
    body: goodChange(),
    expected: REFUSED,
    reason: 'INVALID_REQUEST',
  }),
  (by) => ({
    kind: 'metadata of no meaning',
    headers: {
      ...stranger,
      ...by.pick<OutgoingHttpHeaders>([
        { 'x-bin': '!!!not base64!!!' },
        { 'grpc-status-details-bin': '\xff' },
        { 'x!y': 'v' },
        { 'user-agent': notAscii(by) },
        { 'grpc-accept-encoding': notAscii(by) },
        { cookie: '\xe9;=' },
        { constructor: 'x', __proto__x: 'y' },
        { '__proto__-bin': 'x' },
      ]),
    },
    body: EMPTY,
    expected: [...REFUSED, PROTOCOL_ERROR],
  }),
  (by) => ({
    kind: 'metadata too large',
    headers: { ...stranger, 'x-large': 'v'.repeat(8192 + by.below(20_000)) },
    body: EMPTY,
    // ENHANCE_YOUR_CALM: to a gRPC client RESOURCE_EXHAUSTED.
    expected: ['RST 11'],
  }),
  (by) => ({
    kind: 'grpc-timeout garbage',
    headers: {
      ...stranger,
      'grpc-timeout': by.pick([
        '',
        'S',
        '-5S',
        '5',
        '5s',
        '1.5S',
        '123456789S',
        '5Sx',
        '1e3m',
        ' 5S5S',
        '0x1S',
        notAscii(by),
      ]),
    },
    body: EMPTY,
    expected: ['INTERNAL', PROTOCOL_ERROR],
  }),
  (by) => ({
    kind: 'grpc-timeout over',
    headers: { ...stranger, 'grpc-timeout': by.pick(['0H', '0S', '0m', '0u', '0n', '1n', '00000000m']) },
    body: EMPTY,
    expected: ['DEADLINE_EXCEEDED'],
  }),
  (by) => ({
    kind: 'grpc-timeout of years',
    headers: {
      ...stranger,
      'grpc-timeout': by.pick(['99999999H', '3600000S', '99999999M', '2147484S', '1193H']),
    },
    body: EMPTY,
    expected: REFUSED,
  }),
  (by) => ({
    kind: 'frame too long',
    headers: { ...stranger, ':path': by.pick([CHANGE, LOGIN, HEALTH_CHECK, REFLECTION]) },
    body: by.pick([
      grpcMessage(Buffer.alloc(16_385)),
      grpcMessage(by.bytes(10), { length: 0xffffffff }),
      grpcMessage(by.bytes(10), { length: 16_385 + by.below(2 ** 31) }),
    ]),
    expected: ['RESOURCE_EXHAUSTED'],
  }),
  (by) => ({
    kind: 'frame cut short',
    headers: { ...stranger, ':path': by.pick([CHANGE, LOGIN, HEALTH_CHECK]) },
    body: by.pick([
      by.bytes(1 + by.below(4)).fill(0),
      grpcMessage(by.bytes(by.below(100)), { length: 101 + by.below(16_000) }),
      NOTHING,
    ]),
    expected: ['UNIMPLEMENTED'],
  }),
  (by) => ({
    kind: 'no message',
    headers: { ...stranger, ':path': by.pick([CHANGE, LOGIN, GET_SESSION]) },
    expected: ['UNIMPLEMENTED'],
  }),
  (by) => ({
    kind: 'several messages',
    headers: { ...stranger, ust: user.ust },
    body: Buffer.concat(Array.from({ length: 2 + by.below(50) }, () => goodChange())),
    expected: ['UNIMPLEMENTED'],
  }),
  (by) => ({
    kind: 'compressed garbage',
    headers: { ...stranger, 'grpc-encoding': by.pick(['gzip', 'deflate']) },
    body: grpcMessage(by.bytes(by.below(50)), { flag: 1 }),
    expected: ['INTERNAL'],
  }),
  (by) => ({
    kind: 'compressed by an unknown algorithm',
    headers: { ...stranger, 'grpc-encoding': by.pick(['zstd', 'GZIP', 'x'.repeat(300), '%', '__proto__']) },
    body: grpcMessage(by.bytes(by.below(50)), { flag: 1 }),
    expected: ['UNIMPLEMENTED'],
  }),
  (by) => ({
    kind: 'compressed bomb',
    headers: { ...stranger, 'grpc-encoding': 'gzip' },
    body: grpcMessage(by.pick(BOMBS), { flag: 1 }),
    expected: ['RESOURCE_EXHAUSTED'],
  }),
  () => ({
    kind: 'deflated bomb',
    headers: { ...stranger, 'grpc-encoding': 'deflate' },
    body: grpcMessage(DEFLATED_BOMB, { flag: 1 }),
    expected: ['RESOURCE_EXHAUSTED'],
  }),
  ...Array.from(
    { length: 6 },
    () =>
      (by: Chance): Malformed => ({
        kind: 'undecodable message',
        headers: { app: 'CRM', ust: user.ust, ':path': by.pick([CHANGE, LOGIN]) },
        body: grpcMessage(by.pick(undecodable)(by)),
        expected: REFUSED,
        reason: 'INVALID_REQUEST',
      }),
  ),
  (by) => ({
    kind: 'message in wrong wire types',
    headers: stranger,
    body: grpcMessage(
      by.pick([
        field(1, 0, 1),
        field(2, 5, 1, 2, 3, 4),
        field(4, 2, 1, 1),
        field(6, 1, by.bytes(8)),
        field(5, 0, 0xff, 0x7f),
      ]),
    ),
    expected: REFUSED,
    reason: 'INVALID_REQUEST',
  }),
  (by) => ({
    kind: 'message of random bytes',
    headers: { ...stranger, ':path': by.pick([CHANGE, LOGIN]) },
    body: grpcMessage(by.bytes(by.below(60))),
    expected: [...REFUSED, 'UNAUTHENTICATED'],
  }),
  (by) => ({
    kind: 'message nested deeply',
    headers: stranger,
    body: grpcMessage(nested(1 + by.below(4000))),
    expected: REFUSED,
  }),
  (by) => ({
    kind: 'health and reflection, random bytes',
    headers: { ':path': by.pick([HEALTH_CHECK, REFLECTION]) },
    body: grpcMessage(by.bytes(by.below(40))),
    expected: ['OK', 'NOT_FOUND', 'INTERNAL'],
  }),
];

/** Groups within groups in an unknown field. */
const nested = (depth: number) =>
  Buffer.concat([Buffer.alloc(depth, field(9, 3)), Buffer.alloc(depth, field(9, 4))]);

/** What would change the password, were it not for what is wrong around it. */
const goodChange = () =>
  grpcMessage(
    Buffer.from(
      toBinary(
        ChangePasswordRequestSchema,
        create(ChangePasswordRequestSchema, {
          oldPassword: user.password,
          newPassword: 'Wq9-never-to-be-set-42',
        }),
      ),
    ),
  );

test(`${CALLS} malformed calls get the answers they deserve, and nothing changes`, async (t) => {
  t.diagnostic(`seed ${seed}`);
  console.log(`malformed calls: REKEY_TEST_SEED=${seed}`);
  const by = chance(seed);
  const { server } = service;
  const hash = await service.storedHash(user.userId);
  const well = await bystander(service, server, 25);
  const memory = residentMiB(server.pid);
  let peak = memory;
  const counts = new Map<string, number>();
  const surprises: string[] = [];
  let sent = 0;

  const worker = async (session: Awaited<ReturnType<typeof connectHttp2>>) => {
    while (sent < CALLS && surprises.length < 10) {
      if (++sent % PROGRESS_EVERY === 0) {
        peak = Math.max(peak, residentMiB(server.pid));
        console.log(
          `malformed calls: ${sent} of ${CALLS}, server at ${Math.round(residentMiB(server.pid))} MiB`,
        );
      }
      const { kind, headers, body, expected, reason } = by.pick(kinds)(by);
      const { result, details } = await exchange(session, { ':path': CHANGE, ...headers }, body);
      counts.set(`${kind}: ${result}`, (counts.get(`${kind}: ${result}`) ?? 0) + 1);
      const isExpected =
        expected.includes(result) &&
        (reason === undefined || result !== 'INVALID_ARGUMENT' || details.includes(reason));
      if (!isExpected)
        surprises.push(
          `${kind}: ${result} ${JSON.stringify(headers)} ${body?.toString('hex').slice(0, 100)}`,
        );
    }
  };
  const sessions = await Promise.all(Array.from({ length: CONNECTIONS }, () => connectHttp2(server.address)));
  await Promise.all(sessions.flatMap((session) => Array.from({ length: IN_FLIGHT }, () => worker(session))));
  for (const session of sessions) session.close();
  await well.stop();

  for (const [outcome, count] of [...counts].sort()) t.diagnostic(`${count} x ${outcome}`);
  assert.deepEqual(surprises, []);
  assert.equal(sent >= CALLS, true);
  assert.equal(await service.storedHash(user.userId), hash);
  assert.ok(peak - memory < MEMORY_GROWTH_MIB, `memory grew from ${memory} to ${peak} MiB`);
  assert.equal(server.stderr, '', 'nothing is said beside the log');
});

const END = FLAG.END_STREAM | FLAG.END_HEADERS;

/** Requests that no HTTP/2 client would send. */
const brokenFields: readonly ((by: Chance) => Field[])[] = [
  () => [],
  (by) => without(by.pick([':method', ':path', ':scheme'])),
  (by) => [...callFields(CHANGE), [by.pick([':method', ':path', ':scheme', ':authority']), 'x']],
  (by) => [by.pick(callFields(CHANGE)), ...callFields(CHANGE)],
  (by) => [[by.pick([':status', ':foo', ':protocol', ':']), '200'], ...callFields(CHANGE)],
  (by) =>
    callFields(CHANGE, [
      [by.pick(['Connection', 'connection', 'transfer-encoding', 'upgrade', 'keep-alive']), 'x'],
    ]),
  () => callFields(CHANGE, [['te', 'gzip']]),
  (by) => callFields(CHANGE, [[by.pick(['', ' ', 'UPPER', 'a b', 'a\0b', 'a\nb', '\xe9']), 'x']]),
  (by) => callFields(CHANGE, [['ust', by.pick(['a\0b', 'a\r\nx: y', 'a\nb', ' x ', '\x7f', '\x1b[31m'])]]),
  (by) => callFields(CHANGE, [['content-length', by.pick(['5', '-1', 'x', '99999999999999999999', '0, 0'])]]),
  (by) => callFields(by.pick(['', 'no-slash', '/\0', '/ ', '/\x7f'])),
  (by) =>
    callFields(
      CHANGE,
      Array.from({ length: 130 + by.below(100) }, (_, i) => [`k${i}`, 'v'] as const),
    ),
  (by) => [[by.bytes(by.below(20)), by.bytes(by.below(20))], ...callFields(CHANGE)],
];

const without = (name: string) => callFields(CHANGE).filter(([other]) => other !== name);

test(`${RAW_STREAMS} broken requests below HTTP/2's rules are each answered or reset`, async (t) => {
  const by = chance(seed + 1);
  const { server } = service;
  const well = await bystander(service, server, 25);
  const batch = 50;
  const counts = { answered: 0, reset: 0, cut: 0, unanswered: 0 };
  for (let sent = 0; sent < RAW_STREAMS; sent += batch) {
    const connection = await RawConnection.open(server.address);
    const ids = Array.from({ length: batch }, (_, i) => 1 + 2 * i);
    await connection.send(
      ...ids.map((id) => frame(FRAME.HEADERS, END, id, headerBlock(by.pick(brokenFields)(by)))),
    );
    const streamsWith = (wanted: number) =>
      new Set(connection.frames.filter(({ type }) => type === wanted).map(({ streamId }) => streamId));
    const isDone = () =>
      new Set([...streamsWith(FRAME.HEADERS), ...streamsWith(FRAME.RST_STREAM)]).size === batch;
    await connection.waitFor(isDone, 10_000);
    const answered = streamsWith(FRAME.HEADERS);
    const reset = [...streamsWith(FRAME.RST_STREAM)].filter((id) => !answered.has(id)).length;
    const rest = batch - answered.size - reset;
    counts.answered += answered.size;
    counts.reset += reset;
    counts[connection.isClosed ? 'cut' : 'unanswered'] += rest;
    connection.destroy();
  }
  await well.stop();
  t.diagnostic(JSON.stringify(counts));
  assert.equal(counts.unanswered, 0);
  assert.ok(counts.answered > 0 && counts.reset > 0);
});

const GET = FRAME.HEADERS;
/** What no connection may carry: openings, and frames after a good opening. */
const brokenOpenings: readonly ((by: Chance) => Buffer)[] = [
  (by) => by.bytes(24 + by.below(200)),
  () => Buffer.from('GET / HTTP/1.1\r\nHost: localhost\r\n\r\n'),
  () => Buffer.from('POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n'),
  () => Buffer.from([0x16, 3, 1, 0, 0xff, 1, 0, 0, 0xfb, 3, 3]),
  () => Buffer.concat([PREFACE, frame(FRAME.PING, 0, 0, Buffer.alloc(8))]),
  () => Buffer.concat([PREFACE, PREFACE]),
];
const brokenFrames: readonly ((by: Chance) => Buffer)[] = [
  () => frame(FRAME.SETTINGS, 0, 0, Buffer.alloc(5)),
  () => frame(FRAME.SETTINGS, 0, 1),
  () => frame(FRAME.SETTINGS, FLAG.ACK, 0, Buffer.alloc(6)),
  () => settings([2, 7]),
  () => settings([4, 0x80000000]),
  () => settings([5, 1]),
  () => frame(FRAME.PING, 0, 0, Buffer.alloc(7)),
  () => frame(FRAME.PING, 0, 3, Buffer.alloc(8)),
  () => frame(FRAME.DATA, 0, 0, Buffer.alloc(1)),
  () => frame(FRAME.DATA, 0, 99, Buffer.alloc(1)),
  () => frame(FRAME.DATA, FLAG.PADDED, 1, Buffer.of(200)),
  () => frame(FRAME.RST_STREAM, 0, 77, uint32(8)),
  () => frame(FRAME.RST_STREAM, 0, 0, uint32(8)),
  () => frame(FRAME.RST_STREAM, 0, 1, Buffer.alloc(3)),
  () => frame(FRAME.WINDOW_UPDATE, 0, 0, Buffer.alloc(3)),
  () => frame(FRAME.WINDOW_UPDATE, 0, 0, uint32(0)),
  () => frame(FRAME.WINDOW_UPDATE, 0, 99, uint32(1)),
  () => frame(FRAME.PRIORITY, 0, 1, Buffer.alloc(4)),
  () => frame(FRAME.PUSH_PROMISE, 4, 1, Buffer.alloc(8)),
  () => frame(FRAME.CONTINUATION, 4, 1),
  () => frame(FRAME.GOAWAY, 0, 0, Buffer.alloc(3)),
  () => frame(FRAME.HEADERS, END, 2, headerBlock(callFields(CHANGE))),
  () => frame(FRAME.HEADERS, END, 0, headerBlock(callFields(CHANGE))),
  () => frame(GET, END, 1, Buffer.of(0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)),
  () => frame(GET, END, 1, Buffer.of(0xbf)),
  () => frame(GET, END, 1, Buffer.of(0x00, 0x85, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00)),
  () => frame(GET, END | FLAG.PADDED, 1, Buffer.of(255)),
  () => Buffer.concat([frame(GET, FLAG.END_STREAM, 1, NOTHING), frame(FRAME.PING, 0, 0, Buffer.alloc(8))]),
  () => frame(FRAME.DATA, 0, 1, Buffer.alloc(20_000)),
  (by) => frame(10 + by.below(240), by.below(256), by.below(5), by.bytes(by.below(100))),
  (by) => frame(by.below(10), by.below(256), by.below(5), by.bytes(by.below(60))),
  (by) => frame(by.below(10), by.below(256), by.below(5), by.bytes(by.below(60)), by.below(2 ** 24)),
];

test('connections that break the protocol are closed or still work, and take nothing along', async () => {
  const by = chance(seed + 2);
  const { server } = service;
  const well = await bystander(service, server, 25);
  const opening = Buffer.concat([PREFACE, settings()]);
  const dangling: RawConnection[] = [];
  for (let done = 0; done < RAW_CONNECTIONS; done++) {
    const bytes =
      done % 4 === 0 ? by.pick(brokenOpenings)(by) : Buffer.concat([opening, by.pick(brokenFrames)(by)]);
    const connection = await RawConnection.open(server.address, bytes);
    dangling.push(connection);
    // A server that waits for the rest of a frame neither closes nor answers: what is slow is another test's.
    await connection.waitFor(({ type }) => type === FRAME.GOAWAY || type === FRAME.SETTINGS, 2000);
  }
  for (const connection of dangling) connection.destroy();
  await well.stop();
  assert.equal(server.stderr, '');
});

test('after all that a person changes a password as ever', async () => {
  const { server } = service;
  const newPassword = strongPassword();
  const headers = { app: 'CRM', ust: user.ust, cid: 'after-the-storm' };
  const answer = await server.change(headers, { oldPassword: user.password, newPassword });
  assert.equal(answer.code, 'OK', answer.reason);
  assert.ok(await service.isPassword(user.userId, newPassword));
});

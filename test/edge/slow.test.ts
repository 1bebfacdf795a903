/** Row 33 of the security tests: who is slow, or says nothing at all, is let go of within the configured limits. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, suite, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { connect as connectTls } from 'node:tls';
import { promisify } from 'node:util';
import { type ServerProcess, type Service, startServerProcess, startService } from '../support/service.ts';
import {
  callFields,
  FLAG,
  FRAME,
  frame,
  grpcMessage,
  headerBlock,
  NOTHING,
  PREFACE,
  RawConnection,
  SETTING,
  settings,
} from './frames.ts';
import { CHANGE, GET_SESSION } from './harness.ts';

const IDLE_MS = 1000;
const CALL_MS = 800;
/** A call may take its limit once for its message and once for its work; then its connection is idle. */
const STREAM_MS = 2 * CALL_MS;
/** What a peer is given for a good close, and a busy machine for all of it. */
const LATE_MS = 1000 + 4000;
const DRIP_MS = 40;

let service: Service;
let server: ServerProcess;
let tlsServer: ServerProcess;
let ust: string;
let directory: string;

before(async () => {
  service = await startService({
    REKEY_LIMITS_IDLE_SECONDS: String(IDLE_MS / 1000),
    REKEY_LIMITS_CALL_TIMEOUT_MS: String(CALL_MS),
    REKEY_LIMITS_KEEPALIVE_SECONDS: '60',
  });
  server = service.server;
  ({ ust } = await service.createUser());
  directory = await mkdtemp(join(tmpdir(), 'rekey-edge-'));
  const key = join(directory, 'key.pem');
  const certificate = join(directory, 'certificate.pem');
  await promisify(execFile)('openssl', [
    ...['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '1'],
    ...[
      '-subj',
      '/CN=localhost',
      '-addext',
      'subjectAltName=IP:127.0.0.1',
      '-keyout',
      key,
      '-out',
      certificate,
    ],
  ]);
  tlsServer = await startServerProcess({
    ...server.environment,
    REKEY_TLS_CERTIFICATE_FILE: certificate,
    REKEY_TLS_KEY_FILE: key,
  });
});
after(async () => {
  await tlsServer.stop();
  await service.stop();
  await rm(directory, { recursive: true });
});

const OPENING = Buffer.concat([PREFACE, settings()]);
const headers = (path: string, flags: number, more: readonly [string, string][] = []) =>
  frame(FRAME.HEADERS, flags, 1, headerBlock(callFields(path, more)));

/** Writes one byte after the other until there are none left or nobody takes them. */
async function drip(connection: RawConnection, bytes: Buffer): Promise<void> {
  for (const byte of bytes) {
    if (connection.isClosed) return;
    await connection.send(Buffer.of(byte));
    await sleep(DRIP_MS);
  }
}

async function assertLetGo(connection: RawConnection, limitMs: number): Promise<void> {
  const isLetGo = await connection.closesWithin(limitMs + LATE_MS - connection.ageMs);
  const ageMs = connection.ageMs;
  connection.destroy();
  assert.ok(isLetGo, `still there after ${Math.round(ageMs)} ms of at most ${limitMs}`);
  assert.ok(ageMs > IDLE_MS / 2, `a limit of ${limitMs} ms is not one of ${Math.round(ageMs)}`);
}

suite('slow clients', { concurrency: true }, () => {
  const openings: readonly (readonly [string, Buffer])[] = [
    ['says nothing at all', NOTHING],
    ['begins a preface', PREFACE.subarray(0, 10)],
    ['sends a preface without SETTINGS', PREFACE],
    ['opens a connection and makes no call', OPENING],
    ['begins a frame', Buffer.concat([OPENING, headers(CHANGE, FLAG.END_HEADERS).subarray(0, 20)])],
    ['begins a header block', Buffer.concat([OPENING, headers(CHANGE, 0)])],
  ];
  for (const [what, opening] of openings) {
    test(`a connection that ${what} is closed when it has been idle for too long`, async () => {
      await assertLetGo(await RawConnection.open(server.address, opening), IDLE_MS);
    });
  }

  test('a connection that speaks one byte at a time is closed as an idle one', async () => {
    const connection = await RawConnection.open(server.address, NOTHING);
    drip(connection, Buffer.concat([OPENING, headers(CHANGE, FLAG.END_HEADERS), Buffer.alloc(200)]));
    await assertLetGo(connection, IDLE_MS);
  });

  test('a call without its message is ended, and then its connection', async () => {
    const connection = await RawConnection.open(server.address);
    await connection.send(headers(CHANGE, FLAG.END_HEADERS));
    const answer = await connection.waitFor(({ type }) => type === FRAME.HEADERS, CALL_MS + LATE_MS);
    assert.ok(answer && connection.ageMs >= CALL_MS * 0.9, 'the answer came, and not too early');
    await assertLetGo(connection, STREAM_MS + IDLE_MS);
  });

  test('a call whose message comes one byte at a time is ended, and then its connection', async () => {
    const connection = await RawConnection.open(server.address);
    const message = grpcMessage(Buffer.alloc(10_000));
    await connection.send(headers(CHANGE, FLAG.END_HEADERS));
    const dripping = (async () => {
      for (const byte of message) {
        if (connection.isClosed) return;
        await connection.send(frame(FRAME.DATA, 0, 1, Buffer.of(byte)));
        await sleep(DRIP_MS);
      }
    })();
    const answer = await connection.waitFor(({ type }) => type === FRAME.HEADERS, CALL_MS + LATE_MS);
    assert.ok(answer, 'the call is answered, its message being incomplete');
    await assertLetGo(connection, STREAM_MS + IDLE_MS);
    await dripping;
  });

  test('a call whose answer is never taken is reset, and then its connection is closed', async () => {
    const opening = Buffer.concat([PREFACE, settings([SETTING.INITIAL_WINDOW_SIZE, 0])]);
    const connection = await RawConnection.open(server.address, opening);
    await connection.send(
      headers(GET_SESSION, FLAG.END_HEADERS, [
        ['ust', ust],
        ['app', 'CRM'],
      ]),
      frame(FRAME.DATA, FLAG.END_STREAM, 1, grpcMessage(NOTHING)),
    );
    const reset = await connection.waitFor(({ type }) => type === FRAME.RST_STREAM, STREAM_MS + LATE_MS);
    assert.ok(reset, 'the stream is reset');
    await assertLetGo(connection, STREAM_MS + IDLE_MS);
  });

  test('a connection that never reads is closed, however many calls it makes', async () => {
    const connection = await RawConnection.open(server.address);
    connection.socket.pause();
    for (let i = 0; i < 90; i++) {
      await connection.send(
        frame(
          FRAME.HEADERS,
          FLAG.END_HEADERS | FLAG.END_STREAM,
          1 + 2 * i,
          headerBlock(callFields(CHANGE, [['cid', 'c'.repeat(128)]])),
        ),
      );
    }
    await sleep(STREAM_MS + IDLE_MS);
    connection.socket.resume();
    await assertLetGo(connection, STREAM_MS + IDLE_MS);
  });

  test('a TLS handshake that is not begun, or not finished, is given up', async () => {
    for (const opening of [NOTHING, Buffer.from([0x16, 3, 1, 0x02, 0x00, 1, 0, 1])]) {
      await assertLetGo(await RawConnection.open(tlsServer.address, opening), IDLE_MS);
    }
  });

  test('a TLS connection that is idle, or speaks no HTTP/2, is closed', async () => {
    const [host = '', port = ''] = tlsServer.address.split(':');
    for (const ALPNProtocols of [['h2'], undefined]) {
      const start = performance.now();
      const socket = connectTls({
        host,
        port: Number(port),
        rejectUnauthorized: false,
        ...(ALPNProtocols ? { ALPNProtocols } : {}),
      });
      socket.on('error', () => {});
      socket.resume();
      await once(socket, 'secureConnect');
      await Promise.race([once(socket, 'close'), sleep(IDLE_MS + LATE_MS, undefined, { ref: false })]);
      const isClosed = socket.closed;
      socket.destroy();
      assert.ok(isClosed, `open after ${performance.now() - start} ms, ALPN ${ALPNProtocols}`);
    }
  });

  test('a client that makes a call now and then keeps its connection', async () => {
    const connection = await RawConnection.open(server.address);
    for (let id = 1; id < 12; id += 2) {
      await sleep(IDLE_MS / 2);
      await connection.send(
        frame(FRAME.HEADERS, FLAG.END_HEADERS | FLAG.END_STREAM, id, headerBlock(callFields(CHANGE))),
      );
      assert.ok(await connection.waitFor(({ type, streamId }) => type === FRAME.HEADERS && streamId === id));
    }
    connection.destroy();
  });
});

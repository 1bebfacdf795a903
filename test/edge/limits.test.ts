/** Rows 15, 29, 30, 31 and 34 of the security tests: each limit, just within it and just beyond. */
import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import type { AddressInfo } from 'node:net';
import { createServer } from 'node:net';
import { after, before, suite, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import {
  status as Code,
  credentials,
  Metadata,
  makeGenericClientConstructor,
  type ServiceError,
} from '@grpc/grpc-js';
import mysql from 'mysql2/promise';
import { SessionService } from '../../gen/rekey/v1/session_service_pb.ts';
import {
  eventually,
  type ServerProcess,
  type Service,
  startService,
  strongPassword,
  type TestUser,
} from '../support/service.ts';
import {
  callFields,
  FLAG,
  FRAME,
  frame,
  grpcMessage,
  headerBlock,
  NOTHING,
  RawConnection,
  type Received,
} from './frames.ts';
import { CHANGE, connectHttp2, exchange, GET_SESSION, quantile, residentMiB } from './harness.ts';

const CRM = { app: 'CRM' };
const REFUSED_STREAM = 7;
const ENHANCE_YOUR_CALM = 11;

let service: Service;

before(async () => {
  service = await startService(
    { REKEY_HASH_MEMORY_KIB: '19456', REKEY_HASH_ITERATIONS: '2' },
    { gated: true },
  );
});
after(async () => {
  await service.stop();
});

const raw = { serialize: (bytes: Buffer) => bytes, deserialize: (bytes: Buffer) => bytes };
const RawClient = makeGenericClientConstructor(
  {
    getSession: {
      path: GET_SESSION,
      requestStream: false,
      responseStream: false,
      requestSerialize: raw.serialize,
      requestDeserialize: raw.deserialize,
      responseSerialize: raw.serialize,
      responseDeserialize: raw.deserialize,
    },
  },
  'SessionService',
);

/** GetSession through grpc-js, as the status code that its caller sees. */
function grpcClient(address: string) {
  const client = new RawClient(address, credentials.createInsecure());
  return {
    getSession: (fields: Record<string, string>) =>
      new Promise<number>((resolve) => {
        const metadata = new Metadata();
        for (const [key, value] of Object.entries(fields)) metadata.set(key, value);
        client.getSession?.(NOTHING, metadata, (error: ServiceError | null) =>
          resolve(error?.code ?? Code.OK),
        );
      }),
    close: () => client.close(),
  };
}

// ---- sizes ------------------------------------------------------------------------------------------------------

test('a message of 16 KiB is read, one byte more is refused', async () => {
  const session = await connectHttp2(service.server.address);
  const ask = (bytes: number) =>
    exchange(session, { ':path': CHANGE, ...CRM, ust: 'nobody' }, grpcMessage(Buffer.alloc(bytes, 0x4b)));
  assert.equal((await ask(16_384)).result, 'INVALID_ARGUMENT');
  assert.equal((await ask(16_385)).result, 'RESOURCE_EXHAUSTED');
  session.close();
});

test('metadata of 8 KiB is read, more is refused, to a gRPC client as RESOURCE_EXHAUSTED', async () => {
  const { ust } = await service.createUser();
  const client = grpcClient(service.server.address);
  assert.equal(await client.getSession({ ...CRM, ust, 'x-large': 'v'.repeat(7000) }), Code.OK);
  assert.equal(
    await client.getSession({ ...CRM, ust, 'x-large': 'v'.repeat(8192) }),
    Code.RESOURCE_EXHAUSTED,
  );
  assert.equal(await client.getSession({ ...CRM, ust }), Code.OK, 'the connection is as good as before');
  client.close();
});

test('metadata of more than 8 KiB is refused to a peer that never acknowledged the limit', async () => {
  const connection = await RawConnection.open(service.server.address);
  const fields = callFields(CHANGE, [['x-large', 'v'.repeat(9000)]]);
  await connection.send(frame(FRAME.HEADERS, FLAG.END_HEADERS | FLAG.END_STREAM, 1, headerBlock(fields)));
  const answer = await connection.waitFor(({ streamId }) => streamId === 1);
  connection.destroy();
  assert.equal(answer?.type, FRAME.RST_STREAM);
  assert.equal(answer.payload.readUInt32BE(), ENHANCE_YOUR_CALM);
});

test('a connection has 100 streams, and those beyond are refused as never begun', async () => {
  const session = await connectHttp2(service.server.address);
  assert.equal(session.remoteSettings.maxConcurrentStreams, 100);
  session.close();

  const connection = await RawConnection.open(service.server.address);
  const ids = Array.from({ length: 120 }, (_, i) => 1 + 2 * i);
  await connection.send(
    ...ids.map((id) => frame(FRAME.HEADERS, FLAG.END_HEADERS, id, headerBlock(callFields(CHANGE)))),
  );
  const resets = () => connection.frames.filter(({ type }) => type === FRAME.RST_STREAM);
  await eventually('the resets', () => resets().length >= 20);
  assert.deepEqual(
    resets().map(({ streamId }) => streamId),
    ids.slice(100),
  );
  assert.ok(resets().every(({ payload }) => payload.readUInt32BE() === REFUSED_STREAM));
  await connection.send(frame(FRAME.DATA, FLAG.END_STREAM, 1, grpcMessage(NOTHING)));
  assert.ok(await connection.waitFor(({ type, streamId }) => type === FRAME.HEADERS && streamId === 1));
  connection.destroy();
});

// ---- time -------------------------------------------------------------------------------------------------------

const DEADLINE_MS = 300;
/** The deadline is not to be waited for any longer than a busy machine makes it. */
const ON_TIME_MS = DEADLINE_MS + 1500;

interface Attempt {
  readonly user: TestUser;
  readonly hash: string;
  readonly cid: string;
  call(options: { timeoutMs?: number; signal?: AbortSignal }): ReturnType<ServerProcess['change']>;
  assertUnchanged(): Promise<void>;
}

async function attempt(cid: string): Promise<Attempt> {
  const user = await service.createUser();
  const hash = await service.storedHash(user.userId);
  return {
    user,
    hash,
    cid,
    call: (options) =>
      service.server.change(
        { ...CRM, ust: user.ust, cid },
        { oldPassword: user.password, newPassword: strongPassword() },
        options,
      ),
    assertUnchanged: async () => {
      await service.server.lineOf(cid);
      // What was begun and not called back would be done by now.
      await sleep(500);
      assert.equal(await service.storedHash(user.userId), hash);
      assert.deepEqual(
        (await service.auditOf(cid)).filter(({ outcome }) => outcome === 'ok'),
        [],
      );
    },
  };
}

test('a deadline passes on time while the database says nothing, and nothing is changed', async () => {
  const { call, cid, assertUnchanged } = await attempt('deadline-stalled');
  service.gate?.stall();
  const start = performance.now();
  const { code } = await call({ timeoutMs: DEADLINE_MS });
  const ms = performance.now() - start;
  const line = await service.server.lineOf(cid);
  await service.gate?.open();
  assert.equal(code, 'DEADLINE_EXCEEDED');
  assert.ok(ms >= DEADLINE_MS * 0.9 && ms < ON_TIME_MS, `${ms} ms`);
  assert.match(String(line.code), /^(DEADLINE_EXCEEDED|CANCELLED)$/, 'the server gave up too');
  await assertUnchanged();
  await service.server.waitForHealth('SERVING');
});

/** Holds the row of a user in a transaction while `work` runs. */
async function whileLocked(userId: string, work: () => Promise<void>): Promise<void> {
  const connection = await mysql.createConnection({ uri: service.databaseUrl });
  try {
    await connection.beginTransaction();
    await connection.query('SELECT 1 FROM users WHERE user_id = ? FOR UPDATE', [userId]);
    await work();
  } finally {
    await connection.rollback();
    await connection.end();
  }
}

test('a deadline passes on time while the row is locked, and nothing is changed', async () => {
  const { user, call, assertUnchanged } = await attempt('deadline-locked');
  await whileLocked(user.userId, async () => {
    const start = performance.now();
    const { code } = await call({ timeoutMs: DEADLINE_MS });
    const ms = performance.now() - start;
    assert.equal(code, 'DEADLINE_EXCEEDED');
    assert.ok(ms >= DEADLINE_MS * 0.9 && ms < ON_TIME_MS, `${ms} ms`);
  });
  await assertUnchanged();
});

test('a call that is dead on arrival is answered so, and no work is begun', async () => {
  const { user, cid, assertUnchanged } = await attempt('deadline-zero');
  const session = await connectHttp2(service.server.address);
  for (const timeout of ['0m', '1n']) {
    const { result } = await exchange(
      session,
      { ':path': GET_SESSION, ...CRM, ust: user.ust, cid, 'grpc-timeout': timeout },
      grpcMessage(NOTHING),
    );
    assert.equal(result, 'DEADLINE_EXCEEDED');
  }
  session.close();
  const line = await service.server.lineOf(cid);
  assert.equal(line.code, 'DEADLINE_EXCEEDED');
  assert.equal(line.databaseMs, 0);
  await assertUnchanged();
});

test('a call cancelled while it waits for the database changes nothing', async () => {
  const { user, call, cid, assertUnchanged } = await attempt('cancelled-waiting');
  const abort = new AbortController();
  await whileLocked(user.userId, async () => {
    const calling = call({ signal: abort.signal });
    await sleep(200);
    abort.abort();
    assert.equal((await calling).code, 'CANCELLED');
    const line = await service.server.lineOf(cid);
    assert.equal(line.code, 'CANCELLED', 'the server knows');
  });
  await assertUnchanged();
});

test('calls reset at every moment of their lives either change all or nothing', async () => {
  const users = await Promise.all(Array.from({ length: 24 }, () => service.createUser()));
  const outcomes = await Promise.all(
    users.map(async (user, i) => {
      await sleep(i * 20);
      const hash = await service.storedHash(user.userId);
      const cid = `cancelled-${i}`;
      const abort = new AbortController();
      const message = { oldPassword: user.password, newPassword: strongPassword() };
      const calling = service.server.change({ ...CRM, ust: user.ust, cid }, message, {
        signal: abort.signal,
      });
      setTimeout(() => abort.abort(), i * 5);
      const { code } = await calling;
      // The request itself may never have left.
      const line = await Promise.race([
        service.server.lineOf(cid),
        sleep(3000, undefined, { ref: false }),
      ]).catch(() => undefined);
      await sleep(200);
      const isChanged = (await service.storedHash(user.userId)) !== hash;
      const audited = (await service.auditOf(cid)).filter(({ outcome }) => outcome === 'ok').length;
      assert.equal(audited, isChanged ? 1 : 0, `${cid}: changed ${isChanged}, audited ${audited}`);
      if (code === 'OK') assert.ok(isChanged);
      if (line?.code === 'OK') assert.ok(isChanged);
      return code;
    }),
  );
  assert.ok(outcomes.includes('CANCELLED'), `one at least was in time: ${outcomes}`);
});

// ---- connections that last --------------------------------------------------------------------------------------

const AGE_MS = 2000;
const KEEPALIVE_MS = 1000;

/** State of the server's end of the connection from `port`, by the system's own table; undefined: there is none. */
function serverEnd(serverPort: number, port: number): string | undefined {
  const hex = (number: number) => number.toString(16).toUpperCase().padStart(4, '0');
  for (const line of readFileSync('/proc/net/tcp', 'utf8').split('\n').slice(1)) {
    const [, local = '', remote = '', state] = line.trim().split(/\s+/);
    if (local.endsWith(`:${hex(serverPort)}`) && remote.endsWith(`:${hex(port)}`)) return state;
  }
  return undefined;
}
const ESTABLISHED = '01';

/** Holds a Health.Watch open, and tells the port it does so from. */
const WATCHER = `
  const session = require('node:http2').connect('http://' + process.argv[1]);
  session.on('error', () => {});
  const stream = session.request({ ':method': 'POST', ':path': '/grpc.health.v1.Health/Watch', te: 'trailers', 'content-type': 'application/grpc' });
  stream.on('error', () => {});
  stream.once('data', () => console.log(session.socket.localPort));
  stream.end(Buffer.alloc(5));
`;

suite('connections that last', { concurrency: true }, () => {
  let server: ServerProcess;
  const children: ChildProcess[] = [];
  before(async () => {
    server = await service.startServer({
      REKEY_LIMITS_CONNECTION_AGE_SECONDS: String(AGE_MS / 1000),
      REKEY_LIMITS_KEEPALIVE_SECONDS: String(KEEPALIVE_MS / 1000),
    });
    await server.waitForHealth('SERVING');
  });
  after(() => {
    for (const child of children) child.kill('SIGKILL');
  });

  test('a peer that is frozen is let go of, one that is not is kept', async () => {
    const patient = await service.startServer({
      REKEY_LIMITS_KEEPALIVE_SECONDS: String(KEEPALIVE_MS / 1000),
    });
    await patient.waitForHealth('SERVING');
    const serverPort = Number(patient.address.split(':').at(-1));
    const watch = async () => {
      const child = spawn(process.execPath, ['-e', WATCHER, patient.address], {
        stdio: ['ignore', 'pipe', 'inherit'],
      });
      children.push(child);
      const [line] = await once(child.stdout, 'data');
      return { child, port: Number(String(line)) };
    };
    const [frozen, lively] = await Promise.all([watch(), watch()]);
    assert.equal(serverEnd(serverPort, frozen.port), ESTABLISHED);
    frozen.child.kill('SIGSTOP');
    const start = performance.now();
    await eventually('the frozen one gone', () => serverEnd(serverPort, frozen.port) !== ESTABLISHED);
    assert.ok(performance.now() - start < 2 * KEEPALIVE_MS + 5000);
    assert.equal(serverEnd(serverPort, lively.port), ESTABLISHED);
  });

  /** How long 40 connections were there for, none of which makes a call. */
  const agesOfConnections = async () => {
    const connections = await Promise.all(
      Array.from({ length: 40 }, () => RawConnection.open(server.address)),
    );
    return await Promise.all(
      connections.map(async (connection) => {
        // An unanswered keepalive would end it too; what it asks is answered.
        for (let answered = 0; !connection.isClosed; ) {
          const pings = connection.frames.filter(
            ({ type, flags }) => type === FRAME.PING && !(flags & FLAG.ACK),
          );
          for (; answered < pings.length; answered++) {
            await connection.send(frame(FRAME.PING, FLAG.ACK, 0, pings[answered]?.payload));
          }
          await sleep(20);
        }
        assert.equal(connection.goaway?.code, 0);
        return connection.ageMs;
      }),
    );
  };

  test('the ages that connections reach differ by a tenth either way, and each ends with GOAWAY', async () => {
    const isSpread = (ages: readonly number[]) => quantile(ages, 0.9) - quantile(ages, 0.1) > AGE_MS * 0.05;
    // Where this process itself is held up it sees all of them end at once: looked at again then.
    let ages: number[] = [];
    for (let round = 0; round < 3 && !isSpread(ages); round++) ages = await agesOfConnections();
    assert.ok(isSpread(ages), `${ages.map(Math.round)}`);
    const [first, last] = [Math.min(...ages), Math.max(...ages)];
    assert.ok(first > AGE_MS * 0.85 && last < AGE_MS * 1.1 + 3000, `${first} to ${last} ms`);
  });

  test('a call under way when its connection is of age is answered, one that came too late is told so', async () => {
    const connection = await RawConnection.open(server.address);
    const call = (id: number) => frame(FRAME.HEADERS, FLAG.END_HEADERS, id, headerBlock(callFields(CHANGE)));
    const message = (id: number) => frame(FRAME.DATA, FLAG.END_STREAM, id, grpcMessage(NOTHING));
    await connection.send(call(1));
    const keepalive = await connection.waitFor(
      ({ type, flags }) => type === FRAME.PING && !(flags & FLAG.ACK),
    );
    await connection.send(frame(FRAME.PING, FLAG.ACK, 0, keepalive?.payload));
    const lastStreamId = ({ type, payload }: Received) =>
      type === FRAME.GOAWAY ? payload.readUInt32BE() : undefined;
    // A client sends again by itself what the server never began: what lies beyond the last stream that GOAWAY names.
    assert.ok(await connection.waitFor((received) => lastStreamId(received) === 1));
    await connection.send(call(3), message(3), message(1));
    assert.ok(await connection.waitFor(({ type, streamId }) => type === FRAME.HEADERS && streamId === 1));
    assert.ok(await connection.closesWithin(10_000));
    assert.ok(!connection.frames.some(({ streamId }) => streamId === 3));
  });

  test('connections end of age under load and no call fails', async () => {
    const { ust } = await service.createUser();
    const viaGrpc = grpcClient(server.address);
    const viaConnect = server.client(SessionService);
    const failures: string[] = [];
    const deadline = performance.now() + 3 * AGE_MS;
    let calls = 0;
    const load = async (call: () => Promise<number>) => {
      while (performance.now() < deadline) {
        calls++;
        const code = await call();
        if (code !== Code.OK) failures.push(Code[code] ?? String(code));
        await sleep(2);
      }
    };
    const grpc = () => viaGrpc.getSession({ ...CRM, ust });
    const connect = (isAgain = false): Promise<number> =>
      viaConnect.getSession({}, { headers: { ...CRM, ust } }).then(
        () => Code.OK,
        // This client refuses, itself, what it would send in the moment of a GOAWAY: nothing has left it.
        (error: Error & { code: number }) =>
          error.message.includes('REFUSED_STREAM') && !isAgain ? connect(true) : error.code,
      );
    await Promise.all([
      ...Array.from({ length: 8 }, () => load(grpc)),
      ...Array.from({ length: 4 }, () => load(() => connect())),
    ]);
    viaGrpc.close();
    assert.ok(calls > 200, `${calls} calls`);
    assert.deepEqual(failures, [], `of ${calls} calls`);
  });
});

// ---- costly work ------------------------------------------------------------------------------------------------

async function freePort(): Promise<number> {
  const probe = createServer().listen(0, '127.0.0.1');
  await once(probe, 'listening');
  const { port } = probe.address() as AddressInfo;
  await new Promise((resolve) => probe.close(resolve));
  return port;
}

test('of 1,000 calls at once no more hash than there are slots, and those beyond hear so at once', async (t) => {
  const slots = 3;
  const calls = 1000;
  const metricsPort = await freePort();
  const server = await service.startServer({
    REKEY_HASH_SLOTS: String(slots),
    REKEY_HASH_QUEUE_LENGTH: '60',
    REKEY_METRICS_LISTEN: `127.0.0.1:${metricsPort}`,
  });
  await server.waitForHealth('SERVING');
  const people = await Promise.all(Array.from({ length: 20 }, () => service.createUser()));
  const memory = residentMiB(server.pid);
  let peak = memory;
  let taken = 0;
  let isDone = false;
  const watching = (async () => {
    while (!isDone) {
      peak = Math.max(peak, residentMiB(server.pid));
      const text = await fetch(`http://127.0.0.1:${metricsPort}/metrics`).then((response) => response.text());
      taken = Math.max(taken, Number(/^rekey_hash_slots_taken (\d+)/m.exec(text)?.[1]));
      await sleep(10);
    }
  })();
  const answers = await Promise.all(
    Array.from({ length: calls }, (_, i) => {
      const user = people[i % people.length] as TestUser;
      const message = { oldPassword: user.password, newPassword: strongPassword(), validateOnly: true };
      return server.change({ ...CRM, ust: user.ust, cid: `burst-${i}` }, message, { timeoutMs: 20_000 });
    }),
  );
  isDone = true;
  await watching;
  const counts = new Map<string, number>();
  for (const { code, reason } of answers)
    counts.set(`${code} ${reason}`, (counts.get(`${code} ${reason}`) ?? 0) + 1);
  await server.lineOf('burst-999');
  const waits = server.log
    .filter(({ msg, reason }) => msg === 'call' && reason === 'OVERLOADED')
    .map(({ queueMs }) => Number(queueMs));
  t.diagnostic(`${JSON.stringify([...counts])}, slots taken ${taken}, memory ${memory} to ${peak} MiB`);
  t.diagnostic(
    `refused after p50 ${quantile(waits, 0.5)} ms, p99 ${quantile(waits, 0.99)} ms of waiting for a slot`,
  );
  assert.deepEqual(
    [...counts.keys()].filter(
      (what) =>
        !['OK ', 'RESOURCE_EXHAUSTED OVERLOADED', 'RESOURCE_EXHAUSTED TOO_MANY_ATTEMPTS'].includes(what),
    ),
    [],
  );
  assert.ok((counts.get('OK ') ?? 0) > 0);
  assert.ok(waits.length > 0, 'some were refused');
  assert.ok(quantile(waits, 0.5) < 100, 'at once, mostly');
  assert.ok(taken <= slots, `${taken} slots taken`);
  // 1,000 hashes at once would take 19 GiB.
  assert.ok(peak - memory < 512, `memory grew from ${memory} to ${peak} MiB`);
  assert.ok(
    answers.every(({ retryMs, reason }) => reason !== 'OVERLOADED' || (retryMs ?? 0) > 0),
    'each with RetryInfo',
  );
});

/**
 * Row 32 of the security tests: one bad connection is closed or costs next to nothing; the others do not notice,
 * and what memory it took is given back.
 */
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Service, startService } from '../support/service.ts';
import {
  callFields,
  type Field,
  FLAG,
  FRAME,
  frame,
  grpcMessage,
  headerBlock,
  PREFACE,
  RawConnection,
  SETTING,
  settings,
  uint32,
} from './frames.ts';
import {
  type Bystander,
  bystander,
  CHANGE,
  HEALTH_WATCH,
  quantile,
  REFLECTION,
  residentMiB,
  settledMiB,
} from './harness.ts';

const ROUNDS = 3;
/** Of one round, for a server that neither closes nor drops what it gets. */
const ROUND_MS = 4000;
const BASELINE_MS = 1500;
const MEMORY_SLACK_MIB = 32;
/** A busy machine makes anybody wait for as long, flood or not. */
const LATENCY_FLOOR_MS = 750;
const CANCEL = uint32(8);
const END = FLAG.END_STREAM | FLAG.END_HEADERS;

let service: Service;
let well: Bystander;
let usualP99Ms: number;

before(async () => {
  service = await startService();
  well = await bystander(service, service.server);
  await sleep(BASELINE_MS);
  usualP99Ms = quantile(well.takeLatencies(), 0.99);
});
after(async () => {
  await well.stop();
  await service.stop();
});

const headers = (id: number, path: string, flags: number, more: readonly Field[] = []) =>
  frame(FRAME.HEADERS, flags, id, headerBlock(callFields(path, more)));

/** Sends what `batch` makes until all of it is out, the connection is closed or the time is up. */
async function pour(
  connection: RawConnection,
  batches: number,
  batch: (index: number) => Buffer,
): Promise<void> {
  const deadline = performance.now() + ROUND_MS;
  for (let i = 0; i < batches && !connection.isClosed && performance.now() < deadline; i++) {
    await Promise.race([connection.send(batch(i)), sleep(200)]);
  }
}

const many = (count: number, make: (index: number) => Buffer) =>
  Buffer.concat(Array.from({ length: count }, (_, i) => make(i)));

interface Flood {
  readonly name: string;
  /** Whether the server ends the connection. */
  readonly isClosed: boolean;
  pour(connection: RawConnection): Promise<void>;
  readonly opening?: Buffer;
}

const reset = (path: string) => (connection: RawConnection) =>
  pour(connection, 200, (batch) =>
    many(100, (i) => {
      const id = 1 + 2 * (100 * batch + i);
      return Buffer.concat([headers(id, path, FLAG.END_HEADERS), frame(FRAME.RST_STREAM, 0, id, CANCEL)]);
    }),
  );

const floods: readonly Flood[] = [
  { name: 'rapid reset (CVE-2023-44487)', isClosed: true, pour: reset(CHANGE) },
  { name: 'rapid reset of calls of no method', isClosed: true, pour: reset('/x.Y/Z') },
  {
    name: 'reset by the server: more streams than it takes',
    isClosed: true,
    pour: (connection) =>
      pour(connection, 200, (batch) =>
        many(100, (i) => headers(1 + 2 * (100 * batch + i), CHANGE, FLAG.END_HEADERS)),
      ),
  },
  {
    name: 'CONTINUATION without an end (CVE-2024-27983)',
    isClosed: true,
    pour: async (connection) => {
      await connection.send(headers(1, CHANGE, 0));
      const more = many(10, (i) =>
        frame(FRAME.CONTINUATION, 0, 1, headerBlock([[`x-${i}`, 'v'.repeat(1000)]])),
      );
      await pour(connection, 2000, () => more);
    },
  },
  {
    name: 'CONTINUATION of no bytes',
    isClosed: true,
    pour: async (connection) => {
      await connection.send(headers(1, CHANGE, 0));
      const more = many(1000, () => frame(FRAME.CONTINUATION, 0, 1));
      await pour(connection, 200, () => more);
    },
  },
  {
    name: 'PING',
    isClosed: true,
    pour: async (connection) => {
      const pings = many(2000, () => frame(FRAME.PING, 0, 0, Buffer.alloc(8)));
      connection.socket.pause();
      await pour(connection, 500, () => pings);
      connection.socket.resume();
    },
  },
  {
    name: 'SETTINGS',
    isClosed: true,
    pour: (connection) => {
      const all = many(2000, () => settings([SETTING.INITIAL_WINDOW_SIZE, 65_535]));
      return pour(connection, 500, () => all);
    },
  },
  {
    name: 'DATA of no bytes',
    isClosed: true,
    pour: async (connection) => {
      await connection.send(headers(1, CHANGE, FLAG.END_HEADERS));
      const empty = many(2000, () => frame(FRAME.DATA, 0, 1));
      await pour(connection, 500, () => empty);
    },
  },
  {
    name: 'DATA on and on after the refusal',
    isClosed: false,
    pour: async (connection) => {
      await connection.send(headers(1, CHANGE, FLAG.END_HEADERS));
      await pour(connection, 500, () => frame(FRAME.DATA, 0, 1, Buffer.alloc(16_000, 1)));
    },
  },
  {
    name: 'PRIORITY',
    isClosed: true,
    pour: (connection) => {
      const all = many(2000, (i) => frame(FRAME.PRIORITY, 0, 1 + 2 * i, Buffer.from([0, 0, 0, 0, 9])));
      return pour(connection, 500, () => all);
    },
  },
  {
    name: 'WINDOW_UPDATE of nothing',
    isClosed: true,
    pour: (connection) => pour(connection, 1, () => frame(FRAME.WINDOW_UPDATE, 0, 0, uint32(0))),
  },
  {
    name: 'WINDOW_UPDATE past the largest window',
    isClosed: true,
    pour: (connection) => pour(connection, 2, () => frame(FRAME.WINDOW_UPDATE, 0, 0, uint32(2 ** 31 - 1))),
  },
  {
    name: 'WINDOW_UPDATE byte by byte',
    isClosed: false,
    pour: async (connection) => {
      await connection.send(headers(1, CHANGE, FLAG.END_HEADERS));
      const all = many(2000, () => frame(FRAME.WINDOW_UPDATE, 0, 1, uint32(1)));
      await pour(connection, 50, () => all);
    },
  },
  {
    name: 'windows opened and shut',
    isClosed: true,
    pour: async (connection) => {
      await connection.send(many(90, (i) => headers(1 + 2 * i, CHANGE, FLAG.END_HEADERS)));
      const all = many(1000, (i) => settings([SETTING.INITIAL_WINDOW_SIZE, i % 2 ? 0 : 2 ** 31 - 1]));
      await pour(connection, 20, () => all);
    },
  },
  {
    name: 'reflection asked again and again, its answers never taken',
    isClosed: false,
    opening: Buffer.concat([PREFACE, settings([SETTING.INITIAL_WINDOW_SIZE, 0])]),
    pour: async (connection) => {
      await connection.send(headers(1, REFLECTION, FLAG.END_HEADERS));
      const symbol = Buffer.from('rekey.v1.UserService');
      const asking = grpcMessage(Buffer.concat([Buffer.of(0x22, symbol.length), symbol]));
      const all = many(100, () => frame(FRAME.DATA, 0, 1, asking));
      await pour(connection, 20, () => all);
    },
  },
];

/** Runs `round` a few times, first for what is taken once and kept, and looks at the memory after. */
async function endure(
  round: () => Promise<void>,
  { warmUps = 1, rounds = ROUNDS, slackMiB = MEMORY_SLACK_MIB } = {},
): Promise<void> {
  const { server } = service;
  for (let i = 0; i < warmUps; i++) await round();
  await sleep(500);
  const memory = residentMiB(server.pid);
  well.takeLatencies();
  for (let i = 0; i < rounds; i++) await round();
  const p99 = quantile(well.takeLatencies(), 0.99);
  const allowed = memory * 1.1 + slackMiB;
  const settled = await settledMiB(server.pid, (mib) => mib <= allowed);
  assert.ok(settled <= allowed, `memory went from ${memory} to ${settled} MiB`);
  const bound = Math.max(10 * usualP99Ms, LATENCY_FLOOR_MS);
  assert.ok(p99 <= bound, `another client's p99 was ${p99} ms, usually ${usualP99Ms} ms`);
  await server.waitForHealth('SERVING');
}

for (const { name, isClosed, pour: run, opening } of floods) {
  test(`a flood: ${name}`, async () => {
    await endure(async () => {
      const connection = await RawConnection.open(service.server.address, opening);
      await run(connection);
      if (isClosed) assert.ok(await connection.closesWithin(5000), 'the server ends the connection');
      connection.destroy();
    });
  });
}

test('a flood: connections', async () => {
  await endure(async () => {
    const connections = await Promise.all(
      Array.from({ length: 300 }, () => RawConnection.open(service.server.address)),
    );
    await Promise.all(
      connections.map((connection) => connection.waitFor(({ type }) => type === FRAME.SETTINGS)),
    );
    for (const connection of connections) connection.destroy();
  });
});

test('a flood: connections dropped within a header block', async () => {
  await endure(async () => {
    for (let i = 0; i < 200; i++) {
      const connection = await RawConnection.open(service.server.address);
      await connection.send(
        headers(1, CHANGE, 0),
        frame(FRAME.CONTINUATION, 0, 1, headerBlock([['x', 'v'.repeat(1000)]])),
      );
      connection.destroy();
    }
  });
});

/** Of 24 MB of names each: were they kept, memory would grow by more than is allowed. */
const WATCH_ROUNDS = { warmUps: 2, rounds: 6, slackMiB: 80 };

test('a flood: health watched under ever new names', async () => {
  const name = (round: number, i: number) => Buffer.from(`${round}-${i}-`.padEnd(12_000, 'x'));
  let round = 0;
  await endure(async () => {
    round++;
    const connections = await Promise.all(
      Array.from({ length: 20 }, () => RawConnection.open(service.server.address)),
    );
    await Promise.all(
      connections.map(async (connection, at) => {
        for (let i = 0; i < 100; i++) {
          const id = 1 + 2 * i;
          const watched = Buffer.concat([Buffer.of(0x0a, 0xe0, 0x5d), name(round, 100 * at + i)]);
          await connection.send(
            headers(id, HEALTH_WATCH, FLAG.END_HEADERS),
            frame(FRAME.DATA, FLAG.END_STREAM, id, grpcMessage(watched)),
          );
          const answer = await connection.waitFor(
            ({ type, streamId }) => type === FRAME.DATA && streamId === id,
          );
          assert.ok(answer, 'SERVICE_UNKNOWN is told');
          await connection.send(frame(FRAME.RST_STREAM, 0, id, CANCEL));
        }
        connection.destroy();
      }),
    );
  }, WATCH_ROUNDS);
});

test('a client that resets calls in its own time, at every distance from their answers', async () => {
  const connection = await RawConnection.open(service.server.address);
  for (let i = 0; i < 300 && !connection.isClosed; i++) {
    const id = 1 + 2 * i;
    await connection.send(headers(id, i % 2 ? '/x.Y/Z' : CHANGE, END));
    if (i % 3 > 0) await sleep(i % 3);
    await connection.send(frame(FRAME.RST_STREAM, 0, id, CANCEL));
  }
  connection.destroy();
  await service.server.waitForHealth('SERVING');
});

test('through all of it nothing was said beside the log', () => {
  assert.equal(service.server.stderr, '');
});

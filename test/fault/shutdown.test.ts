import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { type PrivateDatabase, startPrivateDatabase } from '../support/private_database.ts';
import { Caller, truthOf } from './caller.ts';
import { Random } from './random.ts';
import { buildStage, LEDGER_SERVER_ARGS, type ServerPlace, type Stage } from './stage.ts';

const STOPS = Number(process.env.REKEY_FAULT_STOPS ?? 20);
const CLIENTS = 10;
const GRACE_S = 5;
/** A stop with nothing to wait for takes about as long as closing connections does. */
const MARGIN_MS = 3_000;
const seed = Number(process.env.REKEY_FAULT_SEED ?? Math.floor(Math.random() * 1e9));

let database: PrivateDatabase;
let stage: Stage;
let server: ServerPlace;

before(async () => {
  database = await startPrivateDatabase({ kind: 'mariadb', args: LEDGER_SERVER_ARGS });
  stage = await buildStage({
    databaseUrl: () => database.url(),
    servers: 1,
    environment: {
      REKEY_LIMITS_SHUTDOWN_GRACE_SECONDS: String(GRACE_S),
      REKEY_LOG_LEVEL: 'info',
    },
  });
  server = stage.servers[0] as ServerPlace;
});

after(async () => {
  await stage?.dispose();
  await database?.dispose();
});

interface Sent {
  readonly cid: string;
  readonly userId: string;
  readonly from: string;
  readonly to: string;
  readonly sentAt: number;
  reason: string;
}

test(`SIGTERM under load ${STOPS} times loses no acknowledged change and cuts no call (seed ${seed})`, async (t) => {
  const random = new Random(seed);
  let calls = 0;
  let inFlight = 0;
  let refusedUnseen = 0;
  let slowestMs = 0;
  // Calls take their time, so that some are under way whenever the signal comes.
  stage.proxy.decide = async ({ isCommit }) => {
    if (isCommit) await sleep(random.between(5, 120));
    return 'pass' as const;
  };
  const people = await Promise.all(
    Array.from({ length: CLIENTS }, async (_, index) => {
      const password = `first-password-${index}`;
      const userId = await stage.createUser({ username: `client${index}`, password });
      return { userId, password, ust: await stage.openSession(userId) };
    }),
  );
  for (let stop = 1; stop <= STOPS; stop++) {
    const caller = new Caller(stage);
    const sent: Sent[] = [];
    let isStopping = false;
    const working = people.map(async (person, index) => {
      for (let step = 1; !isStopping; step++) {
        const to = `password-${index}-${stop}-${step}`;
        const call: Sent = {
          cid: `stop${stop}.${index}.${step}`,
          userId: person.userId,
          from: person.password,
          to,
          sentAt: performance.now(),
          reason: 'under way',
        };
        sent.push(call);
        const { reason } = await caller.change(
          { ust: person.ust, cid: call.cid },
          { oldPassword: person.password, newPassword: to },
        );
        call.reason = reason;
        if (reason !== 'OK') return;
        person.password = to;
      }
    });
    await sleep(random.between(150, 500));
    inFlight += sent.filter(({ reason }) => reason === 'under way').length;
    const signalled = performance.now();
    const exiting = server.end('SIGTERM');
    await sleep(random.between(0, 100));
    isStopping = true;
    const exit = await exiting;
    slowestMs = Math.max(slowestMs, performance.now() - signalled);
    await Promise.all(working);
    caller.dispose();
    calls += sent.length;
    assert.deepEqual(exit, { code: 0, signal: null });
    const log = server.lines.join('\n');
    const db = await stage.connect();
    for (const call of sent) {
      const truth = await truthOf(db, stage.hasher, call.userId, [call.to, call.from], call.cid);
      const wasSeen = log.includes(`"cid":"${call.cid}"`);
      const where = JSON.stringify({ ...call, truth, wasSeen });
      if (call.reason === 'OK') assert.equal(truth.records, 1, `an acknowledged change is lost: ${where}`);
      else {
        assert.equal(truth.records, 0, `made, and not acknowledged: ${where}`);
        assert.equal(wasSeen, false, `begun, and cut within the grace period: ${where}`);
        refusedUnseen++;
      }
    }
    db.destroy();
    await server.start();
  }
  t.diagnostic(
    `${calls} calls, ${inFlight} of them under way at a SIGTERM, ${refusedUnseen} turned away unseen; slowest stop ${Math.round(slowestMs)} ms`,
  );
  stage.proxy.decide = undefined;
  assert.ok(inFlight > STOPS);
  assert.ok(slowestMs < GRACE_S * 1000 + MARGIN_MS);
});

/** A call that does not end by itself, on its way to the database. */
async function hangingCall(): Promise<{ caller: Caller; call: Promise<unknown> }> {
  const caller = new Caller(stage);
  const username = `hanging-${Math.round(performance.now() * 1000)}`;
  const userId = await stage.createUser({ username, password: 'hanging-password-1' });
  const ust = await stage.openSession(userId);
  let isThere = false;
  stage.proxy.decide = ({ isCommit }) => {
    isThere ||= isCommit;
    return isCommit ? 'swallow' : 'pass';
  };
  const call = caller.change(
    { ust, cid: username },
    { oldPassword: 'hanging-password-1', newPassword: 'hanging-password-2' },
  );
  while (!isThere) await sleep(5);
  stage.proxy.decide = undefined;
  return { caller, call };
}

test('a call that does not end is cut off after the grace period', async () => {
  const { caller, call } = await hangingCall();
  const start = performance.now();
  const exit = await server.end('SIGTERM');
  const ms = performance.now() - start;
  await call;
  caller.dispose();
  assert.equal(exit?.signal, null);
  assert.ok(ms > GRACE_S * 1000 - 200 && ms < GRACE_S * 1000 + MARGIN_MS, `${ms} ms`);
  await server.start();
});

test('a second signal ends the process at once', async () => {
  const { caller, call } = await hangingCall();
  server.signal('SIGTERM');
  await sleep(300);
  assert.ok(server.isRunning);
  const start = performance.now();
  const exit = await server.end('SIGTERM');
  const ms = performance.now() - start;
  await call;
  caller.dispose();
  assert.deepEqual(exit, { code: 1, signal: null });
  assert.ok(ms < 1000, `${ms} ms`);
  await server.start();
});

for (const [how, stall] of [
  ['swallows every command', () => (stage.proxy.decide = () => 'swallow')],
  ['takes connections and says nothing', () => stage.proxy.stall()],
] as const) {
  test(`a database that ${how} keeps no server from starting, from stopping, and from serving later`, async () => {
    await server.end('SIGTERM');
    stall();
    try {
      await server.start();
      await sleep(500);
      const start = performance.now();
      const exit = await server.end('SIGTERM');
      const ms = performance.now() - start;
      assert.deepEqual(exit, { code: 0, signal: null });
      assert.ok(ms < GRACE_S * 1000 + MARGIN_MS, `${ms} ms`);
      await server.start();
      await sleep(500);
    } finally {
      stage.proxy.decide = undefined;
      stage.proxy.resume();
    }
    const lines = server.lines.length;
    const deadline = performance.now() + 20_000;
    while (!server.lines.slice(lines - 1).some((line) => line.includes('serving: the database answers'))) {
      assert.ok(performance.now() < deadline, 'the server does not find its database again');
      await sleep(50);
    }
  });
}

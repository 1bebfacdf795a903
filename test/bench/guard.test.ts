/**
 * What a call costs, measured in units that a busy machine cannot change: statements, round trips, hashes in flight,
 * and main-thread CPU and memory against a baseline of the same run. No assertion here knows a time.
 */
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { after, before, describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { cpuTime, residentMb } from '../../bench/processes.ts';
import { countStatements, type StatementCounter } from '../../bench/statements.ts';
import { createTestDatabase, type TestDatabase } from '../support/private_database.ts';
import {
  checkHealth,
  type ServerProcess,
  type Service,
  startService,
  strongPassword,
  type TestUser,
} from '../support/service.ts';

/** Calls that one figure is the mean of; a background statement among them is lost in the rounding. */
const CALLS = 20;
const OWN_CHANGE_ROUND_TRIPS = 5;
const ANOTHERS_CHANGE_ROUND_TRIPS = 7;
const REFUSED_TOKEN_ROUND_TRIPS = 1;
/** A refusal for its token is one look-up and an error with details; a change five round trips and the policy. */
const CHANGE_AGAINST_REFUSAL = 5;
const PARALLEL_CALLS = 1_000;
const PARALLEL_MB = 200;
const SLOTS = 3;
/** CPU time and memory of another process are read from /proc. */
const onLinux = { skip: process.platform !== 'linux' };

describe('what a call costs', () => {
  let database: TestDatabase;
  let counter: StatementCounter;
  let service: Service;
  let server: ServerProcess;

  before(async () => {
    database = await createTestDatabase();
    service = await startService({}, { databaseUrl: database.url });
    counter = await countStatements(database.url);
    server = await service.startServer({ REKEY_DATABASE_URL: counter.url });
    await server.waitForHealth('SERVING');
  });
  after(async () => {
    await service?.stop();
    await counter?.close();
    await database?.drop();
  });

  const changeOwn = async (user: { ust: string; password: string }, times: number) => {
    for (let i = 0; i < times; i++) {
      const newPassword = strongPassword();
      const answer = await server.change(
        { ust: user.ust, app: 'CRM' },
        { oldPassword: user.password, newPassword },
      );
      assert.equal(answer.code, 'OK');
      user.password = newPassword;
    }
  };
  /** Statements of each of the calls that `work` makes, connections made and statements prepared. */
  const perCall = async (work: (times: number) => Promise<void>) => {
    await work(3);
    const { statements } = await counter.during(() => work(CALLS));
    const each = [...statements].map(([name, count]) => [name, Math.round(count / CALLS)] as const);
    return new Map(each.filter(([, count]) => count > 0));
  };
  const roundTrips = (statements: ReadonlyMap<string, number>) =>
    [...statements.values()].reduce((all, count) => all + count, 0);

  it(`an own change is ${OWN_CHANGE_ROUND_TRIPS} round trips at most, guard and audit included`, async (t) => {
    const user = { ...(await service.createUser()) };
    const statements = await perCall((times) => changeOwn(user, times));
    t.diagnostic(JSON.stringify([...statements]));
    assert.ok(roundTrips(statements) <= OWN_CHANGE_ROUND_TRIPS, JSON.stringify([...statements]));
    assert.ok(statements.has('COMMIT') && statements.has('INSERT INTO audit_log'), 'and all that it must be');
  });

  it(`a super-user's change of another's password is ${ANOTHERS_CHANGE_ROUND_TRIPS} round trips at most`, async (t) => {
    const boss = await service.createUser({ isSuperUser: true });
    const other = await service.createUser();
    const statements = await perCall(async (times) => {
      for (let i = 0; i < times; i++) {
        const message = { userId: other.userId, newPassword: strongPassword() };
        assert.equal((await server.change({ ust: boss.ust, app: 'CRM' }, message)).code, 'OK');
      }
    });
    t.diagnostic(JSON.stringify([...statements]));
    assert.ok(roundTrips(statements) <= ANOTHERS_CHANGE_ROUND_TRIPS, JSON.stringify([...statements]));
  });

  const refuse = async (times: number) => {
    const message = { oldPassword: strongPassword(), newPassword: strongPassword() };
    for (let i = 0; i < times; i++) {
      const answer = await server.change({ ust: randomUUID(), app: 'CRM' }, message);
      assert.equal(answer.code, 'UNAUTHENTICATED');
    }
  };

  it('a token that names no session costs one look-up and writes nothing', async () => {
    const statements = await perCall(refuse);
    assert.equal(roundTrips(statements), REFUSED_TOKEN_ROUND_TRIPS, JSON.stringify([...statements]));
    assert.match([...statements.keys()].join(), /^SELECT/);
  });

  it(
    `a change takes no more than ${CHANGE_AGAINST_REFUSAL} times the main thread's work of a refusal`,
    onLinux,
    async (t) => {
      const user = { ...(await service.createUser()) };
      const mainMs = async (work: (times: number) => Promise<void>) => {
        const start = cpuTime(server.pid).main;
        await work(5 * CALLS);
        return (cpuTime(server.pid).main - start) / (5 * CALLS);
      };
      await changeOwn(user, 5 * CALLS);
      await refuse(5 * CALLS);
      const ratios = [];
      for (let round = 0; round < 3; round++) {
        const change = await mainMs((times) => changeOwn(user, times));
        ratios.push(change / (await mainMs(refuse)));
      }
      ratios.sort((a, b) => a - b);
      t.diagnostic(`ratios: ${ratios.map((ratio) => ratio.toFixed(1)).join(', ')}`);
      assert.ok((ratios[1] as number) <= CHANGE_AGAINST_REFUSAL, `${ratios}`);
    },
  );
});

describe(`${PARALLEL_CALLS} calls at a time`, () => {
  it(
    `take at most ${SLOTS} slots and a bounded amount of memory, and whom they leave no room for is refused`,
    onLinux,
    async (t) => {
      const metricsPort = 20_000 + Math.floor(Math.random() * 10_000);
      const service = await startService({
        REKEY_HASH_MEMORY_KIB: '19456',
        REKEY_HASH_ITERATIONS: '2',
        REKEY_HASH_SLOTS: String(SLOTS),
        REKEY_HASH_QUEUE_LENGTH: '50',
        REKEY_LIMITS_STREAMS_PER_CONNECTION: String(PARALLEL_CALLS),
        REKEY_METRICS_LISTEN: `127.0.0.1:${metricsPort}`,
      });
      try {
        const { server } = service;
        const people: TestUser[] = [];
        for (let i = 0; i < 10; i++) people.push(await service.createUser());
        const change = (user: TestUser) =>
          server.change(
            { ust: user.ust, app: 'CRM' },
            { oldPassword: user.password, newPassword: strongPassword(), validateOnly: true },
          );
        await change(people[0] as TestUser);

        const idleMb = residentMb(server.pid);
        let peakMb = idleMb;
        let mostTaken = 0;
        let isOver = false;
        const watch = async () => {
          while (!isOver) {
            peakMb = Math.max(peakMb, residentMb(server.pid));
            const text = await (await fetch(`http://127.0.0.1:${metricsPort}/metrics`)).text();
            mostTaken = Math.max(mostTaken, Number(/^rekey_hash_slots_taken (\d+)/m.exec(text)?.[1]));
            await sleep(10);
          }
        };
        const watching = watch();
        const answers = await Promise.all(
          Array.from({ length: PARALLEL_CALLS }, (_, i) => change(people[i % people.length] as TestUser)),
        );
        isOver = true;
        await watching;

        const reasons = new Map<string, number>();
        for (const { reason } of answers) reasons.set(reason, (reasons.get(reason) ?? 0) + 1);
        t.diagnostic(
          `${JSON.stringify([...reasons])}; slots ${mostTaken}; ${idleMb.toFixed(0)} to ${peakMb.toFixed(0)} MB`,
        );
        assert.ok(mostTaken >= 1 && mostTaken <= SLOTS, `${mostTaken} slots taken`);
        assert.ok((reasons.get('') ?? 0) >= 1, 'some are served');
        assert.ok((reasons.get('OVERLOADED') ?? 0) >= PARALLEL_CALLS / 2, 'most are refused');
        assert.ok(peakMb - idleMb <= PARALLEL_MB, `from ${idleMb} to ${peakMb} MB`);
        assert.equal(await checkHealth(server.address), 'SERVING');
      } finally {
        await service.stop();
      }
    },
  );
});

import assert from 'node:assert/strict';
import { after, describe, mock, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { Wait } from '../../src/call.ts';
import { Database, type Executor } from '../../src/mysql/pool.ts';
import { Refusal } from '../../src/password/errors.ts';
import { freePort } from '../support/private_database.ts';
import { eventually, forAWhile, inTransaction, isBlocked, testBed } from './test_bed.ts';

const bed = await testBed();
const { sql } = bed;
await sql('CREATE TABLE counters (name VARCHAR(16) PRIMARY KEY, value INT NOT NULL) ENGINE = InnoDB');

const counters = new Map<string, string>();
async function counter(): Promise<string> {
  const name = `c${counters.size}`;
  counters.set(name, name);
  await sql('INSERT INTO counters VALUES (?, 0)', [name]);
  return name;
}

const stored = async (name: string) =>
  Number((await sql('SELECT value FROM counters WHERE name = ?', [name]))[0]?.value);

const increment = (executor: Pick<Executor, 'write'>, name: string) =>
  executor.write('UPDATE counters SET value = value + 1 WHERE name = ?', [name]);

async function connectionId(executor: Executor): Promise<number> {
  const [row] = await executor.rows<{ id: number }>('SELECT CONNECTION_ID() AS id');
  return Number(row?.id);
}

const single = (settings: Record<string, string> = {}) =>
  bed.open({ REKEY_DATABASE_POOL_SIZE: '1', ...settings });

const refusal =
  (...reasons: string[]) =>
  (error: unknown): boolean => {
    assert.ok(error instanceof Refusal, String(error));
    assert.ok(reasons.includes(error.reason), `${error.reason}: ${error.cause}`);
    return true;
  };

/** Both ways to run SQL, each with a pool of one connection. */
const ways: [
  string,
  (database: Database, wait: Wait, work: (db: Executor) => Promise<unknown>) => Promise<unknown>,
][] = [
  ['a statement', (database, wait, work) => work(database.statements(wait))],
  [
    'a transaction',
    (database, wait, work) => database.transaction(wait, { work, wasCommitted: async () => assert.fail() }),
  ],
];

describe('a connection', () => {
  test('works strictly, in UTC, and reads what is committed', async () => {
    const database = single({ REKEY_DATABASE_LOCK_WAIT_TIMEOUT_SECONDS: '7' });
    for (const [way, run] of ways) {
      await run(database, forAWhile(), async (db) => {
        const rows = await db.rows<{ Variable_name: string; Value: string }>('SHOW SESSION VARIABLES');
        const value = (...names: string[]) => rows.find((row) => names.includes(row.Variable_name))?.Value;
        assert.equal(value('time_zone'), '+00:00', way);
        assert.equal(value('sql_mode'), 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', way);
        assert.equal(value('tx_isolation', 'transaction_isolation'), 'READ-COMMITTED', way);
        assert.equal(value('innodb_lock_wait_timeout'), '7', way);
        assert.equal(value('autocommit'), way === 'a statement' ? 'ON' : 'OFF', way);
      });
    }
  });

  test('is used again', async () => {
    const database = single();
    const ids = [];
    for (let i = 0; i < 5; i++) ids.push(await connectionId(database.statements(forAWhile())));
    assert.equal(new Set(ids).size, 1);
  });

  test('whose transaction was given up is clean for the next borrower', async () => {
    const database = single();
    const name = await counter();
    let first = 0;
    await assert.rejects(
      inTransaction(database, async (tx) => {
        first = await connectionId(tx);
        await increment(tx, name);
        throw new Refusal('CONCURRENT_CHANGE');
      }),
      refusal('CONCURRENT_CHANGE'),
    );
    assert.equal(await stored(name), 0);
    await increment({ write: bed.db.write }, name);
    await inTransaction(database, async (tx) => {
      assert.equal(await connectionId(tx), first);
      const [row] = await tx.rows<{ value: number }>('SELECT value FROM counters WHERE name = ?', [name]);
      assert.equal(row?.value, 1);
    });
  });

  for (const [way, run] of ways) {
    test(`is given up when ${way} takes too long, and the next borrower gets a clean one`, async () => {
      const database = single({ REKEY_DATABASE_STATEMENT_TIMEOUT_MS: '200' });
      let first = 0;
      await run(database, forAWhile(), async (db) => {
        first = await connectionId(db);
      });
      const wait = Wait.forMs(500);
      const start = performance.now();
      await assert.rejects(
        run(database, wait, (db) => db.rows('SELECT SLEEP(20)')),
        refusal('UNAVAILABLE', 'DEADLINE_EXCEEDED'),
      );
      assert.ok(performance.now() - start < 10_000);
      await run(database, forAWhile(), async (db) => {
        assert.notEqual(await connectionId(db), first);
        assert.deepEqual(await db.rows('SELECT 1 AS one'), [{ one: 1 }]);
      });
    });

    test(`is given up when nobody waits for ${way} any more`, async () => {
      const database = single();
      const controller = new AbortController();
      const wait = new Wait(controller.signal, performance.now() + 60_000);
      const work = run(database, wait, (db) => db.rows('SELECT SLEEP(20)'));
      setTimeout(() => controller.abort(), 100);
      await assert.rejects(work, refusal('CANCELLED'));
      await run(database, forAWhile(), (db) => db.rows('SELECT 1'));
    });

    test(`is not even asked for when nobody waits for ${way}`, async () => {
      const over = new Wait(AbortSignal.abort(), performance.now() + 60_000);
      await assert.rejects(
        run(single(), over, (db) => db.rows('SELECT 1')),
        refusal('CANCELLED'),
      );
    });

    test(`stays when ${way} is wrong, and the error is not dressed up`, async () => {
      const database = single();
      let first = 0;
      await run(database, forAWhile(), async (db) => {
        first = await connectionId(db);
      });
      await assert.rejects(
        run(database, forAWhile(), (db) => db.rows('SELECT * FROM no_such_table')),
        { errno: 1146 },
      );
      await run(database, forAWhile(), async (db) => assert.equal(await connectionId(db), first));
    });

    test(`that was killed is replaced, and ${way} notices nothing`, async () => {
      const database = bed.open({ REKEY_DATABASE_POOL_SIZE: '3' });
      for (let round = 0; round < 3; round++) {
        const ids = new Set<number>();
        await Promise.all(
          [1, 2, 3].map(() =>
            run(database, forAWhile(), async (db) => {
              ids.add(await connectionId(db));
              await db.rows('SELECT SLEEP(0.05)');
            }),
          ),
        );
        for (const id of ids) await sql(`KILL ${id}`);
        await Promise.all(
          [1, 2, 3].map(() =>
            run(database, forAWhile(), async (db) => {
              assert.ok(!ids.has(await connectionId(db)));
            }),
          ),
        );
      }
    });
  }

  test('that has rested is proven alive before it is used', async (t) => {
    const database = single();
    const name = await counter();
    const db = database.statements(forAWhile());
    await sql(`KILL ${await connectionId(db)}`);
    const now = performance.now.bind(performance);
    const clock = mock.method(performance, 'now', () => now() + 6_000);
    t.after(() => clock.mock.restore());
    await increment(database.statements(forAWhile()), name);
    assert.equal(await stored(name), 1);
  });
});

describe('a pool that is full', () => {
  for (const [way, run] of ways) {
    test(`refuses ${way} inside the deadline, and leaks nothing`, async () => {
      const database = single();
      const hold = Promise.withResolvers<void>();
      const holding = run(database, forAWhile(), async (db) => {
        if (way === 'a statement') await db.rows('SELECT SLEEP(0.8)');
        else await hold.promise;
      });
      await sleep(50);
      const start = performance.now();
      const refused = await Promise.allSettled(
        Array.from({ length: 20 }, () => run(database, Wait.forMs(250), (db) => db.rows('SELECT 1'))),
      );
      assert.ok(performance.now() - start < 5_000);
      for (const each of refused) {
        assert.equal(each.status, 'rejected');
        refusal('UNAVAILABLE', 'DEADLINE_EXCEEDED')(each.reason);
      }
      hold.resolve();
      await holding;
      // Those who came too late get the connection and must hand it on, each of them.
      for (let i = 0; i < 5; i++) await run(database, forAWhile(), (db) => db.rows('SELECT 1'));
    });
  }

  test('lets those wait who have the time', async () => {
    const database = single();
    const name = await counter();
    await Promise.all(Array.from({ length: 20 }, () => inTransaction(database, (tx) => increment(tx, name))));
    assert.equal(await stored(name), 20);
  });

  test('goes on after its connection was given up while others waited for it', async () => {
    const database = single({ REKEY_DATABASE_STATEMENT_TIMEOUT_MS: '200' });
    const stuck = database.statements(Wait.forMs(300)).rows('SELECT SLEEP(20)');
    await sleep(20);
    const waiting = [1, 2, 3].map(() => connectionId(database.statements(forAWhile())));
    await assert.rejects(stuck);
    assert.equal((await Promise.all(waiting)).length, 3);
  });

  test('holds no more connections than it may', async () => {
    const database = bed.open({ REKEY_DATABASE_POOL_SIZE: '4' });
    const ids = new Set<number>();
    await Promise.all(
      Array.from({ length: 50 }, async () => ids.add(await connectionId(database.statements(forAWhile())))),
    );
    assert.ok(ids.size <= 4, String(ids.size));
  });
});

describe('a database that is away', () => {
  for (const [way, run] of ways) {
    test(`makes ${way} UNAVAILABLE inside the deadline, with a time to come again and the cause`, async () => {
      const url = new URL(bed.url);
      url.port = String(await freePort());
      const database = bed.open({}, url.href);
      const start = performance.now();
      await assert.rejects(
        run(database, Wait.forMs(400), (db) => db.rows('SELECT 1')),
        (error: Refusal) => {
          refusal('UNAVAILABLE', 'DEADLINE_EXCEEDED')(error);
          if (error.reason === 'DEADLINE_EXCEEDED') return true;
          assert.ok(error.cause instanceof Error);
          return (error.details.retryAfterMs ?? 0) >= 1000;
        },
      );
      assert.ok(performance.now() - start < 5_000);
      await assert.rejects(database.ping(200));
    });
  }

  test('answers a ping when it is there', async () => {
    await bed.database.ping(10_000);
  });
});

describe('a statement', () => {
  test('that writes is not repeated by itself when its connection is lost', async () => {
    const name = await counter();
    const statement = 'UPDATE counters SET value = value + 1 WHERE name = ? AND SLEEP(10) = 0';
    const writing = assert.rejects(
      single().statements(forAWhile()).write(statement, [name]),
      refusal('UNAVAILABLE'),
    );
    await eventually('the statement is killed', async () => {
      const running = (await sql('SHOW FULL PROCESSLIST')).find(
        ({ db, Info }) => db === bed.config.database.url.split('/').at(-1) && /SLEEP\(10\)/.test(Info),
      );
      if (running) await sql(`KILL ${running.Id}`);
      return running !== undefined;
    });
    await writing;
    assert.equal(await stored(name), 0);
  });

  test('that may be repeated is, when its connection is lost', async () => {
    const database = single();
    const name = await counter();
    await sql(`KILL ${await connectionId(database.statements(forAWhile()))}`);
    const { matched } = await database
      .statements(forAWhile())
      .writeRepeatably('UPDATE counters SET value = 5 WHERE name = ?', [name]);
    assert.deepEqual([matched, await stored(name)], [1, 5]);
  });

  test('tells the rows that matched, changed or not, and the ID that was given', async () => {
    const name = await counter();
    const same = () => bed.db.write('UPDATE counters SET value = 0 WHERE name = ?', [name]);
    assert.equal((await same()).matched, 1);
    assert.equal((await bed.db.write('UPDATE counters SET value = 0 WHERE name = ?', ['none'])).matched, 0);
    await sql('CREATE TABLE numbers (id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY)');
    assert.equal((await bed.db.write('INSERT INTO numbers () VALUES ()')).insertId, 1);
  });

  test('is tried again after a lock wait timeout', async () => {
    const database = single({ REKEY_DATABASE_LOCK_WAIT_TIMEOUT_SECONDS: '1' });
    const name = await counter();
    const other = await bed.connect();
    await other.query('BEGIN');
    await other.query('UPDATE counters SET value = 10 WHERE name = ?', [name]);
    const writing = increment(database.statements(forAWhile()), name);
    await sleep(1300);
    await other.query('COMMIT');
    await writing;
    assert.equal(await stored(name), 11);
  });
});

describe('a transaction', () => {
  test('is all or nothing', async () => {
    const [one, other] = [await counter(), await counter()];
    await inTransaction(bed.database, async (tx) => {
      await increment(tx, one);
      await increment(tx, other);
      assert.deepEqual([await stored(one), await stored(other)], [0, 0]);
    });
    assert.deepEqual([await stored(one), await stored(other)], [1, 1]);
    await assert.rejects(
      inTransaction(bed.database, async (tx) => {
        await increment(tx, one);
        await tx.write('INSERT INTO counters VALUES (?, 0)', [other]);
      }),
      { errno: 1062 },
    );
    assert.deepEqual([await stored(one), await stored(other)], [1, 1]);
  });

  test('that is a deadlock with another is tried again, and both take effect once', async () => {
    const [one, other] = [await counter(), await counter()];
    let attempts = 0;
    const bothHoldOne = [Promise.withResolvers<void>(), Promise.withResolvers<void>()] as const;
    const crossing = (first: string, second: string, mine: 0 | 1) =>
      inTransaction(bed.database, async (tx) => {
        attempts++;
        await increment(tx, first);
        bothHoldOne[mine].resolve();
        await bothHoldOne[1 - mine]?.promise;
        await increment(tx, second);
      });
    await Promise.all([crossing(one, other, 0), crossing(other, one, 1)]);
    assert.ok(attempts >= 3, String(attempts));
    assert.deepEqual([await stored(one), await stored(other)], [2, 2]);
  });

  test('that waited too long for a lock is rolled back as a whole and tried again', async () => {
    const database = single({ REKEY_DATABASE_LOCK_WAIT_TIMEOUT_SECONDS: '1' });
    const [free, taken] = [await counter(), await counter()];
    const other = await bed.connect();
    await other.query('BEGIN');
    await other.query('UPDATE counters SET value = 10 WHERE name = ?', [taken]);
    let attempts = 0;
    const work = inTransaction(database, async (tx) => {
      attempts++;
      await increment(tx, free);
      await increment(tx, taken);
    });
    await sleep(1300);
    await other.query('COMMIT');
    await work;
    assert.ok(attempts >= 2);
    assert.deepEqual([await stored(free), await stored(taken)], [1, 11]);
  });

  test('that nothing but conflicts meets is given up after a few tries', async () => {
    const name = await counter();
    let attempts = 0;
    await assert.rejects(
      inTransaction(bed.database, async (tx) => {
        attempts++;
        await increment(tx, name);
        throw Object.assign(new Error('Deadlock found'), { errno: 1213, sqlState: '40001' });
      }),
      refusal('UNAVAILABLE'),
    );
    assert.ok(attempts >= 2 && attempts <= 5, String(attempts));
    assert.equal(await stored(name), 0);
  });

  test('whose connection is killed half-way is begun again, and takes effect once', async () => {
    const name = await counter();
    let attempts = 0;
    await inTransaction(bed.database, async (tx) => {
      await increment(tx, name);
      if (++attempts === 1) await sql(`KILL ${await connectionId(tx)}`);
      await increment(tx, name);
    });
    assert.equal(attempts, 2);
    assert.equal(await stored(name), 2);
  });

  test('that nobody waits for any more is not committed', async () => {
    const name = await counter();
    const controller = new AbortController();
    const wait = new Wait(controller.signal, performance.now() + 60_000);
    await assert.rejects(
      bed.database.transaction(wait, {
        work: async (tx) => {
          await increment(tx, name);
          controller.abort();
        },
        wasCommitted: async () => assert.fail(),
      }),
      refusal('CANCELLED'),
    );
    assert.equal(await stored(name), 0);
    const changing = increment({ write: bed.db.write }, name);
    assert.ok(!(await isBlocked(changing)), 'its locks are gone');
  });

  test('books its time for the call, retries and waiting included', async () => {
    const wait = forAWhile();
    await bed.database.transaction(wait, {
      work: (tx) => tx.rows('SELECT SLEEP(0.05)'),
      wasCommitted: async () => assert.fail(),
    });
    assert.ok(wait.spent.database >= 45, String(wait.spent.database));
  });
});

test('closing ends the connections at the server', async () => {
  const database = new Database(bed.config);
  const ids = [await connectionId(database.statements(forAWhile()))];
  await inTransaction(database, async (tx) => {
    ids.push(await connectionId(tx));
  });
  await database.close();
  await eventually('the connections are gone', async () => {
    const open = new Set((await sql('SHOW PROCESSLIST')).map(({ Id }) => Number(Id)));
    return ids.every((id) => !open.has(id));
  });
  await assert.rejects(database.ping(500));
});

after(() => mock.restoreAll());

import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { Wait } from '../../src/call.ts';
import { insertAuditRecord } from '../../src/mysql/audit.ts';
import { type Retention, removeExpired } from '../../src/mysql/cleaning.ts';
import { recordOutcome } from '../../src/mysql/idempotency.ts';
import {
  countLoginAttempt,
  forgiveLoginAttempts,
  loginWindowAgeMs,
  type Subject,
} from '../../src/mysql/login_attempts.ts';
import type { Executor } from '../../src/mysql/pool.ts';
import { forAWhile, testBed } from './test_bed.ts';

const bed = await testBed();
const { db, database, sql } = bed;
const WINDOW_SECONDS = 900;

const account = (name: string): Subject => ({ kind: 'account', name });
const address = (name: string): Subject => ({ kind: 'address', name });
const count = (subject: Subject) => countLoginAttempt(db, subject, WINDOW_SECONDS);
const age = (seconds: number) =>
  sql('UPDATE login_attempts SET since = since - INTERVAL ? SECOND', [seconds]);

describe('log-ins are counted', () => {
  test('for each account and each address by itself', async () => {
    assert.deepEqual([await count(account('ada')), await count(account('ada'))], [1, 2]);
    assert.equal(await count(account('ben')), 1);
    assert.equal(await count(address('ada')), 1);
    assert.equal(await count(account('ada')), 3);
  });

  test('each exactly once, in parallel too', async () => {
    const counts = await Promise.all(Array.from({ length: 50 }, () => count(account('parallel'))));
    const each = Array.from({ length: 50 }, (_, index) => index + 1);
    assert.deepEqual(
      counts.sort((a, b) => a - b),
      each,
    );
    assert.equal(await count(account('parallel')), 51);
  });

  test('within a window that begins with the first and does not move', async () => {
    await count(account('window'));
    await age(100);
    assert.equal(await count(account('window')), 2);
    const ageMs = await loginWindowAgeMs(db, account('window'));
    assert.ok(ageMs >= 100_000 && ageMs < 160_000, String(ageMs));
    await age(WINDOW_SECONDS - 160);
    assert.equal(await count(account('window')), 3);
    await age(100);
    assert.equal(await count(account('window')), 1);
    assert.ok((await loginWindowAgeMs(db, account('window'))) < 60_000);
  });

  test('and forgiven after a right password: all of the account, one of the address', async () => {
    for (let i = 0; i < 3; i++) {
      await count(account('right'));
      await count(address('::1'));
    }
    await count(account('another'));
    await forgiveLoginAttempts(db, account('right'), address('::1'));
    assert.equal(await count(account('right')), 1);
    assert.equal(await count(address('::1')), 3);
    assert.equal(await count(account('another')), 2);
  });

  test('never below nothing', async () => {
    await count(address('::2'));
    for (let i = 0; i < 3; i++) await forgiveLoginAttempts(db, account('nobody'), address('::2'));
    assert.equal(await count(address('::2')), 1);
  });

  test('without keeping the names', async () => {
    await count(account('a name to be kept secret'));
    const rows = await sql('SELECT subject FROM login_attempts');
    for (const { subject } of rows) assert.equal((subject as Buffer).length, 32);
  });
});

describe('what is past its retention', () => {
  const keep: Retention = { sessionDays: 30, idempotencyHours: 24, loginAttemptSeconds: 900, auditDays: 0 };
  const remove = (retention: Partial<Retention> = {}, signal = new AbortController().signal) =>
    removeExpired(db, { ...keep, ...retention }, signal);
  const call = {
    cid: 'c',
    app: 'CRM',
    remoteAddress: '::1',
    peerAddress: '::1',
    claimedAddress: undefined,
  };
  const event = {
    action: 'x',
    outcome: 'ok' as const,
    reason: '',
    actorUserId: null,
    targetUserId: null,
    request: {},
  };

  test('is removed, and nothing else', async () => {
    const userId = await bed.user();
    const sessions = [await bed.session(userId), await bed.session(userId), await bed.session(userId)];
    await sql('UPDATE sessions SET expires_at = UTC_TIMESTAMP(6) - INTERVAL 31 DAY WHERE session_id = ?', [
      sessions[0]?.sessionId ?? 0,
    ]);
    await sql('UPDATE sessions SET expires_at = UTC_TIMESTAMP(6) - INTERVAL 29 DAY WHERE session_id = ?', [
      sessions[1]?.sessionId ?? 0,
    ]);
    const outcome = { requestMac: Buffer.alloc(32), passwordExpiresAt: null, sessionsEnded: 0 };
    for (const [key, hours] of [
      ['old', 25],
      ['young', 23],
    ] as const) {
      await recordOutcome(db, userId, key, outcome);
      await sql(
        'UPDATE idempotency_records SET created_at = created_at - INTERVAL ? HOUR WHERE idempotency_key = ?',
        [hours, key],
      );
    }
    await sql('DELETE FROM login_attempts');
    await count(account('old'));
    await age(901);
    await count(account('young'));
    const record = await insertAuditRecord(db, call, event);
    await sql('UPDATE audit_log SET at = at - INTERVAL 1000 DAY WHERE audit_id = ?', [record.auditId]);

    assert.deepEqual(await remove(), { sessions: 1, idempotency: 1, loginAttempts: 1, audit: 0 });
    assert.deepEqual(await remove(), { sessions: 0, idempotency: 0, loginAttempts: 0, audit: 0 });
    assert.deepEqual(await remove({ auditDays: 1001 }), {
      sessions: 0,
      idempotency: 0,
      loginAttempts: 0,
      audit: 0,
    });
    assert.equal((await remove({ auditDays: 999 })).audit, 1);
    const left = await sql('SELECT session_id FROM sessions WHERE user_id = ? ORDER BY session_id', [userId]);
    assert.deepEqual(
      left.map(({ session_id }) => session_id),
      [sessions[1]?.sessionId, sessions[2]?.sessionId],
    );
    const keys = await sql('SELECT idempotency_key FROM idempotency_records WHERE user_id = ?', [userId]);
    assert.deepEqual(
      keys.map(({ idempotency_key }) => idempotency_key),
      ['young'],
    );
  });

  test('is removed however much there is, and stops between two batches when told to', async () => {
    const rows = Array.from({ length: 450 }, (_, i) => `(UNHEX(SHA2('${i}', 256)), 1, '2020-01-01')`);
    const fill = () => sql(`INSERT INTO login_attempts (subject, attempts, since) VALUES ${rows.join(', ')}`);
    await sql('DELETE FROM login_attempts');
    await fill();
    assert.equal((await remove()).loginAttempts, 450);
    await fill();
    const stopped = await remove({}, AbortSignal.abort());
    assert.ok(stopped.loginAttempts < 450);
  });
});

describe('work that one replica does at a time', () => {
  test('is done by one of those who try at once, and by another afterwards', async () => {
    const other = bed.open({});
    let atWork = 0;
    const work = async () => {
      assert.equal(++atWork, 1);
      await sleep(100);
      atWork--;
    };
    const did = await Promise.all(
      [database, other, database, other].map((each) => each.exclusively('work_', forAWhile(), work)),
    );
    assert.equal(did.filter(Boolean).length, 1);
    assert.equal(await other.exclusively('work_', forAWhile(), work), true);
    assert.equal(await database.exclusively('work_', forAWhile(), work), true);
  });

  test('is free again after it failed', async () => {
    const other = bed.open({});
    await assert.rejects(
      database.exclusively('failing_', forAWhile(), async () => {
        throw new Error('failed');
      }),
      /failed/,
    );
    assert.equal(await other.exclusively('failing_', forAWhile(), async () => {}), true);
  });

  for (const [when, abandoned] of [
    ['at the end', async () => {}],
    [
      'at its next statement',
      async (statements: Executor) => {
        await statements.rows('SELECT 1');
      },
    ],
  ] as const) {
    test(`is free again after nobody waited for it any more ${when}`, async () => {
      const other = bed.open({});
      const controller = new AbortController();
      const wait = new Wait(controller.signal, performance.now() + 60_000);
      await database
        .exclusively('abandoned_', wait, async (statements) => {
          controller.abort();
          await abandoned(statements);
        })
        .catch((error) => assert.equal(error.reason, 'CANCELLED'));
      assert.equal(await other.exclusively('abandoned_', forAWhile(), async () => {}), true);
    });
  }

  test('of one database is no concern of another', async () => {
    const stranger = await testBed();
    await database.exclusively('shared_', forAWhile(), async () => {
      assert.equal(await stranger.database.exclusively('shared_', forAWhile(), async () => {}), true);
    });
  });
});

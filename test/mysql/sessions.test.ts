import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { describe, test } from 'node:test';
import { recordOutcome } from '../../src/mysql/idempotency.ts';
import {
  countOtherSessions,
  endSession,
  endSessions,
  findSession,
  findSessionOwner,
  insertSession,
  listSessions,
  lockAuthority,
  newToken,
} from '../../src/mysql/sessions.ts';
import { findUser, setApproval, setLocked, setSuperUser } from '../../src/mysql/users.ts';
import { inTransaction, isBlocked, testBed } from './test_bed.ts';

const bed = await testBed();
const { db, database, sql } = bed;

const expire = (sessionId: number) =>
  sql('UPDATE sessions SET expires_at = UTC_TIMESTAMP(6) WHERE session_id = ?', [sessionId]);

describe('a token', () => {
  test('has 256 random bits, in characters that metadata can hold', () => {
    const tokens = Array.from({ length: 1000 }, newToken);
    assert.equal(new Set(tokens).size, 1000);
    for (const token of tokens) {
      assert.match(token, /^[A-Za-z0-9_-]{43}$/);
      assert.equal(Buffer.from(token, 'base64url').length, 32);
    }
  });

  test('is stored as its SHA-256 and in no other way', async () => {
    const { token, sessionId } = await bed.session(await bed.user());
    const [row] = await sql('SELECT * FROM sessions WHERE session_id = ?', [sessionId]);
    assert.deepEqual(row?.token_hash, createHash('sha256').update(token).digest());
    assert.ok(!Object.values(row ?? {}).some((value) => String(value).includes(token)));
  });

  test('belongs to one session', async () => {
    const userId = await bed.user();
    const session = {
      token: newToken(),
      userId,
      app: 'CRM',
      remoteAddress: '::1',
      openedAt: new Date(),
      expiresAt: new Date(),
    };
    await insertSession(db, session);
    await assert.rejects(insertSession(db, session), { errno: 1062 });
  });
});

describe('a session', () => {
  test('is found by its token, with its user', async () => {
    const userId = await bed.user({ isSuperUser: true });
    const { token, sessionId } = await bed.session(userId);
    const session = await findSession(db, token, undefined);
    assert.equal(session?.sessionId, sessionId);
    assert.deepEqual(session.user, await findUser(db, userId));
    assert.equal(session.earlier, undefined);
    assert.ok(Math.abs(session.now.getTime() - Date.now()) < 60_000);
    const lifetimeMs = session.expiresAt.getTime() - session.now.getTime();
    assert.ok(lifetimeMs > 3_500_000 && lifetimeMs <= 3_600_000 + 60_000, String(lifetimeMs));
  });

  test('is not found by anything else', async () => {
    const { token } = await bed.session(await bed.user());
    for (const other of [
      '',
      token.slice(1),
      `${token} `,
      token.toLowerCase(),
      newToken(),
      "' OR 1=1 -- ",
      '\0',
    ]) {
      assert.equal(await findSession(db, other, undefined), undefined, other);
    }
  });

  test('is over when it has expired, by the clock of the database, or was ended', async () => {
    const [expired, ended] = [await bed.session(await bed.user()), await bed.session(await bed.user())];
    await expire(expired.sessionId);
    assert.equal(await endSession(db, ended.sessionId), true);
    for (const { token, sessionId } of [expired, ended]) {
      assert.equal(await findSession(db, token, undefined), undefined);
      assert.equal(await inTransaction(database, (tx) => lockAuthority(tx, sessionId)), undefined);
      assert.equal(await endSession(db, sessionId), false);
    }
    assert.equal(await endSession(db, 999_999_999), false);
  });

  test('needs a user', async () => {
    await assert.rejects(bed.session('nobody'), { errno: 1452 });
  });

  test('has an owner, live or not', async () => {
    const userId = await bed.user();
    const { sessionId } = await bed.session(userId);
    await endSession(db, sessionId);
    assert.equal(await findSessionOwner(db, sessionId), userId);
    assert.equal(await findSessionOwner(db, 999_999_999), undefined);
  });
});

describe('the sessions of a user', () => {
  test("end all at once, those that live, and nobody else's", async () => {
    const [userId, neighbour] = [await bed.user(), await bed.user()];
    const { token: theirs } = await bed.session(neighbour);
    const { sessionId: expired } = await bed.session(userId);
    await expire(expired);
    for (let i = 0; i < 3; i++) await bed.session(userId);
    const { sessionId: own } = await bed.session(userId);
    assert.equal(await countOtherSessions(db, userId, own), 3);
    assert.equal(await countOtherSessions(db, userId, undefined), 4);
    assert.equal(await endSessions(db, userId), 4);
    assert.equal(await endSessions(db, userId), 0);
    assert.equal(await countOtherSessions(db, userId, undefined), 0);
    assert.ok(await findSession(db, theirs, undefined));
    const [row] = await sql('SELECT ended_at FROM sessions WHERE session_id = ?', [expired]);
    assert.equal(row?.ended_at, null);
  });

  test('are listed while they live, newest first, of one user or of all', async () => {
    const own = await testBed();
    const [ada, ben] = [await own.user({ username: 'ada' }), await own.user({ username: 'ben' })];
    const first = await own.session(ada);
    const second = await own.session(ben);
    const third = await own.session(ada);
    const over = await own.session(ada);
    await endSession(own.db, over.sessionId);
    const ids = async (userId: string | undefined, limit = 10) =>
      (await listSessions(own.db, userId, limit)).map(({ sessionId }) => sessionId);
    assert.deepEqual(await ids(undefined), [third.sessionId, second.sessionId, first.sessionId]);
    assert.deepEqual(await ids(undefined, 2), [third.sessionId, second.sessionId]);
    assert.deepEqual(await ids(ada), [third.sessionId, first.sessionId]);
    assert.deepEqual(await ids('nobody'), []);
    const [listed] = await listSessions(own.db, ben, 1);
    assert.partialDeepStrictEqual(listed, {
      userId: ben,
      username: 'ben',
      app: 'CRM',
      remoteAddress: '192.0.2.1',
    });
    assert.equal((listed?.expiresAt.getTime() ?? 0) - (listed?.openedAt.getTime() ?? 0), 3_600_000);
  });
});

describe('authority, once locked', () => {
  for (const [what, change] of [
    ['locked', (userId: string) => setLocked(db, userId, true)],
    ['demoted', (userId: string) => setSuperUser(db, userId, false)],
    ['rejected', (userId: string) => setApproval(db, userId, 'rejected')],
    ['logged out', (_userId: string, sessionId: number) => endSession(db, sessionId)],
    ['logged out everywhere', (userId: string) => endSessions(db, userId)],
  ] as const) {
    test(`keeps its user from being ${what} until the transaction ends`, async () => {
      const userId = await bed.user({ isSuperUser: true });
      const { sessionId } = await bed.session(userId);
      let changing: Promise<unknown> = Promise.resolve();
      await inTransaction(database, async (tx) => {
        assert.partialDeepStrictEqual(await lockAuthority(tx, sessionId), {
          isSuperUser: true,
          isLocked: false,
          approval: 'approved',
          passwordHasExpired: false,
          mustChange: false,
        });
        changing = change(userId, sessionId);
        assert.ok(await isBlocked(changing));
      });
      assert.notEqual(await changing, false);
      const after = await inTransaction(database, (tx) => lockAuthority(tx, sessionId));
      assert.ok(
        !after || after.isLocked || !after.isSuperUser || after.approval === 'rejected',
        JSON.stringify(after),
      );
    });
  }

  test('is what it is after those who came first have ended', async () => {
    const userId = await bed.user({ isSuperUser: true });
    const { sessionId } = await bed.session(userId);
    let seen: Promise<unknown> = Promise.resolve();
    await inTransaction(database, async (tx) => {
      await setSuperUser(tx, userId, false);
      seen = inTransaction(database, (other) => lockAuthority(other, sessionId));
      assert.ok(await isBlocked(seen));
    });
    assert.partialDeepStrictEqual(await seen, { isSuperUser: false });
  });

  test('is shared: two changes by one super-user do not wait for each other', async () => {
    const { sessionId } = await bed.session(await bed.user({ isSuperUser: true }));
    await inTransaction(database, async (tx) => {
      await lockAuthority(tx, sessionId);
      assert.ok(await inTransaction(database, (other) => lockAuthority(other, sessionId)));
    });
  });
});

describe('the outcome of a change', () => {
  const outcome = {
    requestMac: Buffer.alloc(32, 7),
    passwordExpiresAt: new Date('2031-05-06T07:08:09.123Z'),
    sessionsEnded: 3,
  };

  test('is found with the session, under its key and its user', async () => {
    const [userId, neighbour] = [await bed.user(), await bed.user()];
    const { token } = await bed.session(userId);
    const { token: theirs } = await bed.session(neighbour);
    assert.equal(await recordOutcome(db, userId, 'Key 1', outcome), true);
    assert.deepEqual((await findSession(db, token, 'Key 1'))?.earlier, outcome);
    for (const key of ['key 1', ' Key 1', 'Key', '', undefined]) {
      assert.equal((await findSession(db, token, key))?.earlier, undefined, key);
    }
    assert.equal((await findSession(db, theirs, 'Key 1'))?.earlier, undefined);
  });

  test('may be a password that never expires', async () => {
    const userId = await bed.user();
    const { token } = await bed.session(userId);
    await recordOutcome(db, userId, 'never', { ...outcome, passwordExpiresAt: null, sessionsEnded: 0 });
    const { earlier } = (await findSession(db, token, 'never')) ?? {};
    assert.deepEqual(earlier, { ...outcome, passwordExpiresAt: null, sessionsEnded: 0 });
  });

  test('is recorded once for a key and a user; the first one stays', async () => {
    const [userId, neighbour] = [await bed.user(), await bed.user()];
    const { token } = await bed.session(userId);
    assert.equal(await recordOutcome(db, userId, 'twice', outcome), true);
    assert.equal(await recordOutcome(db, userId, 'twice', { ...outcome, sessionsEnded: 9 }), false);
    assert.equal(await recordOutcome(db, neighbour, 'twice', outcome), true);
    assert.equal((await findSession(db, token, 'twice'))?.earlier?.sessionsEnded, 3);
  });

  test('of one key is recorded by exactly one of ten who do it at once', async () => {
    const userId = await bed.user();
    const recorded = await Promise.all(
      Array.from({ length: 10 }, () =>
        inTransaction(database, (tx) => recordOutcome(tx, userId, 'race', outcome)),
      ),
    );
    assert.equal(recorded.filter(Boolean).length, 1);
  });

  test('that is rolled back leaves the key free', async () => {
    const userId = await bed.user();
    await assert.rejects(
      inTransaction(database, async (tx) => {
        assert.equal(await recordOutcome(tx, userId, 'again', outcome), true);
        throw new Error('undone');
      }),
      /undone/,
    );
    assert.equal(await recordOutcome(db, userId, 'again', outcome), true);
  });
});
